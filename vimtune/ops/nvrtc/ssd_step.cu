// One token of Mamba-2's mixer, as decoding needs it, in three launches: convolution, scan of the heads, gated norm.
//
// The inputs that the convolution remembers and the state are changed in place. Whatever PyTorch's operations would round
// to the dtype of activations is rounded here, too.
//
// Compile-time constants: HEADS (H), HEAD (P), STATES (N), GROUPS (G, of heads that share B and C), NORM_GROUPS (of
// channels), THREADS, and those of step.cuh. E = H P, and the convolution has F = E + 2 G N channels: x, B and C.
// Shapes, all contiguous: projected (B, 2 E + 2 G N + H) with columns z, xBC and dt; recent (B, F, K), the last inputs of
// the convolution, and convolved (B, F) in the dtype of activations; state (B, H, P, N) and gated (B, E) fp32; out (B, E).
// Weights, in this order: conv (F, K), conv_bias (F), dt_bias (H), A_log (H), D (H), norm (E).

#include "step.cuh"

constexpr int WIDTH = HEADS * HEAD;
constexpr int CHANNELS = WIDTH + 2 * GROUPS * STATES;
constexpr int COLUMNS = WIDTH + CHANNELS + HEADS;
constexpr int WARPS = THREADS / 32;
// How many states of a channel a lane has.
constexpr int OWN = (STATES + 31) / 32;

extern "C" __global__ void __launch_bounds__(THREADS) convolve_token(
    const half_word* projected, half_word* recent, half_word* convolved, const void* conv, const void* conv_bias,
    int has_bias
) {
    const int channel = blockIdx.x * THREADS + warp() * 32 + lane();
    if (channel >= CHANNELS) return;
    const long sequence = blockIdx.y, place = sequence * CHANNELS + channel;
    const float bias = has_bias ? weight<1>(conv_bias, channel) : 0.0f;
    const half_word input = projected[sequence * COLUMNS + WIDTH + channel];
    convolved[place] = rounded(convolve(input, recent + place * FILTER, conv, bias, channel));
}

// A block owns a head of a sequence. A warp takes one channel of it after the other, whose states its lanes share.
extern "C" __global__ void __launch_bounds__(THREADS) scan_token(
    const half_word* projected, const half_word* convolved, float* state, float* gated, const void* dt_bias,
    const void* A_log, const void* D, float lowest, float highest
) {
    const int head = blockIdx.x, group = head / (HEADS / GROUPS);
    const long sequence = blockIdx.y;
    const half_word *row = projected + sequence * COLUMNS, *values = convolved + sequence * CHANNELS;
    const float raw = activation(row[WIDTH + CHANNELS + head]).a + weight<2>(dt_bias, head);
    const float dt = fminf(fmaxf(softplus(raw), lowest), highest);
    const float decay = exp2_fast(-LOG2E * dt * exp2_fast(LOG2E * weight<3>(A_log, head))), skip = weight<4>(D, head);
    float B[OWN], C[OWN];
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        const int n = k * 32 + lane();
        B[k] = n < STATES ? activation(values[WIDTH + group * STATES + n]).a : 0.0f;
        C[k] = n < STATES ? activation(values[WIDTH + (GROUPS + group) * STATES + n]).a : 0.0f;
    }
    for (int p = warp(); p < HEAD; p += WARPS) {
        const int channel = head * HEAD + p;
        const float x = activation(values[channel]).a, input = dt * x;
        float* states = state + (sequence * WIDTH + channel) * STATES;
        float y = 0.0f;
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const int n = k * 32 + lane();
            if (n >= STATES) continue;
            const float now = decay * states[n] + input * B[k];
            states[n] = now;
            y += now * C[k];
        }
        for (int bit = 16; bit > 0; bit /= 2) y += exchanged(y, bit);
        const float z = activation(row[channel]).a;
        if (lane() == 0) gated[sequence * WIDTH + channel] = as_activation(y + skip * x) * z * sigmoid(z);
    }
}

// A block owns a group of channels of a sequence.
extern "C" __global__ void __launch_bounds__(THREADS) norm_token(
    const float* gated, half_word* out, const void* norm, float eps
) {
    constexpr int SIZE = WIDTH / NORM_GROUPS;
    float* sums = (float*)launched_shared();
    const int thread = warp() * 32 + lane(), first = blockIdx.x * SIZE;
    const float* values = gated + (long)blockIdx.y * WIDTH;
    float sum = 0.0f;
    for (int channel = first + thread; channel < first + SIZE; channel += THREADS) {
        sum += values[channel] * values[channel];
    }
    for (int bit = 16; bit > 0; bit /= 2) sum += exchanged(sum, bit);
    if (lane() == 0) sums[warp()] = sum;
    sync_block();
    float total = 0.0f;
    for (int k = 0; k < WARPS; k++) total += sums[k];
    const float inverse = 1.0f / sqrtf(total / SIZE + eps);
    for (int channel = first + thread; channel < first + SIZE; channel += THREADS) {
        out[(long)blockIdx.y * WIDTH + channel] = rounded(values[channel] * inverse * weight<5>(norm, channel));
    }
}
