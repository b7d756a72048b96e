// Sizes of the mixer's kernels. Compile-time constants: STATES (S, of a channel), WIDTH (E, a multiple of 8), COLUMNS (P).

// The number of states with its padding: so many columns of a row have B, and as many C, zeros behind the last state.
// Where states lie side by side in registers nothing is padded, so that padding costs no arithmetic.
constexpr int N = (STATES + 7) / 8 * 8;
// The rank of the time step with its padding: the other columns of a row hold B | C.
constexpr int RANK = COLUMNS - 2 * N;
// W: packed weights are padded to whole tiles of 64 channels.
constexpr int PADDED = (WIDTH + 63) / 64 * 64;
