// The scan's forward pass where each direction begins with given states, `first0` and `first1` (E, S). See scan.cuh for
// the method and the shapes.

#include "scan_forward.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MAX_BLOCKS) scan_from(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, half_word* mean, const float* ends,
    const float* first0, const float* first1, int batch, int total, int span, const float* offset0,
    const float* offset1
) {
    const Tensors tensors = {u, delta, vectors, gate, out, mean, batch};
    const Place at(total, span);
    Pair state[STATES];
    const Offset offset(at.direction ? offset1 : offset0, at);
    scan_tokens(tensors, at, A_log0, A_log1, D0, D1, at.direction ? first1 : first0, ends, offset, state);
}
