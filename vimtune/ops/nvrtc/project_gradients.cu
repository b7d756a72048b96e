// This computes the gradients of B | C | dt_r: gp_t = (sum over channel blocks of partial_BC_t | grad_delta_t dt).
//
// A warp finds 16 rows of one direction, of whatever images, alone.
//
// Compile-time constants: STATES, WIDTH (E), COLUMNS (P: B | C | dt_r, all padded), BLOCKS (of partial_BC), WARPS (of a
// block), FP16 (activations are fp16, otherwise bf16). Shapes, contiguous, the direction as first index: grad_delta
// (d, B, L, E), partial_BC (d, BLOCKS, B, L, 2 N), gp (d, B, L, P), dt_t as packed by prepare.cu.

#include "sizes.cuh"

// B | C have this many columns.
constexpr int VECTORS = 2 * N;
// So many columns of dt_r are found at once.
constexpr int PART = RANK < 64 ? RANK : 64;
// The product with dt takes this many steps of 32 channels.
constexpr int STEPS = PADDED / 32;
// The gradients of so many steps are on their way.
constexpr int AHEAD = RANK == 16 && STEPS % 4 == 0 ? 4 : 2;
// Registers allow so many warps on a multiprocessor.
constexpr int RESIDENT = RANK > 32 ? 20 : 24;

// Gradients are the lane's eight of each 32 channels of two rows, with AHEAD steps of them on their way.
struct Gradients {
    const half_word *upper, *lower;
    // So many channels are left to be loaded.
    int left;
    Words ahead[AHEAD][2];

    __device__ Gradients(const half_word* upper, const half_word* lower) : upper(upper), lower(lower) {
        left = WIDTH - lane() % 4 * 8;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) fetch(k);
    }
    __device__ void fetch(int k) {
        const Words zero = {0, 0, 0, 0};
        ahead[k][0] = k * 32 < left ? *(const Words*)(upper + k * 32) : zero;
        ahead[k][1] = k * 32 < left ? *(const Words*)(lower + k * 32) : zero;
        if (k < AHEAD - 1) return;
        upper += AHEAD * 32;
        lower += AHEAD * 32;
        left -= AHEAD * 32;
    }
};

// Computes sums += gradients (16 x E) dt (E x PART). Columns are permuted such that a lane gets four neighbours of 16.
__device__ inline void project_steps(Quad (&sums)[PART / 8], Gradients& gradients, const Words* weight) {
#pragma unroll 1
    for (int step = 0; step < STEPS; step += AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const Words p = gradients.ahead[k][0], q = gradients.ahead[k][1];
            const Words values0 = {p.x, q.x, p.y, q.y}, values1 = {p.z, q.z, p.w, q.w};
            gradients.fetch(k);
#pragma unroll
            for (int n = 0; n < PART / 8; n++) {
                const Words w = weight[(k * (RANK / 8) + n) * 32];
                multiply_add(sums[n], values0, w.x, w.y);
                multiply_add(sums[n], values1, w.z, w.w);
            }
        }
        weight += AHEAD * (RANK / 8) * 32;
    }
}

// The grid has blocks of 16 WARPS rows, and directions. `rows` is B L.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT / WARPS) project_gradients(
    const half_word* grad_delta, const half_word* partial_BC, const Words* dt_t, half_word* gp, int rows
) {
    const int direction = blockIdx.y, first = (blockIdx.x * WARPS + warp()) * 16;
    // What would come after this row is read as if it were this row.
    const int last = min(15, rows - 1 - first);
    if (last < 0) return;
    const long index = (long)direction * rows + first;
    const int part = lane() % 4, upper = lane() / 4, lower = upper + 8;
    const half_word* row = grad_delta + index * WIDTH + part * 8;
    const half_word *row0 = row + min(upper, last) * WIDTH, *row1 = row + min(lower, last) * WIDTH;
    Gradients gradients(row0, row1);

    half_word* out = gp + index * COLUMNS;
    // The lane has eight columns of each 32.
#pragma unroll
    for (int first_column = 0; first_column < VECTORS; first_column += 32) {
        const int column = first_column + part * 8;
        if (VECTORS % 32 != 0 && column >= VECTORS) break;
        const half_word* source = partial_BC + ((long)direction * (BLOCKS - 1) * rows + index) * VECTORS + column;
        // These are the sums for two rows.
        Eight totals[2] = {};
#pragma unroll 6
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const Words values = *(const Words*)(source + min(k ? lower : upper, last) * VECTORS);
                const word pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
                for (int j = 0; j < 4; j++) totals[k].pairs[j] = totals[k].pairs[j] + activation(pairs[j]);
            }
            source += (long)rows * VECTORS;
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int row = k ? lower : upper;
            const Words values = totals[k].words();
            if (row <= last) *(Words*)(out + row * COLUMNS + column) = values;
        }
    }

#pragma unroll 1
    for (int base = 0; base < RANK; base += PART) {
        Quad sums[PART / 8];
        for (int n = 0; n < PART / 8; n++) sums[n] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (base > 0) gradients = Gradients(row0, row1);
        project_steps(sums, gradients, dt_t + (direction * STEPS * RANK + base) / 8 * 32 + lane());
        half_word* place = out + VECTORS + base + part * 4;
#pragma unroll
        for (int n = 0; n < PART / 8; n += 2) {
            const Quad even = sums[n], odd = sums[n + 1];
            const HalfWords above = {rounded({even.x, even.y}), rounded({odd.x, odd.y})};
            const HalfWords below = {rounded({even.z, even.w}), rounded({odd.z, odd.w})};
            if (upper <= last) *(HalfWords*)(place + upper * COLUMNS + n * 8) = above;
            if (lower <= last) *(HalfWords*)(place + lower * COLUMNS + n * 8) = below;
        }
    }
}
