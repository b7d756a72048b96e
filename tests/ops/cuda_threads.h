// The blocks, threads and barriers of cuda_on_cpu.cpp, as cuda_on_cpu.h gives them to kernels.

#define VISIBLE __attribute__((visibility("default")))

namespace emulator {

constexpr int WARP = 32;
constexpr int MOST_THREADS = 1024;   // of a block
constexpr int COPIED = 16;           // bytes that an asynchronous copy takes

struct Index { int x, y, z; };

extern VISIBLE Index blockIdx, gridDim;
extern VISIBLE int current;            // which thread of the block runs
extern VISIBLE char shared_memory[];

// Runs `body(arguments)` in every thread of every block.
VISIBLE void run_grid(Index grid, int num_threads, void (*body)(void*), void* arguments);

VISIBLE void wait_for_warp();
VISIBLE void wait_for_block();

// Copies `data` to `target`, at the latest when the thread waits for its copies.
VISIBLE void copy(void* target, const char* data);
VISIBLE void wait_for_copies();

}  // namespace emulator
