// The scan's forward computes y of its directions and gates their mean. See scan.cuh for the method and the shapes.

#include "scan_forward.cuh"

#if SEGMENTED
extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_ends(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    float* ends, int batch, int total, int span
) {
    __shared__ Shared<2, 0> shared[DIRECTIONS];
    const Place at(total, span);
    Shared<2, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    // No segment follows the last one, so nobody asks for its state.
    if (blockIdx.z == (reverse ? 0 : gridDim.z - 1)) return;
    const long own = at.row(batch);
    Pair decay[STATES], state[STATES], elapsed = {0.0f, 0.0f};
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);

    const Order order = {at.tokens, reverse};
    const Range all = {0, at.tokens};
    Vectors vectors_now(vectors + own * COLUMNS, order);
    Stream<word, 0> us(u + own * WIDTH + at.first, WIDTH, order, 0, all);
    Stream<word, 1> dts(delta + own * WIDTH + at.first, WIDTH, order, 0, all);
    const auto visit = [&](const Step& step, int, int) {
        const Pair dt = from_fp16(dts.at(step)), input = dt * activation(us.at(step));
        elapsed = elapsed + dt;
        each_four(step, [&](int n, const float (&b)[4], const float (&)[4]) {
#pragma unroll
            for (int j = 0; j < live(n); j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
            }
        });
    };
    sweep<2>(mine, order, 0, at.tokens, vectors_now, visit, nothing, us, dts);
    leave(state, elapsed, ends, at, batch);
}
#endif

// `mean` is that of the directions before the gate, for a backward in fp16 (`gate_slope`), or null.
extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_forward(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, half_word* mean, const float* ends,
    int batch, int total, int span, const float* offset0, const float* offset1
) {
    const Tensors tensors = {u, delta, vectors, gate, out, mean, batch};
    const Place at(total, span);
    Pair state[STATES];
    scan_tokens(
        tensors, at, A_log0, A_log1, D0, D1, nullptr, ends, Offset(at.direction ? offset1 : offset0, at), state
    );
}
