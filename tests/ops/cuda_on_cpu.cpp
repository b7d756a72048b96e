// The threads of CUDA kernels that run on a CPU, to test them where there is no GPU.
//
// The threads of a block are coroutines on one CPU thread, resumed in turn; at a barrier each yields until all
// have arrived, and asynchronous copies take place when they are waited for. So missing waits show as wrong results, and
// missing barriers as results that change when threads and blocks take their turns backwards and copies take place at
// once.

#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda_threads.h"

namespace emulator {

Index blockIdx, gridDim;
int current;

constexpr int GUARD = 4096;
constexpr char UNTOUCHED = 0x5a;
alignas(16) char shared_memory[256 * 1024];
static int shared_bytes;   // that the launch says; what lies behind must stay as it was

constexpr size_t STACK = 256 * 1024;

struct Copy { void* target; char data[COPIED]; };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
    // Waiting is counted, not timed: a barrier has been passed by all once each has arrived as often as the first.
    long arrivals_block, arrivals_warp;
    std::vector<Copy> copies;   // under way
};

// They go from block to block and from kernel to kernel, because making a stack takes longer than most threads run.
static Thread threads[MOST_THREADS];
static int num_threads;    // of them that the block has
static int threads_left;   // that have not ended
static ucontext_t launch;
static bool backwards;
static void (*body)(void*);
static void* arguments;

// Goes on with the next thread that has not ended, or with the launch.
static void yield() {
    const int own = current;
    if (threads_left) {
        do current = (current + (backwards ? num_threads - 1 : 1)) % num_threads;
        while (threads[current].done);
    }
    swapcontext(&threads[own].context, threads_left ? &threads[current].context : &launch);
}

static void wait(long Thread::*arrivals, int first, int last) {
    const long mine = ++(threads[current].*arrivals);
    for (int k = first; k < last;) {
        if (threads[k].*arrivals >= mine || threads[k].done) k++;
        else yield();
    }
}

void wait_for_warp() {
    const int first = current / WARP * WARP;
    wait(&Thread::arrivals_warp, first, std::min(first + WARP, num_threads));
}
void wait_for_block() { wait(&Thread::arrivals_block, 0, num_threads); }

void copy(void* target, const char* data) {
    if (backwards) {
        memcpy(target, data, COPIED);
        return;
    }
    Copy later = {target, {}};
    memcpy(later.data, data, COPIED);
    threads[current].copies.push_back(later);
}
void wait_for_copies() {
    for (const Copy& copy : threads[current].copies) memcpy(copy.target, copy.data, COPIED);
    threads[current].copies.clear();
}

static void run_thread() {
    for (;;) {
        body(arguments);
        threads[current].done = true;
        threads_left--;
        yield();   // and go on with a thread of the next block
    }
}

static void make_ready(Thread& thread) {
    thread.done = false;
    thread.arrivals_block = thread.arrivals_warp = 0;
    thread.copies.clear();
    if (thread.stack) return;
    thread.stack.reset(new char[STACK]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, run_thread, 0);
}

static void run_block() {
    for (int k = 0; k < num_threads; k++) make_ready(threads[k]);
    threads_left = num_threads;
    current = backwards ? num_threads - 1 : 0;
    swapcontext(&launch, &threads[current].context);
}

void run_grid(Index grid, int threads_of_a_block, void (*kernel)(void*), void* its_arguments) {
    body = kernel;
    arguments = its_arguments;
    gridDim = grid;
    num_threads = threads_of_a_block;
    memset(shared_memory + shared_bytes, UNTOUCHED, GUARD);
    const int blocks = grid.x * grid.y * grid.z;
    for (int turn = 0; turn < blocks; turn++) {
        const int block = backwards ? blocks - 1 - turn : turn;
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block();
    }
}

}  // namespace emulator

// What Python calls besides the kernels.

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
