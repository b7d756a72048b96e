// What the kernels for one token share: weights of either dtype, and the convolution.
//
// Compile-time constants: FILTER (K), FP16 (activations are fp16, otherwise bf16), and HALVES, in which bit k says that the
// k-th weight has the dtype of activations; the others are fp32. The weight of the convolution (channels, K) is the first.

// Gives a number of the weight with this index among the weights.
template <int INDEX>
__device__ inline float weight(const void* values, long place) {
    if constexpr (HALVES >> INDEX & 1) return activation(((const half_word*)values)[place]).a;
    else return ((const float*)values)[place];
}

// Rounds to the dtype of activations.
__device__ inline float as_activation(float value) { return activation(rounded(value)).a; }

// Convolves the new input of a channel with those before it, and remembers it. Gives SiLU of the result.
__device__ inline float convolve(half_word x, half_word* recent, const void* conv, float bias, int channel) {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < FILTER; k++) {
        const half_word input = k + 1 < FILTER ? recent[k + 1] : x;
        recent[k] = input;
        sum += weight<0>(conv, (long)channel * FILTER + k) * activation(input).a;
    }
    return as_activation(sum * sigmoid(sum));
}

