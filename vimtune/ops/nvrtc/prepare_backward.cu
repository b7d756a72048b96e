// What the gradients of the scan's inputs mean for x: back through dt_proj, x_proj, SiLU and the convolutions of both
// directions, which are added.
//
//     gp_t = (sum over channel blocks of partial_BC_t | grad_delta_t dt)            gradient of B | C | dt_r
//     gc_t = (grad_u_t + gp_t proj) silu'(conv(x)_t + bias)                         gradient of the convolution
//     grad_x_t = sum_j f0[K-1-j] gc0_{t+j} + f1[K-1-j] gc1_{t-j}                    direction 0 looks back, 1 ahead
//
// A block owns some tokens of one image and all channels, of both directions. The gradients gc that its tokens need
// are those of ROWS tokens, K - 1 of them belonging to the next block (direction 0) or to the one before (direction 1),
// which computes them too. grad_u of these rows is copied to shared memory asynchronously while some warps
// multiply grad_delta by dt and others add up partial_BC. After one barrier each warp goes on alone with 64
// channels: adds gp proj to its rows on the matrix units, and then walks them in the order of tokens, a lane with two
// channels. One window of K rows of x serves both directions: at x_t it ends in token t of direction 0 and
// begins with token t - K + 1 of direction 1.
//
// Compile-time constants: WIDTH (E), COLUMNS (P: B | C | dt_r, the latter padded), FILTER (K), BLOCKS (of partial_BC),
// ROWS (16 or 32), FP16 (activations are fp16, otherwise bf16), KEEP (write gp and gc).
// Shapes, all contiguous unless said otherwise, with W = E rounded up to a multiple of 64 and zeros in between, and
// the direction as first index: grad_u, grad_delta, grad_conv (2, B, L, E), partial_BC (2, BLOCKS, B, L, 32) fp32,
// x and grad_x (B, L, E) with rows 2 E apart, filters (2, K, W) fp32, whose row K - 1 belongs to the token itself,
// conv_bias (2, W) fp32, proj_t (2, W, P), dt_t (2, P - 32, W), grad_projections (2, B, L, P).

struct alignas(8) HalfWords { word x, y; };   // half of Words

constexpr int VECTORS = 32;   // columns of B | C
constexpr int RANK = COLUMNS - VECTORS;
constexpr int PADDED = (WIDTH + 63) / 64 * 64;
constexpr int WARPS = PADDED / 64;
constexpr int HALO = FILTER - 1;
constexpr int GROUP = 4;   // rows of x that are on their way
constexpr float LOG2E = 1.4426950408889634f;

__device__ inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
__device__ inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }

__device__ inline float silu_slope(float x) {
    const float gate = reciprocal(1.0f + exp2_fast(-LOG2E * x)), silu = x * gate;
    return gate + (silu - silu * gate);
}

// Which tokens a block has. Row 0 of direction 0 is the first token, row HALO that of direction 1.
struct Place {
    int image, batch, tokens, first, count;

    __device__ Place(int batch, int tokens, int most)
        : image(blockIdx.y), batch(batch), tokens(tokens), first(blockIdx.x * most), count(min(most, tokens - first)) {}
    __device__ int rows() const { return count + HALO; }
    __device__ int token(int direction, int row) const { return first + row - direction * HALO; }
    __device__ bool exists(int direction, int row) const {
        const int at = token(direction, row);
        return row < rows() && at >= 0 && at < tokens;
    }
    // Whether the token is this block's and not its neighbour's.
    __device__ bool owns(int direction, int row) const {
        const int index = row - direction * HALO;
        return (unsigned)index < (unsigned)count;
    }
    // Index of a token of this image among those of all images.
    __device__ long index(int token) const { return (long)image * tokens + token; }
    // The same where directions follow each other.
    __device__ long index(int direction, int row) const {
        return (long)direction * batch * tokens + index(token(direction, row));
    }
};

// One direction's rows in shared memory. In odd rows the halves of each 128 bytes change places: then eight
// lanes that access four pieces of 16 bytes in each of two rows find them in different banks.
struct Tile {
    static constexpr int BYTES = ROWS * PADDED * 2;
    char* memory;

    __device__ Tile(char* shared, int direction) : memory(shared + direction * BYTES) {}
    // The word, or the 16 bytes, that begin with this channel.
    __device__ void* at(int row, int channel) const {
        return memory + row * PADDED * 2 + (channel * 2 ^ row % 2 * 64);
    }
};

// gp of one direction in shared memory, in the order in which the matrix units take it: four words of a lane are
// columns 4 part to 4 part + 3 of 16, in row r = lane / 4 and in row r + 8 of 16 rows, with part = lane % 4.
struct Projections {
    static constexpr int BYTES = ROWS * COLUMNS * 2;
    char* memory;

    __device__ Projections(char* shared, int direction) : memory(shared + 2 * Tile::BYTES + direction * BYTES) {}
    __device__ Words values(int row, int column) const {
        return *((const Words*)memory + (row / 16 * (COLUMNS / 16) + column / 16) * 32 + lane());
    }
    __device__ word& at(int row, int column) const {
        const int group = row / 16 * (COLUMNS / 16) + column / 16, owner = row % 8 * 4 + column % 16 / 4;
        return *((word*)memory + (group * 32 + owner) * 4 + column % 4 / 2 * 2 + row % 16 / 8);
    }
};

constexpr int SHARED = 2 * (Tile::BYTES + Projections::BYTES);
constexpr int FIT_SHARED = 227 * 1024 / (SHARED + 1024), FIT_REGISTERS = 65536 / (WARPS * 32 * 80);
constexpr int FIT = FIT_SHARED < FIT_REGISTERS ? FIT_SHARED : FIT_REGISTERS;
constexpr int MAX_BLOCKS = FIT < 1 ? 1 : FIT > 16 ? 16 : FIT;   // on a multiprocessor

// Start to copy this warp's channels of grad_u. Rows of tokens that do not exist become zeros.
__device__ inline void copy_rows(const Place& at, int direction, Tile tile, const half_word* grad_u) {
    const int channel = warp() * 64 + lane() % 8 * 8;
#pragma unroll
    for (int row = lane() / 8; row < ROWS; row += 4) {
        const half_word* source = grad_u + at.index(direction, row) * WIDTH + channel;
        copy_async(tile.at(row, channel), source, channel < WIDTH && at.exists(direction, row));
    }
}

// B | C of four rows: partial sums added up, a lane four columns of a row.
__device__ inline void add_blocks(
    const Place& at, int direction, int row, Projections to, const float* partial_BC
) {
    const int column = lane() % 8 * 4;
    row += lane() / 8;
    Quad total = {0.0f, 0.0f, 0.0f, 0.0f};
    if (at.exists(direction, row)) {
        const long stride = (long)at.batch * at.tokens * VECTORS;   // of blocks
        const float* source = partial_BC + direction * BLOCKS * stride + at.index(at.token(direction, row)) * VECTORS;
#pragma unroll 8
        for (int block = 0; block < BLOCKS; block++) {
            const Quad more = *(const Quad*)(source + block * stride + column);
            total = {total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w};
        }
    }
    to.at(row, column) = rounded({total.x, total.y});
    to.at(row, column + 2) = rounded({total.z, total.w});
}

// dt_r of 16 rows: grad_delta (16 x E) dt (E x RANK). Of each 32 channels a lane takes eight in a row.
__device__ inline void project_steps(
    const Place& at, int direction, int row, Projections to, const half_word* grad_delta, const half_word* dt_t
) {
    const int first = lane() % 4 * 8;
    row += lane() / 4;
    const bool upper = at.exists(direction, row), lower = at.exists(direction, row + 8);
    // A row that does not exist is any other until it is written as zeros.
    const half_word* any = grad_delta + at.index(direction, direction * HALO) * WIDTH + first;
    const half_word* source0 = upper ? grad_delta + at.index(direction, row) * WIDTH + first : any;
    const half_word* source1 = lower ? grad_delta + at.index(direction, row + 8) * WIDTH + first : any;
    const half_word* weight = dt_t + (direction * RANK + lane() / 4) * PADDED + first;
    const Words zero = {0, 0, 0, 0};
    Quad sums[RANK / 8];
    for (int k = 0; k < RANK / 8; k++) sums[k] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int channel = 0; channel < PADDED; channel += 32) {
        const bool live = WIDTH == PADDED || channel + first < WIDTH;
        const Words p = live ? *(const Words*)(source0 + channel) : zero;
        const Words q = live ? *(const Words*)(source1 + channel) : zero;
#pragma unroll
        for (int k = 0; k < RANK / 8; k++) {
            const Words w = *(const Words*)(weight + k * 8 * PADDED + channel);
            multiply_add(sums[k], {p.x, q.x, p.y, q.y}, w.x, w.y);
            multiply_add(sums[k], {p.z, q.z, p.w, q.w}, w.z, w.w);
        }
    }
    for (int k = 0; k < RANK / 8; k++) {
        const int column = VECTORS + k * 8 + lane() % 4 * 2;
        to.at(row, column) = upper ? rounded({sums[k].x, sums[k].y}) : 0;
        to.at(row + 8, column) = lower ? rounded({sums[k].z, sums[k].w}) : 0;
    }
}

// tile += gp (ROWS x P) proj (P x 32 channels). Which channel is which column of a product is chosen such that a lane
// gets eight channels in a row.
__device__ inline void spread(int direction, int channel, Tile tile, Projections from, const half_word* proj_t) {
    const int row = lane() / 4, part = lane() % 4, own = channel + part * 8;
    const half_word* weight =
        proj_t + ((long)direction * PADDED + channel + row / 2 * 8 + row % 2) * COLUMNS + part * 4;
    Quad sums[ROWS / 16][4];
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) {
        const Words upper = *(const Words*)tile.at(m * 16 + row, own), lower = *(const Words*)tile.at(m * 16 + row + 8, own);
        const word up[4] = {upper.x, upper.y, upper.z, upper.w}, low[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Pair p = activation(up[j]), q = activation(low[j]);
            sums[m][j] = {p.a, p.b, q.a, q.b};
        }
    }
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16) {
        Words values[ROWS / 16];
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) values[m] = from.values(m * 16, column);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const HalfWords w = *(const HalfWords*)(weight + j * 2 * COLUMNS + column);
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) multiply_add(sums[m][j], values[m], w.x, w.y);
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) {
        word up[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            up[j] = rounded({sums[m][j].x, sums[m][j].y});
            low[j] = rounded({sums[m][j].z, sums[m][j].w});
        }
        *(Words*)tile.at(m * 16 + row, own) = {up[0], up[1], up[2], up[3]};
        *(Words*)tile.at(m * 16 + row + 8, own) = {low[0], low[1], low[2], low[3]};
    }
}

// The last rows that a walk has seen.
struct Window {
    Pair rows[FILTER];

    __device__ Window() {
        for (int k = 0; k < FILTER; k++) rows[k] = {0.0f, 0.0f};
    }
    __device__ void push(Pair row) {
#pragma unroll
        for (int k = 0; k < HALO; k++) rows[k] = rows[k + 1];
        rows[HALO] = row;
    }
};

struct Filter {
    Pair taps[FILTER], bias;

    __device__ Filter(int direction, int channel, const float* filters, const float* conv_bias) {
        for (int k = 0; k < FILTER; k++) {
            taps[k] = *(const Pair*)(filters + (direction * FILTER + k) * PADDED + channel);
        }
        bias = *(const Pair*)(conv_bias + direction * PADDED + channel);
    }
    // The last tap times the last row, or the first one.
    __device__ Pair straight(const Window& window, Pair total) const {
#pragma unroll
        for (int k = 0; k < FILTER; k++) total = total + taps[k] * window.rows[k];
        return total;
    }
    __device__ Pair reversed(const Window& window, Pair total) const {
#pragma unroll
        for (int k = 0; k < FILTER; k++) total = total + taps[HALO - k] * window.rows[k];
        return total;
    }
};

// Two channels of x, in the order of tokens, GROUP of them on their way.
struct Inputs {
    const half_word* next;
    int left;
    word ahead[GROUP];

    __device__ Inputs(const half_word* row, int tokens) : next(row), left(tokens) { fetch(); }
    __device__ void fetch() {
#pragma unroll
        for (int k = 0; k < GROUP; k++) ahead[k] = k < left ? *(const word*)(next + k * 2 * WIDTH) : 0;
        next += GROUP * 2 * WIDTH;
        left -= GROUP;
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, MAX_BLOCKS) prepare_backward(
    const half_word* grad_u, const half_word* grad_delta, const float* partial_BC, const half_word* x,
    const float* filters, const float* conv_bias, const half_word* proj_t, const half_word* dt_t, half_word* grad_x,
    half_word* grad_projections, half_word* grad_conv, int batch, int tokens, int most
) {
    const Place at(batch, tokens, most);
    char* shared = launched_shared();
    const Tile tile0(shared, 0), tile1(shared, 1);
    copy_rows(at, 0, tile0, grad_u);
    copy_rows(at, 1, tile1, grad_u);
    constexpr int PRODUCTS = 2 * (ROWS / 16), SUMS = 2 * (ROWS / 4);
    for (int unit = warp(); unit < PRODUCTS; unit += WARPS) {
        const int direction = unit % 2;
        project_steps(at, direction, unit / 2 * 16, {shared, direction}, grad_delta, dt_t);
    }
    constexpr int BUSY = WARPS > PRODUCTS ? PRODUCTS : 0;   // warps with a product leave the sums to the others
#pragma unroll 2
    for (int unit = warp() - BUSY; unit < SUMS; unit += WARPS - BUSY) {
        if (unit < 0) break;
        const int direction = unit % 2;
        add_blocks(at, direction, unit / 2 * 4, {shared, direction}, partial_BC);
    }
    sync_block();
#if KEEP
    for (int k = warp() * 32 + lane(); k < ROWS * COLUMNS; k += WARPS * 32) {   // words of both directions
        const int direction = k / (ROWS * COLUMNS / 2), row = k / (COLUMNS / 2) % ROWS, column = k % (COLUMNS / 2) * 2;
        if (at.owns(direction, row)) {
            *(word*)(grad_projections + at.index(direction, row) * COLUMNS + column) =
                Projections(shared, direction).at(row, column);
        }
    }
#endif
    const int channel = warp() * 64 + lane() * 2;
    const bool live = channel < WIDTH;
    const half_word* row_x = x + at.index(at.first) * 2 * WIDTH + channel;
    Inputs inputs(row_x, live ? min(at.rows(), tokens - at.first) : 0);
    wait_for_copies();
    sync_warp();
#pragma unroll 1
    for (int part = 0; part < 4; part++) {
        const int direction = part / 2;
        spread(direction, warp() * 64 + part % 2 * 32, {shared, direction}, {shared, direction}, proj_t);
    }
    sync_warp();
    if (!live) return;

    const Filter filter0(0, channel, filters, conv_bias), filter1(1, channel, filters, conv_bias);
    Window seen, grads0, grads1;
    for (int k = HALO; k > 0; k--) {
        seen.push(activation(k <= at.first ? *(const word*)(row_x - k * 2 * WIDTH) : 0));
    }
    half_word* out = grad_x + at.index(at.first - HALO) * 2 * WIDTH + channel;
#if KEEP
    half_word *out0 = grad_conv + at.index(0, 0) * WIDTH + channel, *out1 = grad_conv + at.index(1, 0) * WIDTH + channel;
#endif
#pragma unroll 1
    for (int base = 0; base < at.rows(); base += GROUP) {
        Pair arrived[GROUP];
#pragma unroll
        for (int k = 0; k < GROUP; k++) arrived[k] = activation(inputs.ahead[k]);
        inputs.fetch();
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const int row = base + k;
            seen.push(arrived[k]);
            const Pair y0 = filter0.straight(seen, filter0.bias), y1 = filter1.reversed(seen, filter1.bias);
            const Pair slope0 = {silu_slope(y0.a), silu_slope(y0.b)}, slope1 = {silu_slope(y1.a), silu_slope(y1.b)};
            grads0.push(activation(*(const word*)tile0.at(row, channel)) * slope0);
            grads1.push(activation(*(const word*)tile1.at(row, channel)) * slope1);
            const Pair total = filter1.straight(grads1, filter0.reversed(grads0, {0.0f, 0.0f}));
            if (at.owns(1, row)) *(word*)(out + k * 2 * WIDTH) = rounded(total);
#if KEEP
            if (at.owns(0, row)) *(word*)(out0 + k * WIDTH) = rounded(grads0.rows[HALO]);
            if (at.owns(1, row)) *(word*)(out1 + k * WIDTH) = rounded(grads1.rows[HALO]);
#endif
        }
        out += GROUP * 2 * WIDTH;
#if KEEP
        out0 += GROUP * WIDTH;
        out1 += GROUP * WIDTH;
#endif
    }
}
