// Float vectors through the vector extension of GCC and Clang, and the functions the kernels need.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// W is the number of lanes. SSE, NEON and anything else that goes through plain registers has four.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf4 __attribute__((vector_size(16)));

static inline vf splat(float x) { return vf{} + x; }

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The last channels of a row may not fill a vector: lanes beyond `lanes` read as zero, and are not written.
static inline vf load(const float* p, int lanes) {
    if (lanes == W) return load(p);
    vf v{};
    std::memcpy(&v, p, lanes * sizeof(float));
    return v;
}

static inline void store(float* p, vf v, int lanes) {
    if (lanes == W)
        store(p, v);
    else
        std::memcpy(p, &v, lanes * sizeof(float));
}

// These two keep a NaN of `x`. (Compilers turn the general form into a comparison and a blend.)
static inline vf at_least(vf x, float low) {
#if defined(__AVX512F__)
    return _mm512_max_ps(splat(low), x);
#elif defined(__AVX2__)
    return _mm256_max_ps(splat(low), x);
#elif defined(__SSE__)
    return _mm_max_ps(splat(low), x);
#else
    return splat(low) > x ? splat(low) : x;
#endif
}

static inline vf at_most(vf x, float high) {
#if defined(__AVX512F__)
    return _mm512_min_ps(splat(high), x);
#elif defined(__AVX2__)
    return _mm256_min_ps(splat(high), x);
#elif defined(__SSE__)
    return _mm_min_ps(splat(high), x);
#else
    return splat(high) < x ? splat(high) : x;
#endif
}

// This is 1.5 * 2^23. Adding it rounds to an integer, which then sits in the low bits of the sum.
constexpr float ROUND = 12582912.0f;
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;

// Computes 2^x with a relative error below 2e-7. It is 0 for very negative x, and infinity from 128 up. The polynomial
// is the minimax one on [-1/2, 1/2] among those with value 1 at 0, so that decays close to 1 keep full accuracy.
static inline vf exp2_fast(vf x) {
#if defined(__AVX512DQ__)
    // This is x minus the nearest integer.
    vf f = _mm512_reduce_ps(x, 0);
    vf n = x - f;
#else
    x = at_most(at_least(x, -127.0f), 128.0f);
    vf t = x + ROUND;
    vf f = x - (t - ROUND);
#endif
    vf p = f * 0.00132647273f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
#if defined(__AVX512DQ__)
    return _mm512_scalef_ps(p, n);
#else
    return (vf)((vu)p + ((vu)t << 23));
#endif
}

// Computes e^x for any x, to about 1 ulp. Taking ln 2 in two parts keeps the reduced argument exact.
static inline vf exp_accurate(vf x) {
    vf t = x * LOG2E + ROUND;
    vf n = t - ROUND;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 0.00138435594f + 0.00837423559f;
    p = p * r + 0.041668009f;
    p = p * r + 0.166664302f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf y = (vf)((vu)p + ((vu)t << 23));
    y = x < splat(-87.33f) ? vf{} : y;
    return x > splat(88.72f) ? splat(__builtin_inff()) : y;
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp_accurate(-x)); }

// Computes log(1 + w) for w in [0, 1] as 2 artanh(w / (2 + w)), whose argument is at most 1/3.
static inline vf log1p_unit(vf w) {
    vf s = w / (2.0f + w);
    vf s2 = s * s;
    vf p = s2 * (1.0f / 17) + 1.0f / 15;
    p = p * s2 + 1.0f / 13;
    p = p * s2 + 1.0f / 11;
    p = p * s2 + 1.0f / 9;
    p = p * s2 + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    return 2.0f * s + 2.0f * s * (p * s2);
}

struct Softplus {
    vf value, slope;
};

// Computes log(1 + e^x) and its derivative from one exponential of -|x|, which cannot overflow.
static inline Softplus softplus(vf x) {
    vf magnitude = x < vf{} ? -x : x;
    vf w = exp_accurate(-magnitude);
    vf positive = at_least(x, 0.0f);
    return {positive + log1p_unit(w), (x < vf{} ? w : splat(1.0f)) / (1.0f + w)};
}

// Adds up the lanes of each of four adjacent vectors.
static inline vf4 lane_sums(const vf* four) {
    vf4 part[4];
    for (int j = 0; j < 4; ++j) {
        const char* p = reinterpret_cast<const char*>(four + j);
        std::memcpy(&part[j], p, sizeof(vf4));
        for (int k = 1; k < W / 4; ++k) {
            vf4 more;
            std::memcpy(&more, p + k * sizeof(vf4), sizeof(vf4));
            part[j] += more;
        }
    }
#if defined(__SSE3__)
    return _mm_hadd_ps(_mm_hadd_ps(part[0], part[1]), _mm_hadd_ps(part[2], part[3]));
#else
    vf4 sum{};
    for (int lane = 0; lane < 4; ++lane) sum += vf4{part[0][lane], part[1][lane], part[2][lane], part[3][lane]};
    return sum;
#endif
}
