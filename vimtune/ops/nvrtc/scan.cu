// Selective scan in both directions, forward and backward, N = 16 states.
//
// A block owns one image and 64 channels: its first warp scans from the first token to the last, its second
// warp the other way. A thread owns two neighbouring channels with all their states in registers, so sums over
// states need no communication. Rows of activations are loaded AHEAD steps before use; B_t and C_t of STAGE steps
// go through shared memory.
//
// The two warps meet in the middle of the sequence: until then each leaves its y_t for the other, from then on
// it adds what the other left, so that the sum of the directions needs neither a second pass nor atomics.
//
// With s_t = a_t s_{t-1} + dt_t u_t B_t, a_t = exp(dt_t A) and y_t = <C_t, s_t> + D u_t, and h_t the gradient of s_t,
//
//     h_t = dy_t C_t + a_{t+1} h_{t+1}        dB_t = sum_e dt_t u_t h_t       dC_t = sum_e dy_t s_t
//     q_t = <h_t, B_t>                        du_t = dt_t q_t + D dy_t
//     ddt_t = u_t q_t + <A, w_t>              w_t = a_t h_t s_{t-1}           dA = sum_t dt_t w_t
//
// Only w_t mixes states with their gradients, which would make the backward store or recompute every state next to
// h_t. But a_t s_{t-1} = s_t - dt_t u_t B_t, hence
//
//     w_t = h_t s_t - dt_t u_t B_t h_t = w_{t+1} + dy_t C_t s_t - dt_t u_t B_t h_t
//
// is a running sum of one term that a sweep over the states knows and one that a sweep over their gradients knows.
// So the backward is one sweep each way that keeps a scalar <A, dy_t C_t s_t> per token and channel: two exponentials a
// state and step, no saved states. Likewise dA = sum_t T_t (dy_t C_t s_t - dt_t u_t B_t h_t), T_t = dt_1 + .. + dt_t.
//
// Compile-time constants: WIDTH (E), COLUMNS (of a row of `vectors`: B_t, C_t, then anything), FP16 (activations
// are fp16, otherwise bf16), TRAINED (gradients of A_log, D and the time step's bias are wanted).
// Shapes, all contiguous unless said otherwise: u, delta (2, B, L, E), vectors (2, B, L, COLUMNS), A_log (E, N), D (E),
// gate and its gradient (B, L, E) with rows 2 E apart, out and its gradient (B, L, E). First index: direction.

constexpr int N = 16;
constexpr int CHANNELS = 64;
constexpr int STAGE = 8;
constexpr int AHEAD = 2;
constexpr int MAX_BLOCKS = TRAINED ? 4 : 6;   // on a multiprocessor: 255 or 168 registers for a thread
constexpr bool RAGGED = WIDTH % CHANNELS != 0;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
__device__ inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
__device__ inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
__device__ inline Pair operator*(float x, Pair y) { return {x * y.a, x * y.b}; }
__device__ inline Pair exp2_fast(Pair x) { return {exp2_fast(x.a), exp2_fast(x.b)}; }
__device__ inline Pair sigmoid(Pair x) {
    const Pair power = exp2_fast(-LOG2E * x);
    return {reciprocal(1.0f + power.a), reciprocal(1.0f + power.b)};
}

#if FP16
__device__ inline Pair activation(word pair) { return from_fp16(pair); }
__device__ inline word rounded(Pair value) { return to_fp16(value); }
#else
__device__ inline Pair activation(word pair) { return from_bf16(pair); }
__device__ inline word rounded(Pair value) { return to_bf16(value); }
#endif

// Where a thread works. Lanes past the last channel compute the first one again, and do not count.
struct Place {
    int image, direction, channel, tokens;
    bool live;

    __device__ Place(int tokens) : image(blockIdx.y), direction(warp()), tokens(tokens) {
        channel = blockIdx.x * CHANNELS + 2 * lane();
        live = !RAGGED || channel < WIDTH;
        channel = live ? channel : 0;
    }
    // The number of steps after which the other direction has left y for all tokens to come.
    __device__ int middle() const { return direction ? tokens / 2 : (tokens + 1) / 2; }
    __device__ long row(int batch) const { return ((long)direction * batch + image) * tokens; }
};

// This thread's words of the rows of a sequence, visited one a step.
template <typename Word>
struct Rows {
    Word* next;
    long stride;

    // `first`: the word in the row of token 0. Rows are `width` activations apart.
    __device__ void start(const void* first, int width, int tokens, bool reverse, int step) {
        stride = reverse ? -width : width;
        const int token = reverse ? tokens - 1 - step : step;
        next = (Word*)((half_word*)first + (long)token * width);
    }
    __device__ Word* advance() {
        Word* now = next;
        next = (Word*)((half_word*)next + stride);
        return now;
    }
};

// Such rows loaded AHEAD steps before `take`.
template <typename Word>
struct Stream {
    Rows<Word> rows;
    Word ahead[AHEAD];

    __device__ void start(const void* first, int width, int tokens, bool reverse, int step = 0) {
        rows.start(first, width, tokens, reverse, step);
        for (int k = 0; k < AHEAD; k++) {
            const Word* place = rows.advance();
            if (step + k < tokens) ahead[k] = *place;
        }
    }
    __device__ Word take(int slot, bool more) {
        const Word now = ahead[slot];
        const Word* place = rows.advance();
        if (more) ahead[slot] = *place;
        return now;
    }
};

// B_t and C_t as fp32 in shared memory, STAGE steps at a time. A lane brings eight values of one step.
struct Vectors {
    const half_word* source;
    int tokens;
    bool reverse;
    Words ahead;

    __device__ void load(int step) {
        step += lane() / 4;
        if (step < tokens) ahead = *(const Words*)(source + (long)(reverse ? tokens - 1 - step : step) * COLUMNS);
    }
    __device__ void start(const half_word* rows, int tokens_, bool reverse_, int step = 0) {
        source = rows + lane() % 4 * 8;
        tokens = tokens_;
        reverse = reverse_;
        load(step);
    }
    // Fill `tile` with the steps from `base` on and fetch the next ones.
    __device__ void stage(float* tile, int base) {
        sync_warp();
        const Pair p = activation(ahead.x), q = activation(ahead.y), r = activation(ahead.z), s = activation(ahead.w);
        Quad* place = (Quad*)(tile + lane() * 8);
        place[0] = {p.a, p.b, q.a, q.b};
        place[1] = {r.a, r.b, s.a, s.b};
        load(base + STAGE);
        sync_warp();
    }
};

// Sums over the channels of a warp of N values a step. The matrix units add up four lanes at a time: column c of
// `picks` is 1 where the product's column c shall come from. Groups of four lanes wait in shared memory until
// the stage is over.
struct ChannelSums {
    Pair picks[N / 4];

    __device__ ChannelSums() {
        for (int k = 0; k < N / 4; k++) {
            picks[k] = {lane() / 4 == 2 * k ? 1.0f : 0.0f, lane() / 4 == 2 * k + 1 ? 1.0f : 0.0f};
        }
    }
    // Values 4 k to 4 k + 3.
    __device__ void add(Quad& sums, int k, Quad values) const { multiply_add(sums, values, picks[k]); }
    // A lane now has values (0, 2, 1, 3) + 4 (lane % 4) of its group lane / 4.
    __device__ void keep(Quad* waiting, int step, Quad sums) const { waiting[step * 32 + lane()] = sums; }
    // Add up the groups of `steps` steps; `rows`: N floats a step.
    __device__ void store(const Quad* waiting, float* row, long stride, int steps) const {
        sync_warp();
        const int step = lane() / 4;
        Quad total = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int group = 0; group < 8; group++) {
            // Not all steps begin with the same group: their words lie in the same banks.
            const Quad part = waiting[step * 32 + (group + step) % 8 * 4 + lane() % 4];
            total = {total.x + part.x, total.y + part.z, total.z + part.y, total.w + part.w};
        }
        if (step < steps) *(Quad*)(row + step * stride + lane() % 4 * 4) = total;
        sync_warp();
    }
};

// A log2(e), so that exp2(dt * decay) is the decay of a step.
__device__ inline void load_decay(Pair (&decay)[N], const float* A_log, int channel) {
    const float* row = A_log + channel * N;
    for (int n = 0; n < N; n++) {
        decay[n] = {-LOG2E * exp2_fast(LOG2E * row[n]), -LOG2E * exp2_fast(LOG2E * row[N + n])};
    }
}

extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_forward(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, int batch, int tokens
) {
    __shared__ float tiles[2][STAGE * 2 * N];
    const Place at(tokens);
    const bool reverse = at.direction;
    const int middle = at.middle();
    float* tile = tiles[at.direction];
    const long own = at.row(batch), image = (long)at.image * tokens;

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at.channel);
    for (int n = 0; n < N; n++) state[n] = {0.0f, 0.0f};
    const float* D = (reverse ? D1 : D0) + at.channel;
    const Pair skip = {D[0], D[1]};

    Vectors staged;
    Stream<word> us, dts, gates, others;
    Rows<word> results;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = half ? middle : 0, end = half ? tokens : middle;
        if (half) sync_block();
        staged.start(vectors + own * COLUMNS, tokens, reverse, begin);
        us.start(u + own * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        dts.start(delta + own * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        gates.start(gate + image * 2 * WIDTH + at.channel, 2 * WIDTH, tokens, reverse, begin);
        others.start(out + image * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        results.start(out + image * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
#pragma unroll 1
        for (int base = begin; base < end; base += STAGE) {
            staged.stage(tile, base);
#pragma unroll 1
            for (int start = 0; start < STAGE; start += AHEAD) {
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    const int step = base + start + k;
                    if (step >= end) break;
                    const bool more = step + AHEAD < end;
                    const Pair ut = activation(us.take(k, more)), dt = from_fp16(dts.take(k, more));
                    const Pair input = dt * ut;
                    Pair y = skip * ut;
                    const Quad* B = (const Quad*)(tile + (start + k) * 2 * N);
                    const Quad* C = B + N / 4;
#pragma unroll
                    for (int n = 0; n < N; n += 4) {
                        const Quad b4 = B[n / 4], c4 = C[n / 4];
                        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
                            y = y + c[j] * state[n + j];
                        }
                    }
                    if (half) {
                        const Pair other = activation(others.take(k, more)), z = activation(gates.take(k, more));
                        y = 0.5f * (y + other) * (z * sigmoid(z));
                    }
                    word* target = results.advance();
                    if (at.live) *target = rounded(y);
                }
            }
        }
    }
}

// `scalars` (2, B, L, E) fp32 is scratch. `partial_BC` (2, blocks, B, L, 2 N) and, if TRAINED, `partial_A` (2, B, E, N),
// `partial_D` and `partial_bias` (2, B, E) are to be added up over blocks or batch.
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_backward(
    const half_word* grad, const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0,
    const float* A_log1, const float* D0, const float* D1, const half_word* gate, half_word* grad_u,
    half_word* grad_delta, half_word* grad_gate, float* scalars, float* partial_BC, float* partial_A,
    float* partial_D, float* partial_bias, int batch, int tokens
) {
    __shared__ float tiles[2][STAGE * 2 * N];
    const Place at(tokens);
    const bool reverse = at.direction;
    const int middle = at.middle();
    float* tile = tiles[at.direction];
    __shared__ Quad waiting_tiles[2][STAGE * 32];
    Quad* waiting = waiting_tiles[at.direction];
    const long own = at.row(batch), image = (long)at.image * tokens;
    const long word_of_own = own * WIDTH + at.channel, word_of_gate = image * 2 * WIDTH + at.channel;
    float* sums_row = partial_BC
        + ((long)at.direction * gridDim.x + blockIdx.x) * batch * tokens * 2 * N + image * 2 * N;

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at.channel);
    for (int n = 0; n < N; n++) state[n] = {0.0f, 0.0f};
    const float* D = (reverse ? D1 : D0) + at.channel;
    const Pair skip = {D[0], D[1]};
    ChannelSums over;
#if TRAINED
    Pair grad_A[N], grad_D = {0.0f, 0.0f}, grad_bias = {0.0f, 0.0f}, elapsed = {0.0f, 0.0f};
    for (int n = 0; n < N; n++) grad_A[n] = {0.0f, 0.0f};
#endif

    Vectors staged;
    Stream<word> us, dts, gates, grads, others;
    Stream<Pair> terms;
    Rows<word> results;
    Rows<Pair> kept_terms;

    // The states, from the first step to the last: the gradients of C and of the gate, and the scalars.
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = half ? middle : 0, end = half ? tokens : middle;
        if (half) sync_block();
        staged.start(vectors + own * COLUMNS, tokens, reverse, begin);
        us.start(u + word_of_own, WIDTH, tokens, reverse, begin);
        dts.start(delta + word_of_own, WIDTH, tokens, reverse, begin);
        grads.start(grad + image * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        gates.start(gate + word_of_gate, 2 * WIDTH, tokens, reverse, begin);
        others.start(grad_gate + word_of_gate, 2 * WIDTH, tokens, reverse, begin);
        results.start(grad_gate + word_of_gate, 2 * WIDTH, tokens, reverse, begin);
        kept_terms.start(scalars + word_of_own, 2 * WIDTH, tokens, reverse, begin);
#pragma unroll 1
        for (int base = begin; base < end; base += STAGE) {
            staged.stage(tile, base);
#pragma unroll 1
            for (int start = 0; start < STAGE; start += AHEAD) {
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    const int step = base + start + k;
                    if (step >= end) break;
                    const bool more = step + AHEAD < end;
                    const Pair ut = activation(us.take(k, more)), dt = from_fp16(dts.take(k, more));
                    const Pair z = activation(gates.take(k, more));
                    Pair g = 0.5f * activation(grads.take(k, more));
                    if (!at.live) g = {0.0f, 0.0f};
                    const Pair open = sigmoid(z), silu = z * open, dy = g * silu, input = dt * ut;
                    Pair y = skip * ut, term = {0.0f, 0.0f};
#if TRAINED
                    elapsed = elapsed + dt;
                    grad_D = grad_D + dy * ut;
                    const Pair weighted = elapsed * dy;
#endif
                    Quad sums = {0.0f, 0.0f, 0.0f, 0.0f};
                    const Quad* B = (const Quad*)(tile + (start + k) * 2 * N);
                    const Quad* C = B + N / 4;
#pragma unroll
                    for (int n = 0; n < N; n += 4) {
                        const Quad b4 = B[n / 4], c4 = C[n / 4];
                        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
                        float part[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            Pair& s = state[n + j];
                            s = exp2_fast(dt * decay[n + j]) * s + b[j] * input;
                            const Pair seen = c[j] * s;
                            y = y + seen;
                            term = term + decay[n + j] * seen;
#if TRAINED
                            grad_A[n + j] = grad_A[n + j] + weighted * seen;
#endif
                            part[j] = s.a * dy.a + s.b * dy.b;
                        }
                        over.add(sums, n / 4, {part[0], part[1], part[2], part[3]});
                    }
                    over.keep(waiting, start + k, sums);
                    Pair* kept_term = kept_terms.advance();
                    if (at.live) *kept_term = dy * term;
                    if (half) {
                        const Pair other = activation(others.take(k, more));
                        y = g * (open + silu - silu * open) * (y + other);
                    }
                    word* target = results.advance();
                    if (at.live) *target = rounded(y);
                }
            }
            const long token = reverse ? tokens - 1 - base : base;
            over.store(waiting, sums_row + token * 2 * N + N, reverse ? -2 * N : 2 * N, end - base);
        }
    }

    // Their gradients, from the last step to the first.
    staged.start(vectors + own * COLUMNS, tokens, !reverse);
    us.start(u + word_of_own, WIDTH, tokens, !reverse);
    dts.start(delta + word_of_own, WIDTH, tokens, !reverse);
    grads.start(grad + image * WIDTH + at.channel, WIDTH, tokens, !reverse);
    gates.start(gate + word_of_gate, 2 * WIDTH, tokens, !reverse);
    terms.start(scalars + word_of_own, 2 * WIDTH, tokens, !reverse);
    Rows<word> grad_us, grad_deltas;
    grad_us.start(grad_u + word_of_own, WIDTH, tokens, !reverse, 0);
    grad_deltas.start(grad_delta + word_of_own, WIDTH, tokens, !reverse, 0);
    for (int n = 0; n < N; n++) state[n] = {0.0f, 0.0f};
    Pair mixed = {0.0f, 0.0f};   // <A, w_t> log2(e)
#pragma unroll 1
    for (int base = 0; base < tokens; base += STAGE) {
        staged.stage(tile, base);
#pragma unroll 1
        for (int start = 0; start < STAGE; start += AHEAD) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int step = base + start + k;
                if (step >= tokens) break;
                const bool more = step + AHEAD < tokens;
                Pair ut = activation(us.take(k, more));
                const Pair dt = from_fp16(dts.take(k, more)), z = activation(gates.take(k, more));
                Pair g = 0.5f * activation(grads.take(k, more));
                if (!at.live) ut = g = {0.0f, 0.0f};
                const Pair dy = g * (z * sigmoid(z)), input = dt * ut;
                Pair through = {0.0f, 0.0f}, term = {0.0f, 0.0f};
#if TRAINED
                const Pair weighted = elapsed * input;
                elapsed = elapsed - dt;
#endif
                Quad sums = {0.0f, 0.0f, 0.0f, 0.0f};
                const Quad* B = (const Quad*)(tile + (start + k) * 2 * N);
                const Quad* C = B + N / 4;
#pragma unroll
                for (int n = 0; n < N; n += 4) {
                    const Quad b4 = B[n / 4], c4 = C[n / 4];
                    const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
                    float part[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const Pair h = c[j] * dy + state[n + j];
                        const Pair felt = b[j] * h;
                        through = through + felt;
                        term = term + decay[n + j] * felt;
#if TRAINED
                        grad_A[n + j] = grad_A[n + j] - weighted * felt;
#endif
                        part[j] = h.a * input.a + h.b * input.b;
                        state[n + j] = exp2_fast(dt * decay[n + j]) * h;
                    }
                    over.add(sums, n / 4, {part[0], part[1], part[2], part[3]});
                }
                over.keep(waiting, start + k, sums);
                mixed = mixed + terms.take(k, more) - input * term;
                const Pair grad_dt = ut * through + LN2 * mixed;
                const Pair power = exp2_fast(-LOG2E * dt);   // 1 - e^-dt is the slope of softplus
                const Pair grad_raw = grad_dt - power * grad_dt;
#if TRAINED
                grad_bias = grad_bias + grad_raw;
#endif
                word *place_u = grad_us.advance(), *place_delta = grad_deltas.advance();
                if (at.live) {
                    *place_u = rounded(dt * through + skip * dy);
                    *place_delta = rounded(grad_raw);
                }
            }
        }
        const long token = reverse ? base : tokens - 1 - base;
        over.store(waiting, sums_row + token * 2 * N, reverse ? 2 * N : -2 * N, tokens - base);
    }
#if TRAINED
    if (at.live) {
        const long channel = ((long)at.direction * batch + at.image) * WIDTH + at.channel;
        for (int n = 0; n < N; n++) {   // d(A_log) = A dA
            const Pair value = LN2 * decay[n] * grad_A[n];
            partial_A[channel * N + n] = value.a;
            partial_A[(channel + 1) * N + n] = value.b;
        }
        *(Pair*)(partial_D + channel) = grad_D;
        *(Pair*)(partial_bias + channel) = grad_bias;
    }
#endif
}
