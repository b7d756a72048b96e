// Selective scan, forward and backward, fp32, channel-last. The formula is in ops/reference.py.
//
// Lanes run over channels. A work item is one sample and a block of adjacent channels; it walks the tokens
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
constexpr int MAX_BLOCK = 128;
constexpr int VECTORS = MAX_BLOCK / W;
// So many states are handled together.
constexpr int Q = 4;

}  // namespace

extern "C" {

// `ScanArguments` in library.py mirrors this. Strides count floats, and channels are adjacent everywhere.
struct ScanArguments {
    // The shapes are u, delta, z, grad (batch, tokens, inner), A (inner, states), and B, C (batch, tokens, states).
    const float *u, *delta, *A, *B, *C, *D, *z, *bias, *grad;
    // The state before the first position and the gradient of that after the last one have the shape (batch, states,
    // inner), as `last` and `grad_first` do. Null stands for zeros. Samples of `first` lie `first_batch` floats apart,
    // which is 0 if they have one state.
    const float *first, *grad_last;
    // out has the shape of u, and saved states have (chunks, batch, states, inner). All results are contiguous; those
    // that nobody wants are null.
    float *out, *saved;
    float *last, *grad_first;
    float *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_bias;
    TeamLauncher launch;
    int64_t batch, tokens, inner, states;
    int64_t u_batch, u_token, delta_batch, delta_token, A_row, B_batch, B_token, C_batch, C_token;
    int64_t z_batch, z_token, grad_batch, grad_token, first_batch;
    int64_t num_threads, softplus, reverse;
};

}  // extern "C"

namespace {


// Wide blocks read memory best, but few samples need narrow ones to keep several cores busy. The width depends on
// the shapes alone, never on the number of threads, and so does the order of every sum.
int64_t block_width(const ScanArguments& a) {
    return a.batch * ceil_div(a.inner, MAX_BLOCK) >= 16 ? MAX_BLOCK : MAX_BLOCK / 2;
}
int64_t num_blocks(const ScanArguments& a) { return ceil_div(a.inner, block_width(a)); }
int64_t padded_states(const ScanArguments& a) { return ceil_div(a.states, Q) * Q; }

// An Item is one piece of work. It says which sample, which channels, and where position i of the scan lies in memory.
struct Item {
    const ScanArguments& a;
    int64_t sample, block, first_channel;
    int channels, vectors;

    Item(const ScanArguments& a, int64_t item)
        : a(a), sample(item / num_blocks(a)), block(item % num_blocks(a)), first_channel(block * block_width(a)) {
        channels = static_cast<int>(std::min(block_width(a), a.inner - first_channel));
        vectors = static_cast<int>(ceil_div(channels, W));
    }
    int64_t channel(int v) const { return first_channel + v * W; }
    int lanes(int v) const { return static_cast<int>(std::min<int64_t>(W, channels - v * W)); }
    int64_t token(int64_t position) const { return a.reverse ? a.tokens - 1 - position : position; }
    // Where the row of a token begins in contiguous tensors.
    int64_t row(int64_t token) const { return (sample * a.tokens + token) * a.inner; }
    vf input(const float* tensor, int64_t sample_stride, int64_t token_stride, int64_t t, int v) const {
        return load(tensor + sample * sample_stride + t * token_stride + channel(v), lanes(v));
    }
    vf parameter(const float* vector, int v) const { return vector ? load(vector + channel(v), lanes(v)) : vf{}; }
    float* saved(int64_t chunk, int64_t n, int v) const {
        return a.saved + ((chunk * a.batch + sample) * a.states + n) * a.inner + channel(v);
    }
    // Where this vector of channels is in the states (states, inner) of one sample.
    int64_t in_states(int64_t n, int v) const { return n * a.inner + channel(v); }
    // How far samples lie apart in contiguous states.
    int64_t states_batch() const { return a.states * a.inner; }
    // Reads states into rows of `padded` vectors, one row for each vector of channels, with zeros behind them.
    void load_states(const float* tensor, int64_t sample_stride, int64_t padded, vf* states) const {
        std::fill(states, states + VECTORS * padded, vf{});
        if (!tensor) return;
        const float* own = tensor + sample * sample_stride;
        for (int v = 0; v < vectors; ++v)
            for (int64_t n = 0; n < a.states; ++n) states[v * padded + n] = load(own + in_states(n, v), lanes(v));
    }
    void store_states(float* tensor, int64_t padded, const vf* states) const {
        if (!tensor) return;
        float* own = tensor + sample * states_batch();
        for (int v = 0; v < vectors; ++v)
            for (int64_t n = 0; n < a.states; ++n) store(own + in_states(n, v), states[v * padded + n], lanes(v));
    }
};

// Scratch hands out pieces of one thread's memory. Without memory it only counts what is needed.
struct Scratch {
    float* memory;
    // The number of floats that were handed out.
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += ceil_div(count * sizeof(T), 64) * 16;
        return piece;
    }
};

// Asks for the inputs of the next chunk while this one is worked on, because rows lie too far apart for the hardware to
// foresee. It asks for share `step` of `num_steps` equal ones, so that the requests spread over the work.
void prefetch_inputs(const Item& item, int64_t start, int step, int num_steps) {
    const ScanArguments& a = item.a;
    const int64_t first = start + CHUNK * step / num_steps;
    const int64_t last = std::min(a.tokens, start + CHUNK * (step + 1) / num_steps);
    auto ask = [&item](const float* tensor, int64_t sample_stride, int64_t token_stride, int64_t t) {
        const float* row = tensor + item.sample * sample_stride + t * token_stride + item.first_channel;
        // A cache line has 16 floats.
        for (int e = 0; e < item.channels; e += 16)
            __builtin_prefetch(row + e, 0, 2);
    };
    for (int64_t position = std::max<int64_t>(first, 0); position < last; ++position) {
        const int64_t t = item.token(position);
        ask(a.u, a.u_batch, a.u_token, t);
        ask(a.delta, a.delta_batch, a.delta_token, t);
        if (a.z) ask(a.z, a.z_batch, a.z_token, t);
        if (a.grad) ask(a.grad, a.grad_batch, a.grad_token, t);
    }
}

// Copies rows of B or C in the order of the scan, padded with zeros.
void pack_rows(const Item& item, const float* source, int64_t sample_stride, int64_t token_stride, int64_t start,
               int length, int64_t padded, float* target) {
    for (int i = 0; i < length; ++i) {
        const float* row = source + item.sample * sample_stride + item.token(start + i) * token_stride;
        float* to = target + i * padded;
        std::copy(row, row + item.a.states, to);
        std::fill(to + item.a.states, to + padded, 0.0f);
    }
}

// Copies columns of A for one vector of channels, times log2(e) as the decays are powers of two.
void pack_A(const Item& item, int v, int64_t padded, vf* target) {
    std::fill(target, target + padded, vf{});
    for (int lane = 0; lane < item.lanes(v); ++lane) {
        const float* row = item.a.A + (item.channel(v) + lane) * item.a.A_row;
        for (int64_t n = 0; n < item.a.states; ++n) target[n][lane] = row[n] * LOG2E;
    }
}

// ---------------------------------------------------------------- forward

struct ForwardPoint {
    vf dt, dt_u, y;
};

// ForwardWork is the scratch memory of one item.
struct ForwardWork {
    // Rows have shape (CHUNK, padded), columns and states (VECTORS, padded), and points (VECTORS, CHUNK).
    float *B, *C;
    vf *A, *state;
    ForwardPoint* points;
    size_t size;

    ForwardWork(float* memory, int64_t padded) {
        Scratch scratch{memory};
        B = scratch.take<float>(CHUNK * padded);
        C = scratch.take<float>(CHUNK * padded);
        A = scratch.take<vf>(VECTORS * padded);
        state = scratch.take<vf>(VECTORS * padded);
        points = scratch.take<ForwardPoint>(VECTORS * CHUNK);
        size = scratch.used;
    }
};

void forward_states(int length, int64_t padded, const vf* A, const float* B, const float* C, vf* state,
                    ForwardPoint* points) {
    vf s[Q], a[Q];
    for (int j = 0; j < Q; ++j) s[j] = state[j], a[j] = A[j];
    for (int i = 0; i < length; ++i) {
        const vf dt = points[i].dt, dt_u = points[i].dt_u;
        vf y = points[i].y;
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            s[j] = exp2_fast(dt * a[j]) * s[j] + dt_u * B[i * padded + j];
            y += s[j] * C[i * padded + j];
        }
        points[i].y = y;
    }
    for (int j = 0; j < Q; ++j) state[j] = s[j];
}

void forward_item(const ScanArguments& a, int64_t index, float* memory) {
    const Item item(a, index);
    const int64_t padded = padded_states(a);
    const ForwardWork w(memory, padded);
    const int num_steps = item.vectors * static_cast<int>(padded / Q);
    prefetch_inputs(item, 0, 0, 1);
    for (int v = 0; v < item.vectors; ++v) pack_A(item, v, padded, w.A + v * padded);
    item.load_states(a.first, a.first_batch, padded, w.state);

    for (int64_t start = 0, chunk = 0; start < a.tokens; start += CHUNK, ++chunk) {
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, a.tokens - start));
        pack_rows(item, a.B, a.B_batch, a.B_token, start, length, padded, w.B);
        pack_rows(item, a.C, a.C_batch, a.C_token, start, length, padded, w.C);
        for (int i = 0; i < length; ++i) {
            const int64_t t = item.token(start + i);
            for (int v = 0; v < item.vectors; ++v) {
                const vf raw = item.input(a.delta, a.delta_batch, a.delta_token, t, v) + item.parameter(a.bias, v);
                const vf u = item.input(a.u, a.u_batch, a.u_token, t, v);
                const vf dt = a.softplus ? softplus(raw).value : raw;
                w.points[v * CHUNK + i] = {dt, dt * u, item.parameter(a.D, v) * u};
            }
        }
        int step = 0;
        for (int v = 0; v < item.vectors; ++v) {
            vf* state = w.state + v * padded;
            for (int64_t n = 0; a.saved && n < a.states; ++n) store(item.saved(chunk, n, v), state[n], item.lanes(v));
            for (int64_t n = 0; n < padded; n += Q) {
                prefetch_inputs(item, start + CHUNK, step++, num_steps);
                forward_states(length, padded, w.A + v * padded + n, w.B + n, w.C + n, state + n, w.points + v * CHUNK);
            }
        }
        for (int i = 0; i < length; ++i) {
            const int64_t t = item.token(start + i);
            for (int v = 0; v < item.vectors; ++v) {
                vf out = w.points[v * CHUNK + i].y;
                if (a.z) {
                    const vf z = item.input(a.z, a.z_batch, a.z_token, t, v);
                    out *= z * sigmoid(z);
                }
                store(a.out + item.row(t) + item.channel(v), out, item.lanes(v));
            }
        }
    }
    item.store_states(a.last, padded, w.state);
}

// ---------------------------------------------------------------- backward

// A BackwardPoint is one position of one vector of channels. `slope` is d dt / d delta, `z_factor` is d out / d z
// without the factor y, and `to_*` collect gradients.
struct BackwardPoint {
    vf dt, dt_u, u, slope, grad_y, z_factor, y, to_dt_u, to_dt;
};

// BackwardWork is the scratch memory of one item.
struct BackwardWork {
    // These have shape (CHUNK, padded).
    float *B, *C;
    // These have shape (VECTORS, padded). `adjoint` is what later positions send back.
    vf *A, *adjoint, *to_A;
    // These have shape (VECTORS,).
    vf *to_bias, *to_D;
    // The points have shape (VECTORS, CHUNK).
    BackwardPoint* points;
    // These have shapes (CHUNK + 1, Q) and (CHUNK, Q), and belong to the vector and the states at hand.
    vf *states, *decays;
    // These have shape (CHUNK, Q), and are sums over the vectors of the block.
    vf *to_B, *to_C;
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
        points = scratch.take<BackwardPoint>(VECTORS * CHUNK);
        states = scratch.take<vf>((CHUNK + 1) * Q);
        decays = scratch.take<vf>(CHUNK * Q);
        to_B = scratch.take<vf>(CHUNK * Q);
        to_C = scratch.take<vf>(CHUNK * Q);
        size = scratch.used;
    }
};

// Partials are sums of single items for the whole call. They are added up at the end, in a fixed order.
struct Partials {
    // These have shape (blocks, batch, tokens, padded).
    Buffer B, C;
    // These have shapes (batch, states, inner), (batch, inner) and (batch, inner).
    Buffer A, D, bias;
};

// Computes states and decays of one chunk again, and on the way y, which dz needs, and the sum for dC.
template <bool FIRST>
void backward_recompute(int length, int64_t padded, bool want_y, bool want_C, const vf* A, const float* B,
                        const float* C, BackwardPoint* points, const BackwardWork& w) {
    vf *__restrict__ states = w.states, *__restrict__ decays = w.decays, *__restrict__ to_C = w.to_C;
    vf s[Q], a[Q];
    for (int j = 0; j < Q; ++j) s[j] = states[j], a[j] = A[j];
    for (int i = 0; i < length; ++i) {
        const vf dt = points[i].dt, dt_u = points[i].dt_u;
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            const vf decay = exp2_fast(dt * a[j]);
            s[j] = decay * s[j] + dt_u * B[i * padded + j];
            decays[i * Q + j] = decay;
            states[(i + 1) * Q + j] = s[j];
        }
        if (want_y) {
            vf y = points[i].y;
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) y += s[j] * C[i * padded + j];
            points[i].y = y;
        }
        if (want_C) {
            const vf grad_y = points[i].grad_y;
#pragma GCC unroll 4
            for (int j = 0; j < Q; ++j) {
                vf& sum = to_C[i * Q + j];
                sum = FIRST ? grad_y * s[j] : sum + grad_y * s[j];
            }
        }
    }
}

// Walks back through a chunk and finds the adjoints of the states, and from them everything else.
template <bool FIRST, bool WANT_A>
void backward_walk(int length, int64_t padded, const vf* A, const float* B, const float* C, BackwardPoint* points, vf* adjoint,
                   vf* to_A, const BackwardWork& w) {
    const vf *__restrict__ states = w.states, *__restrict__ decays = w.decays;
    vf* __restrict__ to_B = w.to_B;
    vf carry[Q], a[Q], sum_A[Q];
    for (int j = 0; j < Q; ++j) carry[j] = adjoint[j], a[j] = A[j], sum_A[j] = to_A[j];
    for (int i = length - 1; i >= 0; --i) {
        const vf grad_y = points[i].grad_y, dt_u = points[i].dt_u, dt = points[i].dt;
        vf to_dt_u = points[i].to_dt_u, to_dt = points[i].to_dt;
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) {
            const vf here = grad_y * C[i * padded + j] + carry[j];
            vf& sum = to_B[i * Q + j];
            sum = FIRST ? dt_u * here : sum + dt_u * here;
            to_dt_u += here * B[i * padded + j];
            carry[j] = decays[i * Q + j] * here;
            const vf to_exponent = carry[j] * states[i * Q + j];
            to_dt += to_exponent * a[j];
            if (WANT_A) sum_A[j] += to_exponent * dt;
        }
        points[i].to_dt_u = to_dt_u;
        points[i].to_dt = to_dt;
    }
    for (int j = 0; j < Q; ++j) adjoint[j] = carry[j];
    if (WANT_A)
        for (int j = 0; j < Q; ++j) to_A[j] = sum_A[j];
}

void fill_point(const Item& item, int64_t t, int v, BackwardPoint& point) {
    const ScanArguments& a = item.a;
    const vf raw = item.input(a.delta, a.delta_batch, a.delta_token, t, v) + item.parameter(a.bias, v);
    const vf grad = item.input(a.grad, a.grad_batch, a.grad_token, t, v);
    const Softplus step = a.softplus ? softplus(raw) : Softplus{raw, splat(1.0f)};
    point.dt = step.value;
    point.slope = step.slope;
    point.u = item.input(a.u, a.u_batch, a.u_token, t, v);
    point.dt_u = point.dt * point.u;
    point.grad_y = grad;
    if (a.z) {
        const vf z = item.input(a.z, a.z_batch, a.z_token, t, v), gate = sigmoid(z);
        point.z_factor = grad * gate * (1.0f + z * (1.0f - gate));
        point.grad_y = grad * z * gate;
    }
    point.y = point.to_dt_u = point.to_dt = vf{};
}

void finish_point(const Item& item, int64_t t, int v, const BackwardPoint& point, const BackwardWork& w) {
    const ScanArguments& a = item.a;
    const int lanes = item.lanes(v);
    const vf D = item.parameter(a.D, v);
    const int64_t at = item.row(t) + item.channel(v);
    if (a.grad_u) store(a.grad_u + at, point.to_dt_u * point.dt + point.grad_y * D, lanes);
    const vf to_delta = (point.to_dt * LN2 + point.to_dt_u * point.u) * point.slope;
    if (a.grad_delta) store(a.grad_delta + at, to_delta, lanes);
    if (a.grad_z) store(a.grad_z + at, point.z_factor * (point.y + D * point.u), lanes);
    w.to_bias[v] += to_delta;
    w.to_D[v] += point.grad_y * point.u;
}

void backward_item(const ScanArguments& a, int64_t index, float* memory, const Partials& partials) {
    const Item item(a, index);
    const int64_t padded = padded_states(a);
    const BackwardWork w(memory, padded);
    const bool want_y = a.grad_z, want_C = a.grad_C;
    const bool want_walk = a.grad_u || a.grad_delta || a.grad_bias || a.grad_A || a.grad_B || a.grad_first;
    const bool want_states = want_y || want_C || want_walk;
    const int num_steps = item.vectors * static_cast<int>(padded / Q);
    prefetch_inputs(item, (ceil_div(a.tokens, CHUNK) - 1) * CHUNK, 0, 1);
    for (int v = 0; v < item.vectors; ++v) pack_A(item, v, padded, w.A + v * padded);
    item.load_states(a.grad_last, item.states_batch(), padded, w.adjoint);
    std::fill(w.to_A, w.to_A + VECTORS * padded, vf{});
    std::fill(w.to_bias, w.to_bias + VECTORS, vf{});
    std::fill(w.to_D, w.to_D + VECTORS, vf{});

    for (int64_t chunk = ceil_div(a.tokens, CHUNK) - 1; chunk >= 0; --chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = static_cast<int>(std::min<int64_t>(CHUNK, a.tokens - start));
        pack_rows(item, a.B, a.B_batch, a.B_token, start, length, padded, w.B);
        pack_rows(item, a.C, a.C_batch, a.C_token, start, length, padded, w.C);
        for (int i = 0; i < length; ++i)
            for (int v = 0; v < item.vectors; ++v) fill_point(item, item.token(start + i), v, w.points[v * CHUNK + i]);
        int step = 0;
        for (int64_t n = 0; want_states && n < padded; n += Q) {
            for (int v = 0; v < item.vectors; ++v) {
                prefetch_inputs(item, start - CHUNK, step++, num_steps);
                const vf* A = w.A + v * padded + n;
                BackwardPoint* points = w.points + v * CHUNK;
                for (int j = 0; j < Q; ++j)
                    w.states[j] = n + j < a.states ? load(item.saved(chunk, n + j, v), item.lanes(v)) : vf{};
                (v == 0 ? backward_recompute<true> : backward_recompute<false>)(length, padded, want_y, want_C, A,
                                                                                w.B + n, w.C + n, points, w);
                if (!want_walk) continue;
                vf *adjoint = w.adjoint + v * padded + n, *to_A = w.to_A + v * padded + n;
                auto walk = a.grad_A ? (v == 0 ? backward_walk<true, true> : backward_walk<false, true>)
                                     : (v == 0 ? backward_walk<true, false> : backward_walk<false, false>);
                walk(length, padded, A, w.B + n, w.C + n, points, adjoint, to_A, w);
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
        for (int i = length - 1; i >= 0; --i)
            for (int v = 0; v < item.vectors; ++v) finish_point(item, item.token(start + i), v, w.points[v * CHUNK + i], w);
    }
    item.store_states(a.grad_first, padded, w.adjoint);
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

// Adds up partial (blocks, rows, padded) over blocks into target (rows, states).
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

// These two return 0, or 1 when memory ran out.
__attribute__((visibility("default"))) int vimtune_scan_forward(const ScanArguments* a) {
    const int64_t items = a->batch * num_blocks(*a);
    return !parallel_for(items, static_cast<int>(a->num_threads), a->launch, ForwardWork(nullptr, padded_states(*a)).size,
                         [a](int64_t item, float* memory) { forward_item(*a, item, memory); });
}

__attribute__((visibility("default"))) int vimtune_scan_backward(const ScanArguments* a) {
    const int64_t blocks = num_blocks(*a), padded = padded_states(*a), rows = a->batch * a->tokens;
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
    // The caller gets grad_A as (states, inner) and transposes it.
    if (a->grad_A) add_samples(partials.A.get(), a->batch, a->inner * a->states, a->grad_A);
    if (a->grad_D) add_samples(partials.D.get(), a->batch, a->inner, a->grad_D);
    if (a->grad_bias) add_samples(partials.bias.get(), a->batch, a->inner, a->grad_bias);
    return 0;
}

}  // extern "C"
