// Arithmetic that the kernels share.

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

struct alignas(8) HalfWords { word x, y; };   // half of Words

__device__ inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
__device__ inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
__device__ inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
__device__ inline Pair operator*(float x, Pair y) { return {x * y.a, x * y.b}; }
__device__ inline Quad operator+(Quad x, Quad y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }
__device__ inline Pair exp2_fast(Pair x) { return {exp2_fast(x.a), exp2_fast(x.b)}; }

__device__ inline float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
__device__ inline Pair sigmoid(Pair x) { return {sigmoid(x.a), sigmoid(x.b)}; }

// One of the two numbers of a word.
__device__ inline half_word rounded(float value) { return (half_word)rounded(Pair{value, 0.0f}); }
