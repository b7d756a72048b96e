// Runs CUDA kernels on a CPU, to test them where there is no GPU. It takes the place of intrinsics.cuh.
//
// The threads of a block are coroutines on one CPU thread, resumed in turn; at a barrier each yields until all
// have arrived, and asynchronous copies take place when they are waited for. So missing waits show as wrong results, and
// missing barriers as results that change when threads and blocks take their turns backwards and copies take place at
// once.

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

typedef unsigned short half_word;
typedef unsigned int word;
struct alignas(16) Words { word x, y, z, w; };
struct alignas(16) Quad { float x, y, z, w; };
struct alignas(8) Pair { float a, b; };

struct Index { int x, y, z; };
static Index blockIdx, gridDim;

namespace emulator {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

alignas(16) static char shared_memory[256 * 1024];
static int shared_bytes;   // that the launch says; what lies behind must stay as it was
constexpr int GUARD = 4096;
constexpr char UNTOUCHED = 0x5a;

static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current;
static bool backwards;
static void (*body)(void*);
static void* arguments;
static word exchange[1024][6];

struct Copy { void* target; char data[16]; };
static std::vector<Copy> copies[1024];   // under way, of each thread

inline void yield() { swapcontext(&threads[current].context, &scheduler); }

// Waiting is counted, not timed: a barrier has been passed by all once each has arrived as often as the first.
static std::vector<long> arrivals_block, arrivals_warp;

inline void wait(std::vector<long>& arrivals, int first, int last) {
    const long mine = ++arrivals[current];
    for (bool all = false; !all;) {
        all = true;
        for (int k = first; k < last; k++) all = all && (arrivals[k] >= mine || threads[k].done);
        if (!all) yield();
    }
}

inline void start() {
    body(arguments);
    threads[current].done = true;
    yield();
}

inline void run_block(int num_threads) {
    threads.clear();
    threads.resize(num_threads);
    for (auto& left : copies) left.clear();
    arrivals_block.assign(num_threads, 0);
    arrivals_warp.assign(num_threads, 0);
    for (Thread& thread : threads) {
        thread.stack.reset(new char[STACK]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, (void (*)())start, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int turn = 0; turn < num_threads; turn++) {
            current = backwards ? num_threads - 1 - turn : turn;
            if (threads[current].done) continue;
            left = true;
            swapcontext(&scheduler, &threads[current].context);
        }
    }
}

template <typename... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** values, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<Parameters>*)values[I]...);
}

// `values` points to the arguments, as for cuLaunchKernel.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), Index grid, int num_threads, void** values) {
    struct Call { void (*kernel)(Parameters...); void** values; } now = {kernel, values};
    arguments = &now;
    body = [](void* pointer) {
        Call* what = (Call*)pointer;
        call(what->kernel, what->values, std::index_sequence_for<Parameters...>{});
    };
    gridDim = grid;
    memset(shared_memory + shared_bytes, UNTOUCHED, GUARD);
    const int blocks = grid.x * grid.y * grid.z;
    for (int turn = 0; turn < blocks; turn++) {
        const int block = backwards ? blocks - 1 - turn : turn;
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block(num_threads);
    }
}

inline float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

}  // namespace emulator

// What Python calls; all other symbols are hidden.
#define VISIBLE __attribute__((visibility("default")))

// How the next launches run: in which order threads and blocks take their turns, and with how much shared memory.
extern "C" VISIBLE void emulate_next(int backwards, int shared_bytes) {
    emulator::backwards = backwards;
    emulator::shared_bytes = shared_bytes;
}
// Whether the last launch wrote to no more shared memory than that.
extern "C" VISIBLE int emulate_kept_within() {
    for (int k = 0; k < emulator::GUARD; k++) {
        if (emulator::shared_memory[emulator::shared_bytes + k] != emulator::UNTOUCHED) return 0;
    }
    return 1;
}

#define EXPORT(kernel)                                                                              \
    extern "C" VISIBLE void emulate_##kernel(int x, int y, int z, int num_threads, void** values) { \
        emulator::launch(kernel, {x, y, z}, num_threads, values);                                   \
    }

inline int lane() { return emulator::current % emulator::WARP; }
inline int warp() { return emulator::current / emulator::WARP; }
inline void sync_warp() { emulator::wait(emulator::arrivals_warp, warp() * 32, warp() * 32 + 32); }
inline void sync_block() { emulator::wait(emulator::arrivals_block, 0, (int)emulator::threads.size()); }

inline char* launched_shared() { return emulator::shared_memory; }

inline void copy_async(void* shared, const void* global, bool valid) {
    emulator::Copy copy = {shared, {}};
    if (valid) memcpy(copy.data, global, 16);
    if (emulator::backwards) {
        memcpy(copy.target, copy.data, 16);
    } else {
        emulator::copies[emulator::current].push_back(copy);
    }
}
inline void wait_for_copies() {
    for (const emulator::Copy& copy : emulator::copies[emulator::current]) memcpy(copy.target, copy.data, 16);
    emulator::copies[emulator::current].clear();
}
inline void store_passing(void* place, Words value) { *(Words*)place = value; }

inline void store_if(bool valid, void* place, word value) {
    if (valid) *(word*)place = value;
}

inline float exchanged(float value, int bit) {
    static float values[1024];
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
    static const word* pieces[1024];
    pieces[current] = (const word*)piece;
    sync_warp();
    const auto own = [&](int matrix) { return pieces[warp() * WARP + matrix * 8 + lane() / 4][lane() % 4]; };
    const Words values = {own(0), own(1), own(2), own(3)};
    sync_warp();
    return values;
}
