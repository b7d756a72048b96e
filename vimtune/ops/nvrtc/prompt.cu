// The scan's forward pass in one direction, which also gives the state behind the last token, `last` (B, E, S). See
// scan.cuh for the method and the shapes.

#include "scan_forward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_prompt(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, half_word* mean, const float* ends,
    float* last, int batch, int total, int span, const float* offset0, const float* offset1
) {
    const Tensors tensors = {u, delta, vectors, gate, out, mean, batch};
    const Place at(total, span);
    Pair state[STATES];
    scan_tokens(
        tensors, at, A_log0, A_log1, D0, D1, nullptr, ends, Offset(at.direction ? offset1 : offset0, at), state
    );
    if (!at.live || blockIdx.z != gridDim.z - 1) return;
    store(state, last + ((long)at.image * WIDTH + at.channel) * STATES);
}
