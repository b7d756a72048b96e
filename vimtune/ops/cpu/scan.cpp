// Selective scan, forward and backward, fp32, channel-last. The formula is in ops/reference.py.
//
// Lanes run over channels. A work item is one sample and BLOCK adjacent channels; it walks the tokens
// in chunks of CHUNK whose working set stays in the first two cache levels. The forward saves the state
// before each chunk. The backward recomputes states and decays inside one chunk at a time, four states
// (columns of A) at once, then walks the chunk back. States are padded to a multiple of four with
// A = B = C = 0, which adds nothing.
//
// Sums over channels (dB, dC) go into one partial row per block, sums over samples (dA, dD, dbias)
// into one row per sample; both are added up in a fixed order afterwards.

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int CHUNK = 32;
constexpr int BLOCK = 64;
constexpr int VECTORS = BLOCK / W;  // per block
constexpr int Q = 4;                // states handled together

}  // namespace

extern "C" {

// Mirrored by `ScanArguments` in __init__.py. Strides in floats; channels are adjacent everywhere.
struct ScanArguments {
    // u, delta, z, grad (batch, tokens, inner); A (inner, states); B, C (batch, tokens, states)
    const float *u, *delta, *A, *B, *C, *D, *z, *bias, *grad;
    // out as u; saved states (chunks, batch, states, inner); all contiguous. Null: not wanted.
    float *out, *saved;
    float *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_bias;
    TeamLauncher launch;
    int64_t batch, tokens, inner, states;
    int64_t u_batch, u_token, delta_batch, delta_token, A_row, B_batch, B_token, C_batch, C_token;
    int64_t z_batch, z_token, grad_batch, grad_token;
    int64_t num_threads, softplus, reverse;
};

}  // extern "C"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded_states(const ScanArguments& a) { return ceil_div(a.states, Q) * Q; }

// One work item: which sample, which channels, and where position i of the scan lies in memory.
struct Item {
    const ScanArguments& a;
    int64_t sample, block, first_channel;
    int vectors;

    Item(const ScanArguments& a, int64_t item)
        : a(a), sample(item % a.batch), block(item / a.batch), first_channel(block * BLOCK) {
        vectors = static_cast<int>(ceil_div(std::min<int64_t>(BLOCK, a.inner - first_channel), W));
    }
    int64_t channel(int v) const { return first_channel + v * W; }
    int lanes(int v) const { return static_cast<int>(std::min<int64_t>(W, a.inner - channel(v))); }
    int64_t token(int64_t position) const { return a.reverse ? a.tokens - 1 - position : position; }
    int64_t row(int64_t token) const { return (sample * a.tokens + token) * a.inner; }  // of contiguous tensors
    float* saved(int64_t chunk, int64_t n, int v) const {
        return a.saved + ((chunk * a.batch + sample) * a.states + n) * a.inner + channel(v);
    }
};

// Hands out pieces of one thread's scratch memory; without memory it only counts.
struct Scratch {
    float* memory;
    size_t used = 0;  // floats
    template <class T>
    T* take(int64_t count) {
        T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += ceil_div(count * sizeof(T), 64) * 16;
        return piece;
    }
};

// Rows of B or C in scan order, padded with zeros.
void pack_rows(const Item& item, const float* source, int64_t sample_stride, int64_t token_stride, int64_t start,
               int length, int64_t padded, float* target) {
    for (int i = 0; i < length; ++i) {
        const float* row = source + item.sample * sample_stride + item.token(start + i) * token_stride;
        float* to = target + i * padded;
        std::copy(row, row + item.a.states, to);
        std::fill(to + item.a.states, to + padded, 0.0f);
    }
}

// Columns of A for one vector of channels, times log2(e) as the decays are powers of two.
void pack_A(const Item& item, int v, int64_t padded, vf* target) {
    std::fill(target, target + padded, vf{});
    for (int lane = 0; lane < item.lanes(v); ++lane) {
        const float* row = item.a.A + (item.channel(v) + lane) * item.a.A_row;
        for (int64_t n = 0; n < item.a.states; ++n) target[n][lane] = row[n] * LOG2E;
    }
}

vf channel_vector(const Item& item, const float* vector, int v) {
    return vector ? load(vector + item.channel(v), item.lanes(v)) : vf{};
}

// ---------------------------------------------------------------- forward

struct ForwardWork {
    float *B, *C;         // (CHUNK, padded)
    vf *A, *state;        // (VECTORS, padded)
    vf *dt, *dt_u, *y;    // (CHUNK,) of the vector at hand
    size_t size;

    ForwardWork(float* memory, int64_t padded) {
        Scratch scratch{memory};
        B = scratch.take<float>(CHUNK * padded);
        C = scratch.take<float>(CHUNK * padded);
        A = scratch.take<vf>(VECTORS * padded);
        state = scratch.take<vf>(VECTORS * padded);
        dt = scratch.take<vf>(CHUNK);
        dt_u = scratch.take<vf>(CHUNK);
        y = scratch.take<vf>(CHUNK);
        size = scratch.used;
    }
};

void forward_states(int length, int64_t padded, const vf* A, const float* B, const float* C, const vf* dt,
                    const vf* dt_u, vf* state, vf* y) {
    vf s[Q], a[Q];
    for (int j = 0; j < Q; ++j) s[j] = state[j], a[j] = A[j];
    for (int i = 0; i < length; ++i) {
        vf sum = y[i];
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            s[j] = exp2_fast(dt[i] * a[j]) * s[j] + dt_u[i] * B[i * padded + j];
            sum += s[j] * C[i * padded + j];
        }
        y[i] = sum;
    }
    for (int j = 0; j < Q; ++j) state[j] = s[j];
}

void forward_item(const ScanArguments& a, int64_t index, float* memory) {
    const Item item(a, index);
    const int64_t padded = padded_states(a);
    const ForwardWork w(memory, padded);
    float *B = w.B, *C = w.C;
    vf *A = w.A, *state = w.state, *dt = w.dt, *dt_u = w.dt_u, *y = w.y;
    for (int v = 0; v < item.vectors; ++v) pack_A(item, v, padded, A + v * padded);
    std::fill(state, state + VECTORS * padded, vf{});

    for (int64_t start = 0, chunk = 0; start < a.tokens; start += CHUNK, ++chunk) {
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, a.tokens - start));
        pack_rows(item, a.B, a.B_batch, a.B_token, start, length, padded, B);
        pack_rows(item, a.C, a.C_batch, a.C_token, start, length, padded, C);
        for (int v = 0; v < item.vectors; ++v) {
            const int lanes = item.lanes(v);
            const int64_t channel = item.channel(v);
            const vf bias = channel_vector(item, a.bias, v), D = channel_vector(item, a.D, v);
            vf* s = state + v * padded;
            if (a.saved)
                for (int64_t n = 0; n < a.states; ++n) store(item.saved(chunk, n, v), s[n], lanes);
            for (int i = 0; i < length; ++i) {
                const int64_t t = item.token(start + i);
                const vf raw = load(a.delta + item.sample * a.delta_batch + t * a.delta_token + channel, lanes) + bias;
                const vf u = load(a.u + item.sample * a.u_batch + t * a.u_token + channel, lanes);
                dt[i] = a.softplus ? softplus(raw).value : raw;
                dt_u[i] = dt[i] * u;
                y[i] = D * u;
            }
            for (int64_t n = 0; n < padded; n += Q)
                forward_states(length, padded, A + v * padded + n, B + n, C + n, dt, dt_u, s + n, y);
            for (int i = 0; i < length; ++i) {
                const int64_t t = item.token(start + i);
                if (a.z) {
                    const vf z = load(a.z + item.sample * a.z_batch + t * a.z_token + channel, lanes);
                    y[i] *= z * sigmoid(z);
                }
                store(a.out + item.row(t) + channel, y[i], lanes);
            }
        }
    }
}

// ---------------------------------------------------------------- backward

// What one chunk of one vector of channels needs, position by position. `slope` is d dt / d delta,
// `z_factor` is d out / d z without the factor y; `to_*` collect gradients.
struct Lines {
    vf dt[CHUNK], dt_u[CHUNK], u[CHUNK], slope[CHUNK], grad_y[CHUNK], z_factor[CHUNK];
    vf y[CHUNK], to_dt_u[CHUNK], to_dt[CHUNK];
};

struct BackwardWork {
    float *B, *C;             // (CHUNK, padded)
    vf *A, *adjoint, *to_A;   // (VECTORS, padded); adjoint: what later positions send back
    vf *to_bias, *to_D;       // (VECTORS,)
    Lines* lines;             // (VECTORS,)
    vf *states, *decays;      // (CHUNK + 1, Q), (CHUNK, Q) of the vector and states at hand
    vf *to_B, *to_C;          // (CHUNK, Q), sums over the vectors of the block
    size_t size;

    BackwardWork(float* memory, int64_t padded) {
        Scratch scratch{memory};
        B = scratch.take<float>(CHUNK * padded);
        C = scratch.take<float>(CHUNK * padded);
        A = scratch.take<vf>(VECTORS * padded);
        adjoint = scratch.take<vf>(VECTORS * padded);
        to_A = scratch.take<vf>(VECTORS * padded);
        to_bias = scratch.take<vf>(VECTORS);
        to_D = scratch.take<vf>(VECTORS);
        lines = scratch.take<Lines>(VECTORS);
        states = scratch.take<vf>((CHUNK + 1) * Q);
        decays = scratch.take<vf>(CHUNK * Q);
        to_B = scratch.take<vf>(CHUNK * Q);
        to_C = scratch.take<vf>(CHUNK * Q);
        size = scratch.used;
    }
};

// Partial sums of the whole call, added up at the end.
struct Partials {
    Buffer B, C;        // (blocks, batch, tokens, padded)
    Buffer A, D, bias;  // (batch, states, inner), (batch, inner), (batch, inner)
};

// The recomputation: states and decays of one chunk; on the way y (for dz) and the sum for dC.
template <bool FIRST>
void backward_recompute(int length, int64_t padded, bool want_y, bool want_C, const vf* A, const float* B,
                        const float* C, Lines& lines, const BackwardWork& w) {
    vf s[Q], a[Q];
    for (int j = 0; j < Q; ++j) s[j] = w.states[j], a[j] = A[j];
    for (int i = 0; i < length; ++i) {
        const vf dt = lines.dt[i], dt_u = lines.dt_u[i];
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            const vf decay = exp2_fast(dt * a[j]);
            s[j] = decay * s[j] + dt_u * B[i * padded + j];
            w.decays[i * Q + j] = decay;
            w.states[(i + 1) * Q + j] = s[j];
        }
        if (want_y) {
            vf y = lines.y[i];
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) y += s[j] * C[i * padded + j];
            lines.y[i] = y;
        }
        if (want_C) {
            const vf grad_y = lines.grad_y[i];
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) {
                vf& sum = w.to_C[i * Q + j];
                sum = FIRST ? grad_y * s[j] : sum + grad_y * s[j];
            }
        }
    }
}

// The walk back: adjoints of the states, and from them everything else.
template <bool FIRST, bool WANT_A>
void backward_walk(int length, int64_t padded, const vf* A, const float* B, const float* C, Lines& lines, vf* adjoint,
                   vf* to_A, const BackwardWork& w) {
    vf carry[Q], a[Q], sum_A[Q];
    for (int j = 0; j < Q; ++j) carry[j] = adjoint[j], a[j] = A[j], sum_A[j] = to_A[j];
    for (int i = length - 1; i >= 0; --i) {
        const vf grad_y = lines.grad_y[i], dt_u = lines.dt_u[i], dt = lines.dt[i];
        vf to_dt_u = lines.to_dt_u[i], to_dt = lines.to_dt[i];
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            const vf here = grad_y * C[i * padded + j] + carry[j];
            vf& sum = w.to_B[i * Q + j];
            sum = FIRST ? dt_u * here : sum + dt_u * here;
            to_dt_u += here * B[i * padded + j];
            carry[j] = w.decays[i * Q + j] * here;
            const vf to_exponent = carry[j] * w.states[i * Q + j];
            to_dt += to_exponent * a[j];
            if (WANT_A) sum_A[j] += to_exponent * dt;
        }
        lines.to_dt_u[i] = to_dt_u;
        lines.to_dt[i] = to_dt;
    }
    for (int j = 0; j < Q; ++j) adjoint[j] = carry[j];
    if (WANT_A)
        for (int j = 0; j < Q; ++j) to_A[j] = sum_A[j];
}

void fill_lines(const Item& item, int64_t start, int length, int v, Lines& lines) {
    const ScanArguments& a = item.a;
    const int lanes = item.lanes(v);
    const int64_t channel = item.channel(v);
    const vf bias = channel_vector(item, a.bias, v);
    for (int i = 0; i < length; ++i) {
        const int64_t t = item.token(start + i);
        const vf raw = load(a.delta + item.sample * a.delta_batch + t * a.delta_token + channel, lanes) + bias;
        const vf u = load(a.u + item.sample * a.u_batch + t * a.u_token + channel, lanes);
        vf grad = load(a.grad + item.sample * a.grad_batch + t * a.grad_token + channel, lanes);
        const Softplus step = a.softplus ? softplus(raw) : Softplus{raw, splat(1.0f)};
        if (a.z) {
            const vf z = load(a.z + item.sample * a.z_batch + t * a.z_token + channel, lanes);
            const vf gate = sigmoid(z);
            lines.z_factor[i] = grad * gate * (1.0f + z * (1.0f - gate));
            grad *= z * gate;
        }
        lines.dt[i] = step.value;
        lines.slope[i] = step.slope;
        lines.u[i] = u;
        lines.dt_u[i] = step.value * u;
        lines.grad_y[i] = grad;
        lines.y[i] = lines.to_dt_u[i] = lines.to_dt[i] = vf{};
    }
}

void finish_lines(const Item& item, int64_t start, int length, int v, const Lines& lines, const BackwardWork& w) {
    const ScanArguments& a = item.a;
    const int lanes = item.lanes(v);
    const vf D = channel_vector(item, a.D, v);
    for (int i = length - 1; i >= 0; --i) {
        const int64_t at = item.row(item.token(start + i)) + item.channel(v);
        if (a.grad_u) store(a.grad_u + at, lines.to_dt_u[i] * lines.dt[i] + lines.grad_y[i] * D, lanes);
        const vf to_delta = (lines.to_dt[i] * LN2 + lines.to_dt_u[i] * lines.u[i]) * lines.slope[i];
        if (a.grad_delta) store(a.grad_delta + at, to_delta, lanes);
        if (a.grad_z) store(a.grad_z + at, lines.z_factor[i] * (lines.y[i] + D * lines.u[i]), lanes);
        w.to_bias[v] += to_delta;
        w.to_D[v] += lines.grad_y[i] * lines.u[i];
    }
}

void backward_item(const ScanArguments& a, int64_t index, float* memory, const Partials& partials) {
    const Item item(a, index);
    const int64_t padded = padded_states(a);
    const BackwardWork w(memory, padded);
    const bool want_y = a.grad_z, want_C = a.grad_C;
    const bool want_walk = a.grad_u || a.grad_delta || a.grad_bias || a.grad_A || a.grad_B;
    const bool want_states = want_y || want_C || want_walk;
    for (int v = 0; v < item.vectors; ++v) pack_A(item, v, padded, w.A + v * padded);
    std::fill(w.adjoint, w.adjoint + VECTORS * padded, vf{});
    std::fill(w.to_A, w.to_A + VECTORS * padded, vf{});
    std::fill(w.to_bias, w.to_bias + VECTORS, vf{});
    std::fill(w.to_D, w.to_D + VECTORS, vf{});

    for (int64_t chunk = ceil_div(a.tokens, CHUNK) - 1; chunk >= 0; --chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, a.tokens - start));
        pack_rows(item, a.B, a.B_batch, a.B_token, start, length, padded, w.B);
        pack_rows(item, a.C, a.C_batch, a.C_token, start, length, padded, w.C);
        for (int v = 0; v < item.vectors; ++v) fill_lines(item, start, length, v, w.lines[v]);
        for (int64_t n = 0; want_states && n < padded; n += Q) {
            for (int v = 0; v < item.vectors; ++v) {
                const vf* A = w.A + v * padded + n;
                Lines& lines = w.lines[v];
                for (int j = 0; j < Q; ++j)
                    w.states[j] = n + j < a.states ? load(item.saved(chunk, n + j, v), item.lanes(v)) : vf{};
                (v == 0 ? backward_recompute<true> : backward_recompute<false>)(length, padded, want_y, want_C, A,
                                                                                w.B + n, w.C + n, lines, w);
                if (!want_walk) continue;
                vf *adjoint = w.adjoint + v * padded + n, *to_A = w.to_A + v * padded + n;
                auto walk = a.grad_A ? (v == 0 ? backward_walk<true, true> : backward_walk<false, true>)
                                     : (v == 0 ? backward_walk<true, false> : backward_walk<false, false>);
                walk(length, padded, A, w.B + n, w.C + n, lines, adjoint, to_A, w);
            }
            for (int i = 0; i < length; ++i) {
                const int64_t t = item.token(start + i);
                const int64_t at = ((item.block * a.batch + item.sample) * a.tokens + t) * padded + n;
                if (a.grad_B) {
                    const vf4 sums = lane_sums(w.to_B + i * Q);
                    std::memcpy(partials.B.get() + at, &sums, sizeof sums);
                }
                if (a.grad_C) {
                    const vf4 sums = lane_sums(w.to_C + i * Q);
                    std::memcpy(partials.C.get() + at, &sums, sizeof sums);
                }
            }
        }
        for (int v = 0; v < item.vectors; ++v) finish_lines(item, start, length, v, w.lines[v], w);
    }
    for (int v = 0; v < item.vectors; ++v) {
        const int lanes = item.lanes(v);
        const int64_t at = item.sample * a.inner + item.channel(v);
        if (a.grad_D) store(partials.D.get() + at, w.to_D[v], lanes);
        if (a.grad_bias) store(partials.bias.get() + at, w.to_bias[v], lanes);
        for (int64_t n = 0; a.grad_A && n < a.states; ++n)
            store(partials.A.get() + (item.sample * a.states + n) * a.inner + item.channel(v), w.to_A[v * padded + n],
                  lanes);
    }
}

// target (rows, states) = sum over blocks of partial (blocks, rows, padded)
void add_blocks(const float* partial, int64_t blocks, int64_t rows, int64_t states, int64_t padded, float* target) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < states; ++n) {
            float sum = 0.0f;
            for (int64_t block = 0; block < blocks; ++block) sum += partial[(block * rows + row) * padded + n];
            target[row * states + n] = sum;
        }
}

void add_samples(const float* partial, int64_t batch, int64_t size, float* target) {
    std::fill(target, target + size, 0.0f);
    for (int64_t sample = 0; sample < batch; ++sample)
        for (int64_t i = 0; i < size; ++i) target[i] += partial[sample * size + i];
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int64_t vimtune_scan_chunk() { return CHUNK; }

// Both return 0, or 1 when memory ran out.
__attribute__((visibility("default"))) int vimtune_scan_forward(const ScanArguments* a) {
    const int64_t items = a->batch * ceil_div(a->inner, BLOCK);
    return !parallel_for(items, static_cast<int>(a->num_threads), a->launch, ForwardWork(nullptr, padded_states(*a)).size,
                         [a](int64_t item, float* memory) { forward_item(*a, item, memory); });
}

__attribute__((visibility("default"))) int vimtune_scan_backward(const ScanArguments* a) {
    const int64_t blocks = ceil_div(a->inner, BLOCK), padded = padded_states(*a), rows = a->batch * a->tokens;
    const int64_t channels = a->batch * a->inner;
    Partials partials;
    auto want = [](const float* gradient, Buffer& buffer, int64_t floats) {
        if (gradient) buffer = allocate(floats);
        return !gradient || buffer;
    };
    if (!want(a->grad_B, partials.B, blocks * rows * padded) || !want(a->grad_C, partials.C, blocks * rows * padded) ||
        !want(a->grad_A, partials.A, channels * a->states) || !want(a->grad_D, partials.D, channels) ||
        !want(a->grad_bias, partials.bias, channels))
        return 1;
    const size_t scratch = BackwardWork(nullptr, padded).size;
    if (!parallel_for(blocks * a->batch, static_cast<int>(a->num_threads), a->launch, scratch,
                      [&](int64_t item, float* memory) { backward_item(*a, item, memory, partials); }))
        return 1;
    if (a->grad_B) add_blocks(partials.B.get(), blocks, rows, a->states, padded, a->grad_B);
    if (a->grad_C) add_blocks(partials.C.get(), blocks, rows, a->states, padded, a->grad_C);
    // grad_A arrives as (states, inner); the caller transposes it.
    if (a->grad_A) add_samples(partials.A.get(), a->batch, a->inner * a->states, a->grad_A);
    if (a->grad_D) add_samples(partials.D.get(), a->batch, a->inner, a->grad_D);
    if (a->grad_bias) add_samples(partials.bias.get(), a->batch, a->inner, a->grad_bias);
    return 0;
}

}  // extern "C"
