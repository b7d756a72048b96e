// Sizes of the mixer's kernels. Compile-time constants: WIDTH (E, a multiple of 8), COLUMNS (P).

constexpr int N = 16;                              // states
constexpr int RANK = COLUMNS - 2 * N;              // of the time step, padded; the rest of a row is B | C
constexpr int PADDED = (WIDTH + 63) / 64 * 64;     // W, channels with the padding of packed weights
