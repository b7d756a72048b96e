// What CUDA kernels see where they run on a CPU, to test them without a GPU. It takes the place of intrinsics.cuh.
//
// cuda_on_cpu.cpp has the threads: it is compiled once, this file with every kernel. So here is only what becomes a part
// of the kernels, and no container of the standard library, whose code would be most of what the compiler writes.

#include <math.h>
#include <string.h>

#include <cstdint>
#include <utility>

#include "cuda_threads.h"

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

typedef unsigned short half_word;
typedef unsigned int word;
struct alignas(16) Words { word x, y, z, w; };
struct alignas(16) Quad { float x, y, z, w; };
struct alignas(8) Pair { float a, b; };

using emulator::blockIdx;
using emulator::gridDim;

namespace emulator {

template <typename... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void** values;   // point to the arguments, as for cuLaunchKernel

    template <size_t... I>
    void run(std::index_sequence<I...>) { kernel(*(std::remove_reference_t<Parameters>*)values[I]...); }
};

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), Index grid, int num_threads, void** values) {
    Call<Parameters...> call = {kernel, values};
    run_grid(grid, num_threads, [](void* pointer) {
        ((Call<Parameters...>*)pointer)->run(std::index_sequence_for<Parameters...>{});
    }, &call);
}

inline float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

}  // namespace emulator

// What Python calls; all other symbols of a kernel are hidden.
#define EXPORT(kernel)                                                                              \
    extern "C" VISIBLE void emulate_##kernel(int x, int y, int z, int num_threads, void** values) { \
        emulator::launch(kernel, {x, y, z}, num_threads, values);                                   \
    }

inline int lane() { return emulator::current % emulator::WARP; }
inline int warp() { return emulator::current / emulator::WARP; }
inline void sync_warp() { emulator::wait_for_warp(); }
inline void sync_block() { emulator::wait_for_block(); }

inline char* launched_shared() { return emulator::shared_memory; }

inline void copy_async(void* shared, const void* global, bool valid) {
    char data[emulator::COPIED] = {};
    if (valid) memcpy(data, global, emulator::COPIED);
    emulator::copy(shared, data);
}
inline void wait_for_copies() { emulator::wait_for_copies(); }
inline void store_passing(void* place, Words value) { *(Words*)place = value; }

inline void store_if(bool valid, void* place, word value) {
    if (valid) *(word*)place = value;
}

inline float exchanged(float value, int bit) {
    static float values[emulator::MOST_THREADS];
    values[emulator::current] = value;
    sync_warp();
    const float other = values[emulator::current ^ bit];
    sync_warp();
    return other;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline Pair from_fp16(word pair) {
    _Float16 halves[2];
    memcpy(halves, &pair, 4);
    return {(float)halves[0], (float)halves[1]};
}
inline word to_fp16(Pair value) {
    const _Float16 halves[2] = {(_Float16)value.a, (_Float16)value.b};
    word pair;
    memcpy(&pair, halves, 4);
    return pair;
}
inline word to_finite_fp16(Pair value) {
    constexpr float LARGEST = 65504.0f;
    return to_fp16({value.a > LARGEST ? LARGEST : value.a, value.b > LARGEST ? LARGEST : value.b});
}
inline Pair from_bf16(word pair) { return {emulator::from_bits(pair << 16), emulator::from_bits(pair & 0xffff0000u)}; }
inline word to_bf16(Pair value) {
    const auto rounded = [](float x) {
        const uint32_t bits = emulator::to_bits(x);
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return rounded(value.a) | rounded(value.b) << 16;
}

#if FP16
inline Pair activation(word pair) { return from_fp16(pair); }
inline word rounded(Pair value) { return to_fp16(value); }
#else
inline Pair activation(word pair) { return from_bf16(pair); }
inline word rounded(Pair value) { return to_bf16(value); }
#endif

// The product of a warp's matrices.
inline void multiply_add(Quad& sums, Words values, word weight0, word weight1) {
    using namespace emulator;
    static word exchange[MOST_THREADS][6];
    const word mine[6] = {values.x, values.y, values.z, values.w, weight0, weight1};
    memcpy(exchange[current], mine, sizeof mine);
    sync_warp();
    const int base = warp() * WARP, row = lane() / 4, column = lane() % 4;
    const auto two = [&](int of, int index) { return activation(exchange[base + of][index]); };
    const auto element = [&](int upper, int to) {
        float sum = 0.0f;
        for (int k = 0; k < 8; k++) {   // words along the summed dimension
            const Pair value = two(row * 4 + k % 4, upper + (k < 4 ? 0 : 2));
            const Pair weight = two(to * 4 + k % 4, k < 4 ? 4 : 5);
            sum += value.a * weight.a + value.b * weight.b;
        }
        return sum;
    };
    sums.x += element(0, 2 * column);
    sums.y += element(0, 2 * column + 1);
    sums.z += element(1, 2 * column);
    sums.w += element(1, 2 * column + 1);
    sync_warp();
}
inline Words load_values(const void* piece) {
    using namespace emulator;
    static const word* pieces[MOST_THREADS];
    pieces[current] = (const word*)piece;
    sync_warp();
    const auto own = [&](int matrix) { return pieces[warp() * WARP + matrix * 8 + lane() / 4][lane() % 4]; };
    const Words values = {own(0), own(1), own(2), own(3)};
    sync_warp();
    return values;
}
