// One token of Mamba's mixer, as decoding needs it: convolution, x_proj, time steps and scan. A block owns one sequence.
//
// All that lies between the two large projections is little work, so what counts is that it is launched once. The
// inputs that the convolution remembers and the state are changed in place. Whatever PyTorch's operations would round
// to the dtype of activations is rounded here, too.
//
// Compile-time constants: WIDTH (E), STATES (N), RANK (R), THREADS, and those of step.cuh.
// Shapes, all contiguous: xz (B, 2 E) with x, which is convolved, before the gate; recent (B, E, K), the last inputs of
// the convolution, in the dtype of activations; state (B, E, N) fp32; out (B, E). Weights, in this order: conv (E, K),
// conv_bias (E), x_proj (R + 2 N, E) with rows dt_r | B | C, dt_proj (E, R), dt_bias (E), A_log (E, N), D (E).

#include "step.cuh"

constexpr int ROWS = RANK + 2 * STATES;

// Multiplies a row of x_proj by u, which the threads of a warp share.
__device__ inline float project(const void* x_proj, int row, const float* u) {
    float sum = 0.0f;
#pragma unroll 8
    for (int channel = lane(); channel < WIDTH; channel += 32) {
        sum += weight<2>(x_proj, (long)row * WIDTH + channel) * u[channel];
    }
    for (int bit = 16; bit > 0; bit /= 2) sum += exchanged(sum, bit);
    return as_activation(sum);
}

// Gives the time step of a channel from dt_r.
__device__ inline float time_step(const void* dt_proj, float bias, const float* low_rank, int channel) {
    float sum = 0.0f;
#pragma unroll 8
    for (int r = 0; r < RANK; r++) sum += weight<3>(dt_proj, (long)channel * RANK + r) * low_rank[r];
    return softplus(as_activation(sum) + bias);
}

extern "C" __global__ void __launch_bounds__(THREADS) mixer_step(
    const half_word* xz, half_word* recent, float* state, half_word* out, const void* conv, const void* conv_bias,
    const void* x_proj, const void* dt_proj, const void* dt_bias, const void* A_log, const void* D, int has_bias
) {
    // The block shares u (E) and the rows of the projection: dt_r, B and C.
    float* u = (float*)launched_shared();
    float* rows = u + WIDTH;
    const int thread = warp() * 32 + lane();
    const long sequence = blockIdx.x;
    for (int channel = thread; channel < WIDTH; channel += THREADS) {
        const long place = sequence * WIDTH + channel;
        const float bias = has_bias ? weight<1>(conv_bias, channel) : 0.0f;
        u[channel] = convolve(xz[sequence * 2 * WIDTH + channel], recent + place * FILTER, conv, bias, channel);
    }
    sync_block();
    for (int row = warp(); row < ROWS; row += THREADS / 32) {
        const float value = project(x_proj, row, u);
        if (lane() == 0) rows[row] = value;
    }
    sync_block();
    const float *B = rows + RANK, *C = B + STATES;
    for (int channel = thread; channel < WIDTH; channel += THREADS) {
        const long place = sequence * WIDTH + channel;
        const float dt = time_step(dt_proj, weight<4>(dt_bias, channel), rows, channel), input = dt * u[channel];
        float y = weight<6>(D, channel) * u[channel];
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            const float decay = -exp2_fast(LOG2E * weight<5>(A_log, (long)channel * STATES + n));
            const float now = exp2_fast(LOG2E * dt * decay) * state[place * STATES + n] + input * B[n];
            state[place * STATES + n] = now;
            y += now * C[n];
        }
        const float z = activation(xz[sequence * 2 * WIDTH + WIDTH + channel]).a;
        out[place] = rounded(y * z * sigmoid(z));
    }
}
