// Arithmetic that the kernels share.

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// Half of Words: four activations.
struct alignas(8) HalfWords { word x, y; };

__device__ inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
__device__ inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
__device__ inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
__device__ inline Pair operator*(float x, Pair y) { return {x * y.a, x * y.b}; }
__device__ inline Quad operator+(Quad x, Quad y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }
__device__ inline Pair exp2_fast(Pair x) { return {exp2_fast(x.a), exp2_fast(x.b)}; }

__device__ inline float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
__device__ inline Pair sigmoid(Pair x) { return {sigmoid(x.a), sigmoid(x.b)}; }

// Computes log(1 + e^x) with a relative error below 6e-5, also where it is small, which is where trained time steps
// live. It is max(x, 0) + log(1 + p) with p = e^-|x|, where log(1 + p) / p is a polynomial fitted to 0 <= p <= 1.
__device__ inline float softplus(float x) {
    const float p = exp2_fast(-fabsf(LOG2E * x));
    const float ratio = 0.99994326f + p * (-0.49697781f + p * (0.30630094f + p * (-0.15742722f + p * 0.041347306f)));
    return fmaxf(x, 0.0f) + p * ratio;
}

// Eight neighbouring activations, which are 16 bytes in memory, as fp32 numbers.
struct Eight {
    Pair pairs[4];

    __device__ Words words() const {
        return {rounded(pairs[0]), rounded(pairs[1]), rounded(pairs[2]), rounded(pairs[3])};
    }
};
__device__ inline Eight activations(Words v) {
    return {{activation(v.x), activation(v.y), activation(v.z), activation(v.w)}};
}

// Computes sums (16 x 32) += values (16 x 16) weights (16 x 32). Weights packed by `spread_index` (prepare.cu) give a
// lane eight neighbouring columns of two rows, two of them in each of its sums.
__device__ inline void multiply_add(Quad (&sums)[4], Words values, Words low, Words high) {
    multiply_add(sums[0], values, low.x, low.y);
    multiply_add(sums[1], values, low.z, low.w);
    multiply_add(sums[2], values, high.x, high.y);
    multiply_add(sums[3], values, high.z, high.w);
}

// Rounds one number; a word has room for two of them.
__device__ inline half_word rounded(float value) { return (half_word)rounded(Pair{value, 0.0f}); }
