// Sizes of the mixer's kernels. Compile-time constants: WIDTH (E, a multiple of 8), COLUMNS (P).

// The number of states of a channel.
constexpr int N = 16;
// The rank of the time step with its padding: the other columns of a row hold B | C.
constexpr int RANK = COLUMNS - 2 * N;
// W: packed weights are padded to whole tiles of 64 channels.
constexpr int PADDED = (WIDTH + 63) / 64 * 64;
