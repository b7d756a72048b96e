// Selective scan in both directions, forward and backward, N = 16 states.
//
// A block owns one image and 64 channels: its first warp scans from the first token to the last, its second
// warp the other way. A thread owns two neighbouring channels with all their states in registers, so sums over
// states need no communication. Everything a step reads comes through shared memory, STAGE steps at a time, and is
// copied there while the STAGE steps before are computed.
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
// Where images times channels are too few to fill the card, sequences are cut into segments, one a block (SEGMENTED).
// Since the recurrence is linear, scan_ends first finds the state behind each segment for a zero state before it, and
// the segment's sum of dt: a block then gets the state before its segment from those of the segments before, the
// decay over a segment being exp(A sum dt). scan_ends_backward does the same for the gradients of the states.
//
// Compile-time constants: WIDTH (E), COLUMNS (of a row of `vectors`: B_t, C_t, then anything), FP16 (activations
// are fp16, otherwise bf16), TRAINED (gradients of A_log, D and the time step's bias are wanted), SEGMENTED.
// Shapes, all contiguous unless said otherwise: u, delta (2, B, L, E), vectors (2, B, L, COLUMNS), A_log (E, N), D (E),
// gate and its gradient (B, L, E) with rows 2 E apart, out and its gradient (B, L, E), ends (2, B, S, E, ENTRY) fp32
// for S segments of `span` tokens. First index: direction.

constexpr int CHANNELS = 64;
constexpr int STAGE = 8;
constexpr int MAX_BLOCKS = TRAINED ? 4 : 6;   // on a multiprocessor: 255 or 168 registers for a thread
constexpr int ENTRY = N + 4;     // of `ends`: a state, the sum of dt, padding
constexpr bool RAGGED = WIDTH % CHANNELS != 0;

// Where a thread works: which tokens of an image are its block's. Lanes past the last channel read zeros and write
// nothing.
struct Place {
    int image, direction, total, begin, tokens, first, channel;   // first channel of the block, and of the thread
    bool live;

    __device__ Place(int total, int span)
        : image(blockIdx.y), direction(warp()), total(total), begin(SEGMENTED ? blockIdx.z * span : 0),
          tokens(SEGMENTED ? min(span, total - begin) : total), first(blockIdx.x * CHANNELS) {
        channel = first + 2 * lane();
        live = !RAGGED || channel < WIDTH;
    }
    // The number of steps after which the other direction has left y for all tokens to come.
    __device__ int middle() const { return direction ? tokens / 2 : (tokens + 1) / 2; }
    // Of the block's first token, among the rows of an image or of both directions.
    __device__ long image_row() const { return (long)image * total + begin; }
    __device__ long row(int batch) const { return ((long)direction * batch + image) * total + begin; }
    // Where this thread's channels are in `ends`, in the first segment or in its own.
    __device__ long entry(int batch, int segment) const {
        return ((((long)direction * batch + image) * gridDim.z + segment) * WIDTH + channel) * ENTRY;
    }
};

// Rows of one tensor on their way through shared memory, in the order in which they are visited. A row holds a Word
// for each lane; lanes bring it in pieces of 16 bytes.
template <typename Word>
struct Stream {
    static constexpr int SIZE = 2 * STAGE * 32;   // Words of shared memory: the stage in use and the next one
    static constexpr int LANES = 32 * sizeof(Word) / 16;
    static constexpr int ROWS = 32 / LANES;
    Word* buffer;
    const char* next;
    int stride, left;
    bool live;

    // Steps `begin` to `end`. `first`: the block's first channel in the row of token 0; rows are `width` Words / 2
    // apart.
    __device__ void start(Word* shared, const void* first, int width, int tokens, bool reverse, int begin, int end) {
        const int piece = lane() % LANES, step = begin + lane() / LANES;
        const int bytes = width * (int)sizeof(Word) / 2;
        buffer = shared;
        stride = reverse ? -bytes : bytes;
        next = (const char*)first + (long)(reverse ? tokens - 1 - step : step) * bytes + piece * 16;
        left = end - step;
        live = !RAGGED || blockIdx.x * CHANNELS + piece * (CHANNELS / LANES) < WIDTH;
        fetch(0);
    }
    // Start to copy the next stage into half `slot` of the buffer.
    __device__ void fetch(int slot) {
        char* place = (char*)(buffer + slot * STAGE * 32) + lane() * 16;
        for (int k = 0; k < STAGE; k += ROWS) {
            copy_async(place + k * 32 * sizeof(Word), next + (long)k * stride, live && k < left);
        }
        next += (long)STAGE * stride;
        left -= STAGE;
    }
    __device__ Word at(int slot, int step) const { return buffer[(slot * STAGE + step) * 32 + lane()]; }
};

// This thread's words of the rows that it writes, one a step.
template <typename Word>
struct Results {
    Word* next;
    int stride;

    // `first`: the word in the row of token 0; rows lie `width` Words / 2 apart.
    __device__ void start(void* first, int width, int tokens, bool reverse, int begin = 0) {
        const int bytes = width * (int)sizeof(Word) / 2;
        next = (Word*)((char*)first + (long)(reverse ? tokens - 1 - begin : begin) * bytes);
        stride = reverse ? -bytes : bytes;
    }
    __device__ void put(Word value, bool live) {
        if (live) *next = value;
        next = (Word*)((char*)next + stride);
    }
};

// B_t and C_t as fp32 in shared memory. A lane brings eight values of one step.
struct Vectors {
    static constexpr int SIZE = STAGE * 2 * N;
    float* tile;
    const half_word* source;
    int tokens;
    bool reverse;
    Words ahead;

    __device__ void load(int step) {
        step = min(step + lane() / 4, tokens - 1);   // past the end the last step again: nobody looks
        ahead = *(const Words*)(source + (long)(reverse ? tokens - 1 - step : step) * COLUMNS);
    }
    __device__ void start(float* shared, const half_word* rows, int tokens_, bool reverse_, int begin) {
        tile = shared;
        source = rows + lane() % 4 * 8;
        tokens = tokens_;
        reverse = reverse_;
        load(begin);
    }
    // Unpack the steps from `base` on and load the next ones.
    __device__ void unpack(int base) {
        const Pair p = activation(ahead.x), q = activation(ahead.y), r = activation(ahead.z), s = activation(ahead.w);
        Quad* place = (Quad*)(tile + lane() * 8);
        place[0] = {p.a, p.b, q.a, q.b};
        place[1] = {r.a, r.b, s.a, s.b};
        load(base + STAGE);
    }
    __device__ const Quad* B(int step) const { return (const Quad*)(tile + step * 2 * N); }
    __device__ const Quad* C(int step) const { return (const Quad*)(tile + step * 2 * N + N); }
};

// Sums over the channels of a warp of N values a step. The matrix units add up four lanes at a time, of values rounded
// to bf16: column c of `picks` is 1 where the product's column c shall come from. Groups of four lanes wait in shared
// memory until the stage is over.
struct ChannelSums {
    static constexpr int ROW = 32 + 4;   // Quads a step; 4 more, so that the steps begin in different banks
    static constexpr int SIZE = STAGE * ROW;
    Quad* waiting;
    word picks[N / 4];
    Words values;
    Quad sums;

    __device__ ChannelSums(Quad* shared) : waiting(shared) {
        const int row = lane() / 4;
        for (int k = 0; k < N / 4; k++) {
            picks[k] = to_bf16({row == 2 * k ? 1.0f : 0.0f, row == 2 * k + 1 ? 1.0f : 0.0f});
        }
    }
    __device__ void clear() { sums = {0.0f, 0.0f, 0.0f, 0.0f}; }
    // Values n to n + 3; call for n = 0, 4, 8, ...
    __device__ void add(int n, const float (&part)[4]) {
        const word first = to_bf16({part[0], part[1]}), second = to_bf16({part[2], part[3]});
        if (n % 8 == 0) {
            values.x = first;
            values.y = second;
        } else {
            values.z = first;
            values.w = second;
            multiply_add_bf16(sums, values, picks[n / 8 * 2], picks[n / 8 * 2 + 1]);
        }
    }
    // A lane now has values 4 (lane % 4) to 4 (lane % 4) + 3 of its group lane / 4.
    __device__ void keep(int step) const { waiting[step * ROW + lane()] = sums; }
    // Add up the groups and store N floats a step, for `steps` steps; `stride` floats between steps.
    __device__ void store(float* row, int stride, int steps) const {
        sync_warp();
        const int step = lane() / 4, part = lane() % 4;
        const Quad* mine = waiting + step * ROW + part;
        Quad total = mine[0];
        for (int group = 1; group < 8; group++) total = total + mine[group * 4];
        if (step < steps) *(Quad*)(row + (long)step * stride + part * 4) = total;
    }
};

// What a warp keeps in shared memory.
template <int STREAMS, int SUMS>
struct Shared {
    alignas(16) word words[STREAMS][Stream<word>::SIZE];
    alignas(16) float vectors[Vectors::SIZE];
    Quad sums[SUMS > 0 ? SUMS : 1];
};

// Visit steps `begin` to `end`: `visit(slot, k)` once step k of a stage is in half `slot` of the shared memory,
// `finish(base, steps)` behind each stage, which begins with step `base`.
template <int UNROLL, typename Visit, typename Finish, typename... Streams>
__device__ inline void sweep(int begin, int end, Vectors& vectors, Visit visit, Finish finish, Streams&... streams) {
    int slot = 0;
#pragma unroll 1
    for (int base = begin; base < end; base += STAGE, slot ^= 1) {
        wait_for_copies();
        sync_warp();
        vectors.unpack(base);
        (streams.fetch(slot ^ 1), ...);
        sync_warp();
        const int steps = min(STAGE, end - base);
#pragma unroll UNROLL
        for (int k = 0; k < steps; k++) visit(slot, k);
        finish(base, steps);
    }
}

// `use(n, B_t[n .. n + 3], C_t[n .. n + 3])` for all states.
template <typename Use>
__device__ inline void each_four(const Vectors& vectors, int k, Use use) {
    const Quad *B = vectors.B(k), *C = vectors.C(k);
#pragma unroll
    for (int n = 0; n < N; n += 4) {
        const Quad b4 = B[n / 4], c4 = C[n / 4];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
        use(n, b, c);
    }
}

__device__ inline void nothing(int, int) {}

__device__ inline void clear(Pair (&state)[N]) {
    for (int n = 0; n < N; n++) state[n] = {0.0f, 0.0f};
}

__device__ inline Pair load_skip(const float* D, const Place& at) {
    return at.live ? Pair{D[at.channel], D[at.channel + 1]} : Pair{0.0f, 0.0f};
}

// A log2(e), so that exp2(dt * decay) is the decay of a step.
__device__ inline void load_decay(Pair (&decay)[N], const float* A_log, const Place& at) {
    const float* row = A_log + (at.live ? at.channel : 0) * N;
    for (int n = 0; n < N; n++) {
        decay[n] = {-LOG2E * exp2_fast(LOG2E * row[n]), -LOG2E * exp2_fast(LOG2E * row[N + n])};
    }
}

#if SEGMENTED
// Let the states pass through the segments before this block's, or from the last one on through those behind it.
__device__ inline void enter(
    Pair (&state)[N], const Pair (&decay)[N], const float* ends, const Place& at, int batch, bool from_last
) {
    const int mine = blockIdx.z, step = from_last ? -1 : 1;
    for (int segment = from_last ? gridDim.z - 1 : 0; at.live && segment != mine; segment += step) {
        const float* entry = ends + at.entry(batch, segment);
        const Pair elapsed = {entry[N], entry[ENTRY + N]};
        for (int n = 0; n < N; n++) {
            state[n] = exp2_fast(elapsed * decay[n]) * state[n] + Pair{entry[n], entry[ENTRY + n]};
        }
    }
}

__device__ inline void leave(const Pair (&state)[N], Pair elapsed, float* ends, const Place& at, int batch) {
    float* entry = ends + at.entry(batch, blockIdx.z);
    if (!at.live) return;
    for (int n = 0; n < N; n++) {
        entry[n] = state[n].a;
        entry[ENTRY + n] = state[n].b;
    }
    entry[N] = elapsed.a;
    entry[ENTRY + N] = elapsed.b;
}

extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_ends(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    float* ends, int batch, int total, int span
) {
    __shared__ Shared<2, 0> shared[2];
    const Place at(total, span);
    Shared<2, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    const long own = at.row(batch);
    Pair decay[N], state[N], elapsed = {0.0f, 0.0f};
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);

    Vectors vectors_now;
    Stream<word> us, dts;
    vectors_now.start(mine.vectors, vectors + own * COLUMNS, at.tokens, reverse, 0);
    us.start(mine.words[0], u + own * WIDTH + at.first, WIDTH, at.tokens, reverse, 0, at.tokens);
    dts.start(mine.words[1], delta + own * WIDTH + at.first, WIDTH, at.tokens, reverse, 0, at.tokens);
    const auto visit = [&](int slot, int k) {
        const Pair dt = from_fp16(dts.at(slot, k)), input = dt * activation(us.at(slot, k));
        elapsed = elapsed + dt;
        each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&)[4]) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
            }
        });
    };
    sweep<2>(0, at.tokens, vectors_now, visit, nothing, us, dts);
    leave(state, elapsed, ends, at, batch);
}

// `ends`: the gradients of the states before each segment, if those behind it have none.
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_ends_backward(
    const half_word* grad, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const half_word* gate, float* ends, int batch, int total, int span
) {
    __shared__ Shared<3, 0> shared[2];
    const Place at(total, span);
    Shared<3, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    const long own = at.row(batch), image = at.image_row();
    Pair decay[N], state[N], elapsed = {0.0f, 0.0f};
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);

    Vectors vectors_now;
    Stream<word> dts, gates, grads;
    const int tokens = at.tokens;
    vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, !reverse, 0);
    dts.start(mine.words[0], delta + own * WIDTH + at.first, WIDTH, tokens, !reverse, 0, tokens);
    gates.start(mine.words[1], gate + image * 2 * WIDTH + at.first, 2 * WIDTH, tokens, !reverse, 0, tokens);
    grads.start(mine.words[2], grad + image * WIDTH + at.first, WIDTH, tokens, !reverse, 0, tokens);
    const auto visit = [&](int slot, int k) {
        const Pair dt = from_fp16(dts.at(slot, k)), z = activation(gates.at(slot, k));
        const Pair dy = 0.5f * activation(grads.at(slot, k)) * (z * sigmoid(z));
        elapsed = elapsed + dt;
        each_four(vectors_now, k, [&](int n, const float (&)[4], const float (&c)[4]) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * (c[j] * dy + state[n + j]);
            }
        });
    };
    sweep<2>(0, tokens, vectors_now, visit, nothing, dts, gates, grads);
    leave(state, elapsed, ends, at, batch);
}
#endif

extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_forward(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, const float* ends, int batch, int total,
    int span
) {
    const Place at(total, span);
    const bool reverse = at.direction;
    const int tokens = at.tokens, middle = at.middle();
    const long own = at.row(batch), image = at.image_row();

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);
#if SEGMENTED
    enter(state, decay, ends, at, batch, reverse);
#endif
    const Pair skip = load_skip(reverse ? D1 : D0, at);

    __shared__ Shared<4, 0> shared[2];
    Shared<4, 0>& mine = shared[at.direction];
    Vectors vectors_now;
    Stream<word> us, dts, gates, others;
    Results<word> results;
    const half_word* out_row = out + image * WIDTH;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = half ? middle : 0, end = half ? tokens : middle;
        sync_block();
        vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, reverse, begin);
        us.start(mine.words[0], u + own * WIDTH + at.first, WIDTH, tokens, reverse, begin, end);
        dts.start(mine.words[1], delta + own * WIDTH + at.first, WIDTH, tokens, reverse, begin, end);
        gates.start(mine.words[2], gate + image * 2 * WIDTH + at.first, 2 * WIDTH, tokens, reverse, begin, end);
        others.start(mine.words[3], out_row + at.first, WIDTH, tokens, reverse, begin, end);
        results.start(out + image * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        const auto visit = [&](int slot, int k) {
            const Pair ut = activation(us.at(slot, k)), dt = from_fp16(dts.at(slot, k));
            const Pair input = dt * ut;
            Pair y = skip * ut;
            each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&c)[4]) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
                    y = y + c[j] * state[n + j];
                }
            });
            if (half) {
                const Pair other = activation(others.at(slot, k)), z = activation(gates.at(slot, k));
                y = 0.5f * (y + other) * (z * sigmoid(z));
            }
            results.put(rounded(y), at.live);
        };
        sweep<2>(begin, end, vectors_now, visit, nothing, us, dts, gates, others);
    }
}

// `scalars` (2, B, L, E) fp32 is scratch. `partial_BC` (2, blocks, B, L, 2 N) and, if TRAINED, `partial_A`
// (2, B, S, E, N), `partial_D` and `partial_bias` (2, B, S, E) are to be added up over blocks, or batch and segments.
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_backward(
    const half_word* grad, const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0,
    const float* A_log1, const float* D0, const float* D1, const half_word* gate, half_word* grad_u,
    half_word* grad_delta, half_word* grad_gate, float* scalars, float* partial_BC, float* partial_A,
    float* partial_D, float* partial_bias, const float* ends, const float* grad_ends, int batch, int total, int span
) {
    __shared__ Shared<6, ChannelSums::SIZE> shared[2];   // the scalars take two words
    const Place at(total, span);
    Shared<6, ChannelSums::SIZE>& mine = shared[at.direction];
    const bool reverse = at.direction;
    const int tokens = at.tokens, middle = at.middle();
    const long own = at.row(batch), image = at.image_row();
    float* sums_row = partial_BC
        + ((long)at.direction * gridDim.x + blockIdx.x) * batch * total * 2 * N + image * 2 * N;

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);
#if SEGMENTED
    enter(state, decay, ends, at, batch, reverse);
#endif
    const Pair skip = load_skip(reverse ? D1 : D0, at);
    ChannelSums over(mine.sums);
#if TRAINED
    Pair grad_A[N], grad_D = {0.0f, 0.0f}, grad_bias = {0.0f, 0.0f}, elapsed = {0.0f, 0.0f};
    clear(grad_A);
#endif

    const half_word *u_row = u + own * WIDTH + at.first, *delta_row = delta + own * WIDTH + at.first;
    const half_word *grad_row = grad + image * WIDTH + at.first, *gate_row = gate + image * 2 * WIDTH + at.first;
    Vectors vectors_now;
    Stream<word> us, dts, gates, grads, others;
    Results<word> results;
    Results<Pair> terms;

    // The states, from the first step to the last: the gradients of C and of the gate, and the scalars.
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = half ? middle : 0, end = half ? tokens : middle;
        sync_block();
        vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, reverse, begin);
        us.start(mine.words[0], u_row, WIDTH, tokens, reverse, begin, end);
        dts.start(mine.words[1], delta_row, WIDTH, tokens, reverse, begin, end);
        gates.start(mine.words[2], gate_row, 2 * WIDTH, tokens, reverse, begin, end);
        grads.start(mine.words[3], grad_row, WIDTH, tokens, reverse, begin, end);
        others.start(mine.words[4], grad_gate + image * 2 * WIDTH + at.first, 2 * WIDTH, tokens, reverse, begin, end);
        results.start(grad_gate + image * 2 * WIDTH + at.channel, 2 * WIDTH, tokens, reverse, begin);
        terms.start(scalars + own * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        const auto visit = [&](int slot, int k) {
            const Pair ut = activation(us.at(slot, k)), dt = from_fp16(dts.at(slot, k));
            const Pair z = activation(gates.at(slot, k)), g = 0.5f * activation(grads.at(slot, k));
            const Pair open = sigmoid(z), silu = z * open, dy = g * silu, input = dt * ut;
            Pair y = skip * ut, term = {0.0f, 0.0f};
#if TRAINED
            elapsed = elapsed + dt;
            grad_D = grad_D + dy * ut;
            const Pair weighted = elapsed * dy;
#endif
            over.clear();
            each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&c)[4]) {
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
                over.add(n, part);
            });
            over.keep(k);
            terms.put(dy * term, at.live);
            if (half) {
                const Pair other = activation(others.at(slot, k));
                y = g * (open + silu - silu * open) * (y + other);
            }
            results.put(rounded(y), at.live);
        };
        const auto finish = [&](int base, int steps) {
            const long token = reverse ? tokens - 1 - base : base;
            over.store(sums_row + token * 2 * N + N, reverse ? -2 * N : 2 * N, steps);
        };
        sweep<1>(begin, end, vectors_now, visit, finish, us, dts, gates, grads, others);
    }

    // Their gradients, from the last step to the first.
    Stream<Pair> past_terms;
    Results<word> grad_us, grad_deltas;
    sync_warp();
    vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, !reverse, 0);
    us.start(mine.words[0], u_row, WIDTH, tokens, !reverse, 0, tokens);
    dts.start(mine.words[1], delta_row, WIDTH, tokens, !reverse, 0, tokens);
    gates.start(mine.words[2], gate_row, 2 * WIDTH, tokens, !reverse, 0, tokens);
    grads.start(mine.words[3], grad_row, WIDTH, tokens, !reverse, 0, tokens);
    past_terms.start((Pair*)mine.words[4], scalars + own * WIDTH + at.first, WIDTH, tokens, !reverse, 0, tokens);
    grad_us.start(grad_u + own * WIDTH + at.channel, WIDTH, tokens, !reverse);
    grad_deltas.start(grad_delta + own * WIDTH + at.channel, WIDTH, tokens, !reverse);
    Pair mixed = {0.0f, 0.0f};   // <A, w_t> log2(e)
    Pair carry[N];
    clear(carry);
#if SEGMENTED
    enter(carry, decay, grad_ends, at, batch, !reverse);
    for (int n = 0; n < N; n++) {   // behind the segment w is the product of what both sweeps hold there
        const Pair w = carry[n] * state[n];
        mixed = mixed + decay[n] * w;
#if TRAINED
        grad_A[n] = grad_A[n] + elapsed * w;
#endif
    }
#endif
    for (int n = 0; n < N; n++) state[n] = carry[n];
    const auto visit = [&](int slot, int k) {
        const Pair ut = activation(us.at(slot, k)), dt = from_fp16(dts.at(slot, k));
        const Pair z = activation(gates.at(slot, k)), g = 0.5f * activation(grads.at(slot, k));
        const Pair dy = g * (z * sigmoid(z)), input = dt * ut;
        Pair through = {0.0f, 0.0f}, term = {0.0f, 0.0f};
#if TRAINED
        const Pair weighted = elapsed * input;
        elapsed = elapsed - dt;
#endif
        over.clear();
        each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&c)[4]) {
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
            over.add(n, part);
        });
        over.keep(k);
        mixed = mixed + past_terms.at(slot, k) - input * term;
        const Pair grad_dt = ut * through + LN2 * mixed;
        const Pair power = exp2_fast(-LOG2E * dt);   // 1 - e^-dt is the slope of softplus
        const Pair grad_raw = grad_dt - power * grad_dt;
#if TRAINED
        grad_bias = grad_bias + grad_raw;
#endif
        grad_us.put(rounded(dt * through + skip * dy), at.live);
        grad_deltas.put(rounded(grad_raw), at.live);
    };
    const auto finish = [&](int base, int steps) {
        const long token = reverse ? base : tokens - 1 - base;
        over.store(sums_row + token * 2 * N, reverse ? 2 * N : -2 * N, steps);
    };
    sweep<1>(0, tokens, vectors_now, visit, finish, us, dts, gates, grads, past_terms);
#if TRAINED
    if (at.live) {
        const long segment = ((long)at.direction * batch + at.image) * gridDim.z + blockIdx.z;
        const long channel = segment * WIDTH + at.channel;
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
