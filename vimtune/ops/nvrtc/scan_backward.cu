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
// exponentials a state and step, no saved states. Likewise dA = sum_t T_t (dy_t C_t s_t - dt_t u_t B_t h_t), T_t = dt_1 + .. + dt_t.
//
// One more compile-time constant: TRAINED (gradients of A_log, D and the time step's bias are wanted).

#include "scan.cuh"

constexpr int MAX_BLOCKS = TRAINED ? 4 : 6;   // on a multiprocessor: 255 or 168 registers for a thread

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

#if SEGMENTED
// `ends`: the gradients of the states before each segment, if those behind it have none.
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_ends_backward(
    const half_word* grad, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const half_word* gate, float* ends, int batch, int total, int span
) {
    __shared__ Shared<3, 0> shared[2];
    const Place at(total, span);
    Shared<3, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    if (blockIdx.z == (reverse ? gridDim.z - 1 : 0)) return;   // no segment precedes
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

// `scalars` (2, B, L, E / 2, 4) fp32 is scratch: <A, dy_t C_t s_t> and dy_t of two channels. `partial_BC`
// (2, blocks, B, L, 2 N) and, if TRAINED, `partial_A` (2, B, S, E, N), `partial_D` and `partial_bias` (2, B, S, E) are to be
// added up over blocks, or batch and segments.
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_backward(
    const half_word* grad, const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0,
    const float* A_log1, const float* D0, const float* D1, const half_word* gate, half_word* grad_u,
    half_word* grad_delta, half_word* grad_gate, float* scalars, float* partial_BC, float* partial_A,
    float* partial_D, float* partial_bias, const float* ends, const float* grad_ends, int batch, int total, int span
) {
    __shared__ Shared<6, ChannelSums::SIZE> shared[2];   // the scalars take four words
    const Place at(total, span);
    Shared<6, ChannelSums::SIZE>& mine = shared[at.direction];
    const bool reverse = at.direction;
    const int tokens = at.tokens, middle = at.middle();
    const long own = at.row(batch), image = at.image_row();
    float* sums_row = partial_BC
        + ((long)at.direction * gridDim.x + blockIdx.x) * batch * total * 2 * N + image * 2 * N;

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    enter(state, decay, ends, at, batch, reverse);
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
    Results<Quad> terms;

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
        terms.start(scalars + (own * WIDTH + at.channel) * 2, WIDTH, tokens, reverse, begin);
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
            term = dy * term;
            terms.put({term.a, term.b, dy.a, dy.b}, at.live);
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
    Stream<Quad> past_terms;
    Results<word> grad_us, grad_deltas;
    sync_warp();
    vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, !reverse, 0);
    us.start(mine.words[0], u_row, WIDTH, tokens, !reverse, 0, tokens);
    dts.start(mine.words[1], delta_row, WIDTH, tokens, !reverse, 0, tokens);
    past_terms.start((Quad*)mine.words[2], scalars + (own * WIDTH + at.first) * 2, WIDTH, tokens, !reverse, 0, tokens);
    grad_us.start(grad_u + own * WIDTH + at.channel, WIDTH, tokens, !reverse);
    grad_deltas.start(grad_delta + own * WIDTH + at.channel, WIDTH, tokens, !reverse);
    Pair mixed = {0.0f, 0.0f};   // <A, w_t> log2(e)
    Pair carry[N];
    enter(carry, decay, grad_ends, at, batch, !reverse);
#if SEGMENTED
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
        const Pair ut = activation(us.at(slot, k)), dt = from_fp16(dts.at(slot, k)), input = dt * ut;
        const Quad past = past_terms.at(slot, k);
        const Pair dy = {past.z, past.w};
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
        mixed = mixed + Pair{past.x, past.y} - input * term;
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
    sweep<1>(0, tokens, vectors_now, visit, finish, us, dts, past_terms);
#if TRAINED
    if (at.live) {
        const long channel = at.in_segment(batch, blockIdx.z);
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
