// What comes before the scan: u = SiLU(conv(x)) in both directions, B | C | dt_r = x_proj(u) and the time steps
// softplus(dt_proj(dt_r)). A block owns up to ROWS tokens of one image with all channels:
//
//   1. a thread owns two neighbouring channels and walks the tokens, so every x is read once for both directions;
//   2. the matrix units multiply the rows of u, now in shared memory, with x_proj (not if B | C | dt_r are known);
//   3. and those of dt_r with dt_proj.
//
// Compile-time constants: WIDTH (E, a multiple of 8), COLUMNS (P = 2 N + padded rank), FILTER (K), ROWS (16 or 32), FP16,
// PROJECT (compute `projections`, otherwise read them). Shapes, contiguous unless said otherwise, W = E rounded up to 64:
// x (B, L, E) with rows 2 E apart, u, delta (2, B, L, E), projections (2, B, L, P), and of `pack_weights`
// filters (2, K, W), conv_bias, dt_bias (2, W) fp32, proj (2, P, W), proj_t (2, W, P), dt (2, W, R), dt_t (2, R, W).

constexpr int THREADS = PADDED / 2;
constexpr int WARPS = THREADS / 32;
constexpr int PITCH = PADDED + 4;        // words of two rows of u in shared memory: lanes meet different banks
constexpr int RANK_PITCH = RANK + 8;
constexpr float LARGEST_FP16 = 65504.0f;

// log(1 + e^x), accurate also where e^x is small, which is where trained time steps live.
__device__ inline float softplus(float x) {
    const float power = exp2_fast(LOG2E * x);
    const float series = power * (1.0f - power * (0.5f - power * (0.33333334f - power * 0.25f)));
    const float small = power < 0.015f ? series : LN2 * log2_fast(1.0f + power);
    return x > 20.0f ? x : small;
}

__device__ inline half_word low(float value) { return (half_word)rounded({value, 0.0f}); }

// One value of each packed weight a thread: channel blockIdx.x * 64 + threadIdx, row blockIdx.y of the widest matrix.
extern "C" __global__ void __launch_bounds__(64) pack_weights(
    const float* conv0, const float* conv1, const float* conv_bias0, const float* conv_bias1, const float* x_proj0,
    const float* x_proj1, const float* dt_proj0, const float* dt_proj1, const float* dt_bias0, const float* dt_bias1,
    float* filters, float* conv_bias, half_word* proj, half_word* proj_t, half_word* dt, half_word* dt_t,
    float* dt_bias, int rank, int has_bias
) {
    const int direction = blockIdx.y / COLUMNS, row = blockIdx.y % COLUMNS;
    const int channel = blockIdx.x * 64 + warp() * 32 + lane(), at = direction * PADDED + channel;
    const bool live = channel < WIDTH;
    const float* x_proj = direction ? x_proj1 : x_proj0;
    const float* dt_proj = direction ? dt_proj1 : dt_proj0;

    // x_proj has the rows dt_r | B | C.
    const int source = row < 2 * N ? rank + row : row - 2 * N;
    const bool used = live && (row < 2 * N || source < rank);
    const half_word value = low(used ? x_proj[source * WIDTH + channel] : 0.0f);
    proj[(direction * COLUMNS + row) * PADDED + channel] = value;
    proj_t[at * COLUMNS + row] = value;
    if (row < RANK) {
        const half_word step = low(live && row < rank ? dt_proj[channel * rank + row] : 0.0f);
        dt[at * RANK + row] = step;
        dt_t[(direction * RANK + row) * PADDED + channel] = step;
    }
    if (row < FILTER) {
        const float tap = live ? (direction ? conv1 : conv0)[channel * FILTER + row] : 0.0f;
        filters[(direction * FILTER + row) * PADDED + channel] = tap;
    }
    if (row == 0) {
        conv_bias[at] = live && has_bias ? (direction ? conv_bias1 : conv_bias0)[channel] : 0.0f;
        dt_bias[at] = live ? (direction ? dt_bias1 : dt_bias0)[channel] : 0.0f;
    }
}

// Where the word `pair` of row `r` of u lies in shared memory: rows r and r + 8 are interleaved, as the matrix units
// take them.
__device__ inline int interleaved(int r, int pair) {
    return (r / 16 * 8 + r % 8) * PITCH + pair / 2 * 4 + pair % 2 * 2 + r / 8 % 2;
}

struct Tile {
    int image, first, rows, tokens;

    __device__ Tile(int tokens, int rows) : image(blockIdx.y), first(blockIdx.x * rows), tokens(tokens) {
        this->rows = min(rows, tokens - first);
    }
    // Row of token `first + r` among those of a direction.
    __device__ long row(int direction, int batch, int r) const {
        return ((long)direction * batch + image) * tokens + first + r;
    }
};

__device__ inline Pair convolved(const Pair (&filter)[FILTER], Pair bias, const word* x, int ahead) {
    Pair sum = bias;
#pragma unroll
    for (int j = 0; j < FILTER; j++) {
        sum = sum + filter[FILTER - 1 - j] * activation(x[j * ahead]);
    }
    return sum * sigmoid(sum);
}

// Phase 1: u of both directions, to memory and into `us` (2, ROWS / 2, PITCH).
__device__ inline void convolve(
    const Tile& tile, const half_word* x, const float* filters, const float* conv_bias, half_word* u, word* us,
    int batch
) {
    constexpr int HALO = FILTER - 1;
    const int channel = 2 * (warp() * 32 + lane());
    const bool live = channel < WIDTH;
    const half_word* source = x + (long)tile.image * tile.tokens * 2 * WIDTH + channel;
    word xs[ROWS + 2 * HALO];
#pragma unroll
    for (int k = 0; k < ROWS + 2 * HALO; k++) {
        const int token = tile.first + k - HALO;
        const bool inside = live && token >= 0 && token < tile.tokens && k < tile.rows + 2 * HALO;
        xs[k] = inside ? *(const word*)(source + (long)token * 2 * WIDTH) : 0;
    }
    Pair taps[2][FILTER], bias[2];
    for (int d = 0; d < 2; d++) {
        for (int j = 0; j < FILTER; j++) taps[d][j] = *(const Pair*)(filters + (d * FILTER + j) * PADDED + channel);
        bias[d] = *(const Pair*)(conv_bias + d * PADDED + channel);
    }
    half_word *row0 = u + tile.row(0, batch, 0) * WIDTH + channel, *row1 = u + tile.row(1, batch, 0) * WIDTH + channel;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= tile.rows) break;
        const word u0 = rounded(convolved(taps[0], bias[0], xs + r + HALO, -1));
        const word u1 = rounded(convolved(taps[1], bias[1], xs + r + HALO, 1));
        if (live) {
            *(word*)(row0 + r * WIDTH) = u0;
            *(word*)(row1 + r * WIDTH) = u1;
        }
        if (PROJECT) {
            us[interleaved(r, channel / 2)] = live ? u0 : 0;
            us[ROWS / 2 * PITCH + interleaved(r, channel / 2)] = live ? u1 : 0;
        }
    }
}

// Phase 2: x_proj of `us`, to memory and, what of it is dt_r, into `low_rank` (2, ROWS, RANK_PITCH).
__device__ inline void project(
    const Tile& tile, const word* us, const half_word* proj, half_word* projections, half_word* low_rank, int batch
) {
    const int g = lane() / 4, q = lane() % 4;
    for (int unit = warp(); unit < 2 * COLUMNS / 8; unit += WARPS) {
        const int direction = unit / (COLUMNS / 8), column = unit % (COLUMNS / 8) * 8;
        const half_word* weights = proj + (direction * COLUMNS + column + g) * PADDED + 8 * q;
        const word* rows = us + (direction * ROWS / 2 + g) * PITCH + 8 * q;
        Quad sums[ROWS / 16];
        for (int m = 0; m < ROWS / 16; m++) sums[m] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
        for (int k = 0; k < PADDED; k += 32) {   // a lane takes 8 neighbours of the 32, in both factors
            const Words w = *(const Words*)(weights + k);
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) {
                const Words* values = (const Words*)(rows + m * 8 * PITCH + k);
                multiply_add(sums[m], values[0], w.x, w.y);
                multiply_add(sums[m], values[1], w.z, w.w);
            }
        }
        for (int m = 0; m < ROWS / 16; m++) {
            for (int half = 0; half < 2; half++) {
                const int r = m * 16 + half * 8 + g;
                const word value = rounded(half ? Pair{sums[m].z, sums[m].w} : Pair{sums[m].x, sums[m].y});
                half_word* row = projections + tile.row(direction, batch, r) * COLUMNS;
                if (r < tile.rows) *(word*)(row + column + 2 * q) = value;
                if (column >= 2 * N) {
                    *(word*)(low_rank + (direction * ROWS + r) * RANK_PITCH + column - 2 * N + 2 * q) = value;
                }
            }
        }
    }
}

// Instead of phase 2: dt_r from memory.
__device__ inline void fetch(const Tile& tile, const half_word* projections, half_word* low_rank, int batch) {
    constexpr int PIECES = RANK / 8;
    for (int k = warp() * 32 + lane(); k < 2 * ROWS * PIECES; k += THREADS) {
        const int direction = k / (ROWS * PIECES), r = k / PIECES % ROWS, piece = k % PIECES * 8;
        if (r >= tile.rows) continue;
        *(Words*)(low_rank + (direction * ROWS + r) * RANK_PITCH + piece) =
            *(const Words*)(projections + tile.row(direction, batch, r) * COLUMNS + 2 * N + piece);
    }
}

// Phase 3: time steps from `low_rank`. The columns of the products are permuted such that a lane gets 8 neighbours.
__device__ inline void time_steps(
    const Tile& tile, const half_word* low_rank, const half_word* dt, const float* dt_bias, half_word* delta, int batch
) {
    const int g = lane() / 4, q = lane() % 4;
    for (int unit = 0; unit < 4; unit++) {
        const int direction = unit / 2, base = warp() * 64 + unit % 2 * 32;
        const half_word* rows = low_rank + (direction * ROWS + g) * RANK_PITCH + 2 * q;
        const half_word* weights = dt + (direction * PADDED + base + g / 2 * 8 + g % 2) * RANK + 2 * q;
        Quad sums[ROWS / 16][4];
        for (int m = 0; m < ROWS / 16; m++)
            for (int j = 0; j < 4; j++) sums[m][j] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < RANK; k += 16) {
            word picks[4][2];
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 2; i++) picks[j][i] = *(const word*)(weights + j * 2 * RANK + k + 8 * i);
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) {
                const half_word* place = rows + m * 16 * RANK_PITCH + k;
                const Words values = {
                    *(const word*)place, *(const word*)(place + 8 * RANK_PITCH), *(const word*)(place + 8),
                    *(const word*)(place + 8 * RANK_PITCH + 8)
                };
                for (int j = 0; j < 4; j++) multiply_add(sums[m][j], values, picks[j][0], picks[j][1]);
            }
        }
        const int channel = base + 8 * q;
        const Quad b0 = *(const Quad*)(dt_bias + direction * PADDED + channel);
        const Quad b1 = *(const Quad*)(dt_bias + direction * PADDED + channel + 4);
        const Pair bias[4] = {{b0.x, b0.y}, {b0.z, b0.w}, {b1.x, b1.y}, {b1.z, b1.w}};
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = m * 16 + half * 8 + g;
                if (r >= tile.rows || channel >= WIDTH) continue;
                word steps[4];
                for (int j = 0; j < 4; j++) {
                    const Quad sum = sums[m][j];
                    const float a = softplus((half ? sum.z : sum.x) + bias[j].a);
                    const float b = softplus((half ? sum.w : sum.y) + bias[j].b);
                    steps[j] = to_fp16({fminf(a, LARGEST_FP16), fminf(b, LARGEST_FP16)});
                }
                *(Words*)(delta + tile.row(direction, batch, r) * WIDTH + channel) =
                    Words{steps[0], steps[1], steps[2], steps[3]};
            }
        }
    }
}

// Grid: tiles of `rows` tokens, images. Shared memory: `us` if PROJECT, then `low_rank`.
extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const half_word* x, const float* filters, const float* conv_bias, const half_word* proj, const half_word* dt,
    const float* dt_bias, half_word* u, half_word* projections, half_word* delta, int batch, int tokens, int rows
) {
    const Tile tile(tokens, rows);
    word* us = (word*)launched_shared();
    half_word* low_rank = (half_word*)(us + (PROJECT ? ROWS * PITCH : 0));
    convolve(tile, x, filters, conv_bias, u, us, batch);
    if (PROJECT) {
        sync_block();
        project(tile, us, proj, projections, low_rank, batch);
    } else {
        fetch(tile, projections, low_rank, batch);
    }
    sync_block();
    time_steps(tile, low_rank, dt, dt_bias, delta, batch);
}
