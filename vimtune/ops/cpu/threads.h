// This spreads work items over threads. Every item owns what it writes, so results depend neither on the number
// of threads nor on which thread takes which item.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// A TeamLauncher is the entry point of the OpenMP runtime that torch itself has loaded (GOMP_parallel), or null.
// Borrowing its threads matters: after each of its own regions they spin for milliseconds, and
// threads of ours would have to share the cores with them.
typedef void (*TeamLauncher)(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);

// Decays underflow all the time, and arithmetic on denormals is many times slower. The switch is per
// thread and put back at the end: nobody else's arithmetic changes.
class FlushDenormals {
#if defined(__SSE__)
    unsigned saved = _mm_getcsr();

  public:
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;

  public:
    FlushDenormals() {
        __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved));
        __asm__ __volatile__("msr fpcr, %0" ::"r"(saved | (uint64_t{1} << 24)));
    }
    ~FlushDenormals() { __asm__ __volatile__("msr fpcr, %0" ::"r"(saved)); }
#else
  public:
    FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, FreeDeleter>;

static inline Buffer allocate(size_t floats) {
    return Buffer(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) / 64 + 1) * 64)));
}

// Runs `body(item, scratch)` for every item below `num_items`. It returns false when memory ran out.
template <class Body>
bool parallel_for(int64_t num_items, int num_threads, TeamLauncher launch, size_t scratch_floats, const Body& body) {
    struct Team {
        std::atomic<int64_t> next{0};
        std::atomic<bool> out_of_memory{false};
        int64_t num_items;
        size_t scratch_floats;
        const Body* body;

        void work() {
            Buffer scratch = allocate(scratch_floats);
            if (!scratch) {
                out_of_memory = true;
                return;
            }
            FlushDenormals guard;
            for (int64_t item; (item = next.fetch_add(1)) < num_items;) (*body)(item, scratch.get());
        }
        static void enter(void* team) { static_cast<Team*>(team)->work(); }
    };
    Team team;
    team.num_items = num_items;
    team.scratch_floats = scratch_floats;
    team.body = &body;
    if (num_threads > num_items) num_threads = static_cast<int>(num_items);

    if (num_threads <= 1) {
        team.work();
    } else if (launch) {
        launch(&Team::enter, &team, static_cast<unsigned>(num_threads), 0);
    } else {
        std::vector<std::thread> helpers;
        try {
            helpers.reserve(num_threads - 1);
            for (int i = 1; i < num_threads; ++i) helpers.emplace_back(&Team::enter, &team);
        } catch (const std::system_error&) {
            // The process may not have more threads: those that started, and this one, do the work.
        }
        team.work();
        for (std::thread& helper : helpers) helper.join();
    }
    // A thread without scratch took no item; the others did them all, unless none had any.
    return !team.out_of_memory || team.next >= num_items;
}
