// This computes what comes before the scan: u = SiLU(conv(x)) in one direction or both, B | C | dt_r = x_proj(u) and
// the time steps softplus(dt_proj(dt_r)).
//
// A block is one warp, so that some load or store while others calculate. It has ROWS tokens of one image in one
// direction. Of 64 channels at a time, x is copied to shared memory asynchronously; a lane convolves two channels and
// writes u in the place of x. From there the warp stores it, and gives it to the matrix units, which add up x_proj over
// all channels (not if B | C | dt_r are known). Their result is, as it lies in registers, an operand of the product
// with dt_proj.
//
// Compile-time constants: those of sizes.cuh (P = 2 N + padded rank), FILTER (K), FP16, PROJECT
// (compute `projections`, otherwise read them), START (the convolution begins with given inputs, otherwise, and where it
// is not defined, with zeros). Shapes for d directions, contiguous unless said otherwise, W = E
// rounded up to 64: x (B, L, E) with rows 2 E apart, u, delta (d, B, L, E), projections (d, B, L, P), and of
// `pack_weights` filters (d, K, W), conv_bias, dt_bias (d, W) fp32, and matrices in the order in which the matrix units
// take them. `tails` (d, K - 1, W) has the inputs before the first token, in the order of tokens.
// Filters and their biases are packed times -log2(e), which spares the exponential in SiLU a product.

#include "sizes.cuh"

// As many rows as a product of the matrix units has.
constexpr int ROWS = 16;
constexpr int HALO = FILTER - 1;

// Matrices are packed such that what the 32 lanes of a warp load at once, 16 bytes each, lies side by side.
//
// This is the order of the factors of a sum over channels: of 32 channels a lane has eight, and of 16 rows one in each
// of two products.
__device__ inline int summed_index(int direction, int channel, int row, int rows, int part, int element) {
    const int product = row / 16 * 2 + row % 4 / 2, lane = (row % 16 / 4 * 2 + row % 2) * 4 + part;
    return (((direction * (PADDED / 32) + channel / 32) * (rows / 8) + product) * 32 + lane) * 8 + element;
}
// This is the order of the factors of results with channels: of 32 channels a lane has one in each of four products,
// and of 16 columns four neighbours.
__device__ inline int spread_index(int direction, int channel, int column, int columns) {
    const int product = channel % 8 / 2, lane = (channel % 32 / 8 * 2 + channel % 2) * 4 + column % 16 / 4;
    const int load = ((direction * (PADDED / 32) + channel / 32) * (columns / 16) + column / 16) * 2 + product / 2;
    return (load * 32 + lane) * 8 + product % 2 * 4 + column % 4;
}

// A thread packs one value of each weight: that of channel blockIdx.x * 64 + threadIdx and row blockIdx.y of the widest
// matrix, whose rows in all directions the grid has. Weights of a direction that it does not have are not read.
extern "C" __global__ void __launch_bounds__(64) pack_weights(
    const float* conv0, const float* conv1, const float* conv_bias0, const float* conv_bias1, const float* x_proj0,
    const float* x_proj1, const float* dt_proj0, const float* dt_proj1, const float* dt_bias0, const float* dt_bias1,
    float* filters, float* conv_bias, half_word* proj, half_word* proj_t, half_word* dt, half_word* dt_t,
    float* dt_bias,
#if START
    const float* tail0, const float* tail1, half_word* tails,
#endif
    int rank, int has_bias
) {
    const int direction = blockIdx.y / COLUMNS, row = blockIdx.y % COLUMNS;
    const int channel = blockIdx.x * 64 + warp() * 32 + lane(), at = direction * PADDED + channel;
    const bool live = channel < WIDTH;
    const float* x_proj = direction ? x_proj1 : x_proj0;
    const float* dt_proj = direction ? dt_proj1 : dt_proj0;

    // x_proj has the rows dt_r | B | C, and no padding.
    const int source = row < N ? rank + row : row < 2 * N ? rank + row - (N - STATES) : row - 2 * N;
    const bool used = live && (row < N ? row < STATES : row < 2 * N ? row < N + STATES : source < rank);
    const half_word value = rounded(used ? x_proj[source * WIDTH + channel] : 0.0f);
    // u comes with pairs of neighbours, a gradient of time steps with eight neighbours.
    proj[summed_index(direction, channel, row, COLUMNS, channel % 8 / 2, channel % 32 / 8 * 2 + channel % 2)] = value;
    // Here a lane has columns 2 k, 2 k + 1, 2 k + 8 and 2 k + 9 of 16, as `load_values` has them.
    const int column = row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
    proj_t[spread_index(direction, channel, column, COLUMNS)] = value;
    if (row < RANK) {
        const half_word step = rounded(live && row < rank ? dt_proj[channel * rank + row] : 0.0f);
        dt[spread_index(direction, channel, row, RANK)] = step;
        dt_t[summed_index(direction, channel, row, RANK, channel % 32 / 8, channel % 8)] = step;
    }
    if (row < FILTER) {
        const float tap = live ? (direction ? conv1 : conv0)[channel * FILTER + row] : 0.0f;
        filters[(direction * FILTER + row) * PADDED + channel] = -LOG2E * tap;
    }
#if START
    if (row < HALO) {
        // A tail (E, K - 1) is in the order of its direction.
        const int column = direction ? HALO - 1 - row : row;
        const float value = live ? (direction ? tail1 : tail0)[channel * HALO + column] : 0.0f;
        tails[(direction * HALO + row) * PADDED + channel] = rounded(value);
    }
#endif
    if (row == 0) {
        conv_bias[at] = live && has_bias ? -LOG2E * (direction ? conv_bias1 : conv_bias0)[channel] : 0.0f;
        dt_bias[at] = live ? (direction ? dt_bias1 : dt_bias0)[channel] : 0.0f;
    }
}

// Says whether a channel exists, or is padding.
__device__ inline bool exists(int channel) { return WIDTH == PADDED || channel < WIDTH; }

// Rows are the warp's tokens.
struct Rows {
    // `token` is the first one and `count` their number.
    int direction, token, count;
    // The first token has this index among those of all images and directions.
    long index;

    __device__ Rows(int batch, int tokens) : direction(blockIdx.x), token(blockIdx.y * ROWS) {
        count = min(ROWS, tokens - token);
        index = ((long)direction * batch + blockIdx.z) * tokens + token;
    }
};

// A Tile has 64 channels of these rows and their neighbours in shared memory, with room in between: then the same 16
// bytes of eight rows are in different banks.
struct Tile {
    static constexpr int COPIED = (ROWS + HALO + 3) / 4 * 4, PITCH = 144;
    struct Memory { alignas(16) char bytes[COPIED * PITCH]; };
    char* memory;

    __device__ Tile(Memory& shared) : memory(shared.bytes) {}
    // Gives the place of the word, or of the 16 bytes, that begin with this channel.
    __device__ void* at(int row, int channel) const { return memory + row * PITCH + channel * 2; }
};

// Where a tile is copied, a lane has 16 bytes of each fourth row. They begin with channel `piece`, and `piece_row` is
// the first of the rows.
__device__ inline int piece() { return lane() % 8 * 8; }
__device__ inline int piece_row() { return lane() / 8; }

// Tail says what stands in the place of rows that the image does not have: HALO rows W apart, from token `first` on.
struct Tail {
    const half_word* rows;
    int first;
};

// Starts to copy rows of x, the lane's first one being `source`, of token `token`. Where the image has no token, rows
// come from the tail, or become zeros.
__device__ inline void copy_rows(Tile tile, const half_word* source, int token, int tokens, Tail tail) {
#pragma unroll
    for (int k = 0; k < Tile::COPIED; k += 4) {
        const half_word* row = source + k * 2 * WIDTH;
        bool found = (unsigned)(token + k) < (unsigned)tokens;
#if START
        const int at = token + k - tail.first;
        if ((unsigned)at < (unsigned)HALO) {
            row = tail.rows + at * PADDED;
            found = true;
        }
#endif
        copy_async(tile.at(k + piece_row(), piece()), row, found);
    }
}

// A Filter has the taps of two channels, in the order of tokens.
struct Filter {
    Pair taps[FILTER], bias;

    __device__ Filter(int direction, int channel, const float* filters, const float* conv_bias) {
        const int first = direction * (2 * FILTER - 1), step = 1 - 2 * direction;
        for (int k = 0; k < FILTER; k++) {
            taps[k] = *(const Pair*)(filters + (first + k * step) * PADDED + channel);
        }
        bias = *(const Pair*)(conv_bias + direction * PADDED + channel);
    }
    // Computes SiLU of the convolution of FILTER rows.
    __device__ word operator()(const Pair* x) const {
        Pair sum = bias;
#pragma unroll
        for (int k = 0; k < FILTER; k++) sum = sum + taps[k] * x[k];
        return rounded({silu(sum.a), silu(sum.b)});
    }
    // Computes SiLU of scaled / -log2(e).
    static __device__ float silu(float scaled) { return scaled * reciprocal(-LOG2E - LOG2E * exp2_fast(scaled)); }
};

// Puts u in the place of x. u of row r comes where x of row r was, which no later row needs.
__device__ inline void convolve(int count, Tile tile, const Filter& filter) {
    const int own = lane() * 2;
    Pair window[ROWS + HALO];
#pragma unroll
    for (int k = 0; k < HALO; k++) window[k] = activation(*(const word*)tile.at(k, own));
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r % 4 == 0 && r >= count) break;
        window[r + HALO] = activation(*(const word*)tile.at(r + HALO, own));
        *(word*)tile.at(r, own) = filter(window + r);
    }
}

// Computes sums += u (16 x 64) x_proj (64 x P). Which column of a product is which of P is chosen such that a lane gets
// four of each 16 in a row.
__device__ inline void project(Quad (&sums)[COLUMNS / 8], const Words (&u)[4], const Words* weight) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const Words w = weight[(k * (COLUMNS / 8) + n) * 32];
            multiply_add(sums[n], u[k * 2], w.x, w.y);
            multiply_add(sums[n], u[k * 2 + 1], w.z, w.w);
        }
    }
}

// Columns are a lane's part of two rows of projections: of each 16 columns it has four.
struct Columns {
    half_word *upper, *lower;
    bool upper_exists, lower_exists;

    __device__ Columns(const Rows& rows, half_word* projections) {
        const int row = lane() / 4;
        upper = projections + (rows.index + row) * COLUMNS + lane() % 4 * 4;
        lower = upper + 8 * COLUMNS;
        upper_exists = row < rows.count;
        lower_exists = row + 8 < rows.count;
    }
    // Loads dt_r in the order in which products take values.
    __device__ void fetch(Words (&low_rank)[RANK / 16]) const {
        const HalfWords zero = {0, 0};
#pragma unroll
        for (int k = 0; k < RANK / 16; k++) {
            const HalfWords p = upper_exists ? *(const HalfWords*)(upper + 2 * N + k * 16) : zero;
            const HalfWords q = lower_exists ? *(const HalfWords*)(lower + 2 * N + k * 16) : zero;
            low_rank[k] = {p.x, q.x, p.y, q.y};
        }
    }
    __device__ void store(const Quad (&sums)[COLUMNS / 8], Words (&low_rank)[RANK / 16]) const {
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++) {
            const Quad even = sums[k * 2], odd = sums[k * 2 + 1];
            const HalfWords p = {rounded({even.x, even.y}), rounded({odd.x, odd.y})};
            const HalfWords q = {rounded({even.z, even.w}), rounded({odd.z, odd.w})};
            if (upper_exists) *(HalfWords*)(upper + k * 16) = p;
            if (lower_exists) *(HalfWords*)(lower + k * 16) = q;
            if (k >= N / 8) low_rank[k - N / 8] = {p.x, q.x, p.y, q.y};
        }
    }
};

// StepWeights are what time steps of 32 channels are made with: a lane's factors of the products, and the bias of eight
// channels.
struct StepWeights {
    Words factors[RANK / 16][2];
    Quad bias[2];

    // `channel` is the first of the 32.
    __device__ StepWeights(int direction, int channel, const Words* dt, const float* dt_bias) {
        const int first = direction * PADDED + channel;
        const Words* own = dt + first / 32 * (RANK / 16) * 64 + lane();
#pragma unroll
        for (int k = 0; k < RANK / 16; k++) {
            factors[k][0] = own[k * 64];
            factors[k][1] = own[k * 64 + 32];
        }
        for (int k = 0; k < 2; k++) bias[k] = *(const Quad*)(dt_bias + first + lane() % 4 * 8 + k * 4);
    }
};

// TimeSteps computes the time steps of the rows, 32 channels after 32, of which a lane has eight neighbours. The
// weights of the next ones are on their way meanwhile.
struct TimeSteps {
    const Rows& rows;
    const Words* dt;
    const float* dt_bias;
    half_word* place;
    int base;
    StepWeights next;

    __device__ TimeSteps(const Rows& rows, const Words* dt, const float* dt_bias, half_word* delta)
        : rows(rows), dt(dt), dt_bias(dt_bias), base(0), next(rows.direction, 0, dt, dt_bias) {
        place = delta + (rows.index + lane() / 4) * WIDTH + lane() % 4 * 8;
    }
    __device__ void put(const Words (&low_rank)[RANK / 16]) {
        const StepWeights now = next;
        const bool live = exists(base + lane() % 4 * 8);
        base += 32;
        next = StepWeights(rows.direction, min(base, PADDED - 32), dt, dt_bias);
        const Quad b0 = now.bias[0], b1 = now.bias[1];
        Quad sums[4] = {
            {b0.x, b0.y, b0.x, b0.y}, {b0.z, b0.w, b0.z, b0.w}, {b1.x, b1.y, b1.x, b1.y}, {b1.z, b1.w, b1.z, b1.w}
        };
#pragma unroll
        for (int k = 0; k < RANK / 16; k++) multiply_add(sums, low_rank[k], now.factors[k][0], now.factors[k][1]);
#pragma unroll
        for (int lower = 0; lower < 16; lower += 8) {
            if (lower >= rows.count) break;
            word steps[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Pair sum = lower ? Pair{sums[j].z, sums[j].w} : Pair{sums[j].x, sums[j].y};
                steps[j] = to_finite_fp16({softplus(sum.a), softplus(sum.b)});
            }
            if (lane() / 4 + lower < rows.count && live) {
                store_passing(place + lower * WIDTH, {steps[0], steps[1], steps[2], steps[3]});
            }
        }
        place += 32;
    }
};

constexpr int REGISTERS = PROJECT ? 44 + COLUMNS / 2 + RANK / 4 : 60 + RANK * 3 / 4;
// So many blocks, each of one warp, fit on each quarter of a multiprocessor.
constexpr int FIT = 16384 / (32 * REGISTERS);
constexpr int MAX_BLOCKS = FIT < 1 ? 1 : FIT > 8 ? 32 : 4 * FIT;

// The grid has directions, tiles of ROWS tokens, and images.
extern "C" __global__ void __launch_bounds__(32, MAX_BLOCKS) prepare(
    const half_word* x, const float* filters, const float* conv_bias, const Words* proj, const Words* dt,
    const float* dt_bias, half_word* u, half_word* projections, half_word* delta,
#if START
    const half_word* tails,
#endif
    int batch, int tokens
) {
    const Rows rows(batch, tokens);
    __shared__ Tile::Memory shared;
    const Tile tile(shared);
    // Direction 0 looks back and direction 1 looks ahead.
    const int token = rows.token - (rows.direction ? 0 : HALO) + piece_row();
    const half_word* source = x + ((long)blockIdx.z * tokens + token) * 2 * WIDTH + piece();
#if START
    Tail tail = {tails + rows.direction * HALO * PADDED + piece(), rows.direction ? tokens : -HALO};
#else
    Tail tail = {nullptr, 0};
#endif
    copy_rows(tile, source, token, exists(piece()) ? tokens : 0, tail);

    Filter filter(rows.direction, lane() * 2, filters, conv_bias);
    const Words* weight = proj + rows.direction * (PADDED / 32) * (COLUMNS / 8) * 32 + lane();
    half_word* out = u + (rows.index + piece_row()) * WIDTH + piece();
    const Columns columns(rows, projections);
    Words low_rank[RANK / 16];
#if PROJECT
    Quad sums[COLUMNS / 8];
    for (int n = 0; n < COLUMNS / 8; n++) sums[n] = {0.0f, 0.0f, 0.0f, 0.0f};
#else
    columns.fetch(low_rank);
    TimeSteps steps(rows, dt, dt_bias, delta);
#endif
#pragma unroll 1
    for (int base = 0; base < PADDED; base += 64) {
        wait_for_copies();
        sync_warp();
        convolve(rows.count, tile, filter);
        filter = Filter(rows.direction, min(base + 64, PADDED - 64) + lane() * 2, filters, conv_bias);
        sync_warp();
#pragma unroll
        for (int k = 0; k < ROWS; k += 4) {
            const bool kept = k + piece_row() < rows.count && exists(base + piece());
            if (kept) store_passing(out + k * WIDTH, *(const Words*)tile.at(k + piece_row(), piece()));
        }
        out += 64;
        Words values[4];
        for (int k = 0; k < 4 && PROJECT; k++) values[k] = load_values(tile.at(lane() % 16, k * 16 + lane() / 16 * 8));
        sync_warp();
        source += 64;
        tail.rows += 64;
        if (base + 64 < PADDED) copy_rows(tile, source, token, exists(base + 64 + piece()) ? tokens : 0, tail);
        // Without this the compiler would begin with the products, and the copies would start later.
        sync_warp();
#if PROJECT
        project(sums, values, weight);
        weight += 2 * (COLUMNS / 8) * 32;
#else
#pragma unroll
        for (int half = 0; half < 2; half++) steps.put(low_rank);
#endif
    }
#if PROJECT
    TimeSteps steps(rows, dt, dt_bias, delta);
    columns.store(sums, low_rank);
#pragma unroll 2
    for (int base = 0; base < PADDED; base += 32) steps.put(low_rank);
#endif
}
