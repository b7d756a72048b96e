// The scan's backward. See scan.cuh for the method and the shapes.
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
// So the backward is one sweep each way that keeps the scalars <A, dy_t C_t s_t> and dy_t per token and channel: two
// exponentials a state and step, no saved states. Likewise
//
//     dA = sum_t T_t (dy_t C_t s_t - dt_t u_t B_t h_t),  T_t = dt_1 + .. + dt_t
//
// C_t also reads an offset h' (E, S), if there is one: y_t = <C_t, s_t + h'> + D u_t, hence dh' = sum_t dy_t C_t, and
// dC_t = sum_e dy_t (s_t + h').
//
// One more compile-time constant: TRAINED (gradients of A_log, D and the time step's bias are wanted).

#include "scan.cuh"

// As many blocks as shall fit on a multiprocessor: eight or twelve warps, which leaves 255 or 168 registers for a
// thread. (Ten leave no more than twelve, because registers belong to a quarter of the multiprocessor.)
constexpr int MAX_BLOCKS = (TRAINED || N > 24 ? 8 : 12) / DIRECTIONS;

// Computes sigmoid(x) / d, of which z times is what the result has of each direction's y.
constexpr float COUNT = DIRECTIONS;
__device__ inline float shared_sigmoid(float x) { return reciprocal(COUNT + COUNT * exp2_fast(-LOG2E * x)); }
__device__ inline Pair shared_sigmoid(Pair x) { return {shared_sigmoid(x.a), shared_sigmoid(x.b)}; }

// The forward returns out = m SiLU(z), where m is the mean of the directions and z the gate. The gradient of z is that
// of out times m SiLU'(z) = out (1 / z + 1 - sigmoid(z)), so that y need not be computed again. This is the factor of
// out, or in fp16, whose numbers are not small enough for out to say what m was, of m, which the forward then keeps.
// `open` is `shared_sigmoid` of z.
__device__ inline float gate_slope(float z, float open) {
    const float shut = 1.0f - COUNT * open;
    return FP16 ? COUNT * open * (1.0f + z * shut) : reciprocal(z) + shut;
}
__device__ inline Pair gate_slope(Pair z, Pair open) {
    z = nonzero(z);
    return {gate_slope(z.a, open.a), gate_slope(z.b, open.b)};
}

// ChannelSums adds up N values a step over the channels of a warp, for two steps at once. In shared memory each four
// states of a step have a plane of all lanes. Of eight planes in a ROUND a lane adds up eight lanes of one. (Matrix units would take half the
// instructions, but an H200 lowers its clock by 8 % while they are in use.)
struct ChannelSums {
    static constexpr int STEPS = 2, PLANES = STEPS * N / 4, ROUNDS = (PLANES + 7) / 8;
    // A plane has 32 Quads and room for one more, so that eight planes begin in different banks.
    static constexpr int PLANE = 32 + 1;
    static constexpr int SIZE = PLANES * PLANE;
    Quad* shared;
    half_word* out[ROUNDS];
    const Range all;
    const int stride;
    // In each round the lane stores a sum of this token.
    int token[ROUNDS];

    // `rows` has N values of each token.
    __device__ ChannelSums(Quad* shared, half_word* rows, const Order& order)
        : shared(shared), all({0, order.tokens}), stride(order.along(STEPS)) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int own = plane(round);
            token[round] = order.stage(0) + order.within_stage(own / (N / 4));
            out[round] = rows + (long)token[round] * 2 * N + own % (N / 4) * 4 + lane() / 8 % 2 * 2 + lane() / 16;
        }
    }
    // Gives the lane's plane. Where a round has fewer than eight, several lanes do and store the same.
    static __device__ int plane(int round) { return min(round * 8 + lane() % 8, PLANES - 1); }
    // Takes the values of states n to n + 3 of this lane's channels.
    __device__ void add(int step, int n, const float (&part)[4]) const {
        shared[(step * (N / 4) + n / 4) * PLANE + lane()] = {part[0], part[1], part[2], part[3]};
    }
    // Stores the sums of these steps.
    __device__ void store() {
        sync_warp();
        Quad sums[ROUNDS];
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const Quad* first = shared + plane(round) * PLANE + lane() / 8 * 8;
            sums[round] = first[0];
            for (int k = 1; k < 8; k++) sums[round] = sums[round] + first[k];
        }
        sync_warp();
        // The sums over the four groups of lanes remain: a lane keeps two of its sums, then one, and gets the others'
        // parts of it.
        const bool second = lane() & 8, odd = lane() & 16;
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const Quad sum = sums[round];
            const Pair low = {sum.x, sum.y}, high = {sum.z, sum.w}, given = second ? low : high;
            const Pair half = (second ? high : low) + Pair{exchanged(given.a, 8), exchanged(given.b, 8)};
            const float total = (odd ? half.b : half.a) + exchanged(odd ? half.a : half.b, 16);
            if (all.has(token[round])) *out[round] = rounded(total);
            token[round] += stride;
            out[round] += stride * 2 * N;
        }
    }
};

#if SEGMENTED
// Finds `ends`, the gradients of the states before each segment if those behind it have none.
extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_ends_backward(
    const half_word* grad, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const half_word* gate, float* ends, int batch, int total, int span
) {
    __shared__ Shared<3, 0> shared[DIRECTIONS];
    const Place at(total, span);
    Shared<3, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    // No segment precedes the first one, so nobody asks for its gradient.
    if (blockIdx.z == (reverse ? gridDim.z - 1 : 0)) return;
    const long own = at.row(batch), image = at.image_row();
    Pair decay[STATES], state[STATES], elapsed = {0.0f, 0.0f};
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);

    const Order order = {at.tokens, !reverse};
    const Range all = {0, at.tokens};
    Vectors vectors_now(vectors + own * COLUMNS, order);
    Stream<word, 0> dts(delta + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 1> gates(gate + image * 2 * WIDTH + at.first, 2 * WIDTH, order, 0, all);
    Stream<word, 2> grads(grad + image * WIDTH + at.first, WIDTH, order, 0, all);
    const auto visit = [&](const Step& step, int, int) {
        const Pair dt = from_fp16(dts.at(step)), z = activation(gates.at(step));
        const Pair dy = activation(grads.at(step)) * (z * shared_sigmoid(z));
        elapsed = elapsed + dt;
        each_four(step, [&](int n, const float (&)[4], const float (&c)[4]) {
#pragma unroll
            for (int j = 0; j < live(n); j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * (c[j] * dy + state[n + j]);
            }
        });
    };
    sweep<2>(mine, order, 0, at.tokens, vectors_now, visit, nothing, dts, gates, grads);
    leave(state, elapsed, ends, at, batch);
}
#endif

constexpr int COLUMN_BLOCKS = (WIDTH + CHANNELS - 1) / CHANNELS;
// A warp has this in shared memory; the stream of scalars takes four words a lane.
typedef Shared<6, ChannelSums::SIZE> Memory;

// These are the tensors that the kernel reads and writes for each token. `scalars` (d, B, L, E / 2, 4) fp32 is scratch:
// <A, dy_t C_t s_t> and dy_t of two channels.
struct Tensors {
    const half_word *grad, *u, *delta, *vectors, *gate, *result;
    half_word *grad_u, *grad_delta, *grad_gate, *partial_BC;
    float* scalars;
    int batch;

    // Says where the sums for B | C over this warp's channels go.
    __device__ half_word* sums(const Place& at) const {
        const int block = at.direction * COLUMN_BLOCKS + at.first / CHANNELS;
        return partial_BC + ((long)block * batch * at.total + at.image_row()) * 2 * N;
    }
};

// This is what a thread knows during a sweep and hands on to the next one.
struct Known {
    // The states in one sweep, and their gradients in the other.
    Pair state[STATES];
    // <A, w_t> log2(e), the term in which states and their gradients meet.
    Pair mixed = {};
#if TRAINED
    // `elapsed` is T_t.
    Pair elapsed = {}, grad_A[STATES] = {}, grad_D = {}, grad_bias = {};
#endif
#if OFFSET
    Pair grad_offset[STATES] = {};
#endif
};

// Follows the states from the first step to the last, and finds the gradients of C and of the gate, and the scalars.
__device__ inline void sweep_states(
    const Tensors& tensors, const Place& at, Memory& mine, const Pair (&decay)[STATES], const Offset& offset,
    Known& now
) {
    const int tokens = at.tokens;
    // Each direction finds the gradient of the gate for this many of the tokens that it visits first: its share in
    // whole stages, so that those in the middle may be found twice, with the same result.
    const int share = min(((tokens + DIRECTIONS - 1) / DIRECTIONS + STAGE - 1) / STAGE * STAGE, tokens);
    const long own = at.row(tensors.batch), image = at.image_row();
    const Order order = {tokens, (bool)at.direction};
    const Range all = {0, tokens}, gated = {at.direction ? tokens - share : 0, share};
    Vectors vectors(tensors.vectors + own * COLUMNS, order);
    Stream<word, 0> us(tensors.u + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 1> dts(tensors.delta + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 2> gates(tensors.gate + image * 2 * WIDTH + at.first, 2 * WIDTH, order, 0, all);
    Stream<word, 3> grads(tensors.grad + image * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 4> results(tensors.result + image * WIDTH + at.first, WIDTH, order, 0, gated);
    Results<word> grad_gates(tensors.grad_gate + image * 2 * WIDTH + at.channel, 2 * WIDTH, order, 0);
    Results<Quad> terms(tensors.scalars + (own * WIDTH + at.channel) * 2, WIDTH, order, 0);
    ChannelSums over(mine.sums, tensors.sums(at) + N, order);
    const auto visit = [&](const Step& step, int base, int k) {
        const Pair ut = activation(us.at(step)), dt = from_fp16(dts.at(step));
        const Pair z = activation(gates.at(step)), g = activation(grads.at(step));
        const Pair open = shared_sigmoid(z), dy = g * (z * open), input = dt * ut;
        if (DIRECTIONS == 1 || base < share) {
            grad_gates.put(rounded(g * (gate_slope(z, open) * activation(results.at(step)))), at.live);
        }
        Pair term = {0.0f, 0.0f};
#if TRAINED
        now.elapsed = now.elapsed + dt;
        now.grad_D = now.grad_D + dy * ut;
        const Pair weighted = now.elapsed * dy;
#endif
        each_four(step, [&](int n, const float (&b)[4], const float (&c)[4]) {
            float part[4] = {};
#pragma unroll
            for (int j = 0; j < live(n); j++) {
                Pair& s = now.state[n + j];
                s = exp2_fast(dt * decay[n + j]) * s + b[j] * input;
                const Pair seen = c[j] * s;
                term = term + decay[n + j] * seen;
#if TRAINED
                now.grad_A[n + j] = now.grad_A[n + j] + weighted * seen;
#endif
                const Pair read = offset.beside(s, n + j);
                part[j] = read.a * dy.a + read.b * dy.b;
            }
            over.add(k, n, part);
        });
        term = dy * term;
        terms.put({term.a, term.b, dy.a, dy.b}, at.live);
    };
    const auto finish = [&] { over.store(); };
    sweep<ChannelSums::STEPS>(mine, order, 0, tokens, vectors, visit, finish, us, dts, gates, grads, results);
}

// Follows the gradients of the states from the last step to the first, and finds all that remains.
__device__ inline void sweep_gradients(
    const Tensors& tensors, const Place& at, Memory& mine, const Pair (&decay)[STATES], Pair skip, Known& now
) {
    const long own = at.row(tensors.batch);
    const Order order = {at.tokens, !at.direction};
    const Range all = {0, at.tokens};
    Vectors vectors(tensors.vectors + own * COLUMNS, order);
    Stream<word, 0> us(tensors.u + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 1> dts(tensors.delta + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<Quad, 2> past_terms(tensors.scalars + (own * WIDTH + at.first) * 2, WIDTH, order, 0, all);
    Results<word> grad_us(tensors.grad_u + own * WIDTH + at.channel, WIDTH, order, 0);
    Results<word> grad_deltas(tensors.grad_delta + own * WIDTH + at.channel, WIDTH, order, 0);
    ChannelSums over(mine.sums, tensors.sums(at), order);
    const auto visit = [&](const Step& step, int, int k) {
        const Pair ut = activation(us.at(step)), dt = from_fp16(dts.at(step)), input = dt * ut;
        const Quad past = past_terms.at(step);
        const Pair dy = {past.z, past.w};
        Pair through = {0.0f, 0.0f}, term = {0.0f, 0.0f};
#if TRAINED
        const Pair weighted = now.elapsed * input;
        now.elapsed = now.elapsed - dt;
#endif
        each_four(step, [&](int n, const float (&b)[4], const float (&c)[4]) {
            float part[4] = {};
#pragma unroll
            for (int j = 0; j < live(n); j++) {
                const Pair h = c[j] * dy + now.state[n + j];
                const Pair felt = b[j] * h;
                through = through + felt;
                term = term + decay[n + j] * felt;
#if TRAINED
                now.grad_A[n + j] = now.grad_A[n + j] - weighted * felt;
#endif
#if OFFSET
                now.grad_offset[n + j] = now.grad_offset[n + j] + c[j] * dy;
#endif
                part[j] = h.a * input.a + h.b * input.b;
                now.state[n + j] = exp2_fast(dt * decay[n + j]) * h;
            }
            over.add(k, n, part);
        });
        now.mixed = now.mixed + Pair{past.x, past.y} - input * term;
        const Pair grad_dt = ut * through + LN2 * now.mixed;
        // The slope of softplus is 1 - e^-dt, where dt is its result.
        const Pair power = exp2_fast(-LOG2E * dt);
        const Pair grad_raw = grad_dt - power * grad_dt;
#if TRAINED
        now.grad_bias = now.grad_bias + grad_raw;
#endif
        grad_us.put(rounded(dt * through + skip * dy), at.live);
        grad_deltas.put(rounded(grad_raw), at.live);
    };
    const auto finish = [&] { over.store(); };
    sweep<ChannelSums::STEPS>(mine, order, 0, at.tokens, vectors, visit, finish, us, dts, past_terms);
}

// `partial_BC` (d, blocks, B, L, 2 N) and, if TRAINED, `partial_A` (d, B, segments, E, S), `partial_D` and
// `partial_bias` (d, B, segments, E), and if OFFSET `partial_offset` (d, B, segments, E, S), are to be added up over
// blocks, or batch and segments.
extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_backward(
    const half_word* grad, const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0,
    const float* A_log1, const float* D0, const float* D1, const half_word* gate, const half_word* result,
    half_word* grad_u, half_word* grad_delta, half_word* grad_gate, half_word* partial_BC, float* scalars,
    float* partial_A, float* partial_D, float* partial_bias, const float* ends, const float* grad_ends, int batch,
    int total, int span, const float* offset0, const float* offset1, float* partial_offset
) {
    __shared__ Memory shared[DIRECTIONS];
    const Tensors tensors = {
        grad, u, delta, vectors, gate, result, grad_u, grad_delta, grad_gate, partial_BC, scalars, batch
    };
    const Place at(total, span);
    Memory& mine = shared[at.direction];
    const bool reverse = at.direction;
    Pair decay[STATES];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    Known now;
    enter(now.state, decay, nullptr, ends, at, batch, reverse);
    sweep_states(tensors, at, mine, decay, Offset(reverse ? offset1 : offset0, at), now);

    Pair behind[STATES];
    enter(behind, decay, nullptr, grad_ends, at, batch, !reverse);
    for (int n = 0; n < STATES; n++) {
#if SEGMENTED
        // Behind the segment w is the product of what both sweeps hold there.
        const Pair w = behind[n] * now.state[n];
        now.mixed = now.mixed + decay[n] * w;
#if TRAINED
        now.grad_A[n] = now.grad_A[n] + now.elapsed * w;
#endif
#endif
        now.state[n] = behind[n];
    }
    sync_warp();
    sweep_gradients(tensors, at, mine, decay, load_skip(reverse ? D1 : D0, at), now);
    if (!at.live) return;
    const long channel = at.in_segment(batch, blockIdx.z);
#if TRAINED
    // The gradient of A_log is A times that of A.
    for (int n = 0; n < STATES; n++) now.grad_A[n] = LN2 * decay[n] * now.grad_A[n];
    store(now.grad_A, partial_A + channel * STATES);
    *(Pair*)(partial_D + channel) = now.grad_D;
    *(Pair*)(partial_bias + channel) = now.grad_bias;
#endif
#if OFFSET
    store(now.grad_offset, partial_offset + channel * STATES);
#endif
}
