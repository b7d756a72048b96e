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
// ROWS (16 or 32), FP16 (activations are fp16, otherwise bf16), TRAINED (write gp and the gradients of the filters).
// Shapes, all contiguous unless said otherwise, with W = E rounded up to a multiple of 64 and zeros in between, and
// the direction as first index: grad_u, grad_delta (2, B, L, E), partial_BC (2, BLOCKS, B, L, 32) fp32,
// x and grad_x (B, L, E) with rows 2 E apart, filters (2, K, W) fp32, whose row K - 1 belongs to the token itself,
// conv_bias (2, W) fp32, proj_t (2, W, P), dt_t (2, P - 32, W), grad_projections (2, B, L, P), partial_filters (blocks,
// 2, K + 1, W) fp32: gradients of the filters and, last, of the bias, from the tokens of each block.

struct alignas(8) HalfWords { word x, y; };   // half of Words

constexpr int VECTORS = 2 * N;   // columns of B | C
constexpr int WARPS = PADDED / 64;
constexpr int HALO = FILTER - 1;
constexpr int GROUP = 4;   // rows of x that are on their way to a thread

// The slope of SiLU at `scaled` / log2(e).
__device__ inline float silu_slope(float scaled) {
    const float gate = reciprocal(1.0f + exp2_fast(-scaled)), silu = scaled * gate;
    return gate + LN2 * (silu - silu * gate);
}

// The tokens of one direction whose gradients a block computes. Row 0 is the block's first token in direction 0, and
// in direction 1 row HALO is.
struct Rows {
    int token, begin, end, count;   // of row 0; rows from `begin` to `end` are in the image; tokens of the block
    int first;                      // row of the block's first token
    long index;                     // of row 0 among all images and directions

    __device__ Rows(int direction, int batch, int tokens, int most) : first(direction * HALO) {
        token = blockIdx.x * most - first;
        count = min(most, tokens - token - first);
        begin = token < 0 ? -token : 0;
        end = min(count + HALO, tokens - token);
        index = ((long)direction * batch + blockIdx.y) * tokens + token;
    }
    __device__ bool exist(int row) const { return (unsigned)(row - begin) < (unsigned)(end - begin); }
    // Whether the token is this block's and not its neighbour's.
    __device__ bool own(int row) const { return (unsigned)(row - first) < (unsigned)count; }
    // The row, or one that exists, so that it can be read.
    __device__ int readable(int row) const { return exist(row) ? row : begin; }
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
constexpr int REGISTERS = TRAINED ? 112 : 80;
constexpr int FIT_SHARED = 227 * 1024 / (SHARED + 1024), FIT_REGISTERS = 65536 / (WARPS * 32 * REGISTERS);
constexpr int FIT = FIT_SHARED < FIT_REGISTERS ? FIT_SHARED : FIT_REGISTERS;
constexpr int MAX_BLOCKS = FIT < 1 ? 1 : FIT > 16 ? 16 : FIT;   // on a multiprocessor

// Start to copy this warp's channels of grad_u. Rows that are not in the image become zeros.
__device__ inline void copy_rows(const Rows& rows, Tile tile, const half_word* grad_u) {
    const int channel = warp() * 64 + lane() % 8 * 8;
    const half_word* source = grad_u + (rows.index + lane() / 8) * WIDTH + channel;
#pragma unroll
    for (int k = 0; k < ROWS; k += 4) {
        const int row = k + lane() / 8;
        copy_async(tile.at(row, channel), source + k * WIDTH, channel < WIDTH && rows.exist(row));
    }
}

// B | C of eight rows: partial sums added up, a lane four columns of two rows.
__device__ inline void add_blocks(
    const Rows& rows, int direction, int row, long stride, Projections to, const float* partial_BC
) {
    const int column = lane() % 8 * 4, half[2] = {row + lane() / 8, row + lane() / 8 + 4};
    // Blocks come after the direction.
    const float* source = partial_BC + direction * (BLOCKS - 1) * stride + rows.index * VECTORS + column;
    Quad total[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float* next = source + rows.readable(half[h]) * VECTORS;
        total[h] = *(const Quad*)next;
#pragma unroll
        for (int block = 1; block < BLOCKS; block++) total[h] = total[h] + *(const Quad*)(next += stride);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const bool exist = rows.exist(half[h]);
        to.at(half[h], column) = exist ? rounded({total[h].x, total[h].y}) : 0;
        to.at(half[h], column + 2) = exist ? rounded({total[h].z, total[h].w}) : 0;
    }
}

// dt_r of 16 rows: grad_delta (16 x E) dt (E x RANK). Of each 32 channels a lane takes eight in a row.
__device__ inline void project_steps(
    const Rows& rows, int direction, int row, Projections to, const half_word* grad_delta, const half_word* dt_t
) {
    const int first = lane() % 4 * 8, upper = row + lane() / 4, lower = upper + 8;
    const half_word* source = grad_delta + rows.index * WIDTH + first;
    const half_word *source0 = source + rows.readable(upper) * WIDTH, *source1 = source + rows.readable(lower) * WIDTH;
    const half_word* weight = dt_t + (direction * RANK + lane() / 4) * PADDED + first;
    const Words zero = {0, 0, 0, 0};
    Quad sums[RANK / 8];
    for (int k = 0; k < RANK / 8; k++) sums[k] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int channel = 0; channel < PADDED; channel += 32) {
        const bool live = WIDTH == PADDED || channel + first < WIDTH;
        const Words p = live ? *(const Words*)(source0 + channel) : zero;
        const Words q = live ? *(const Words*)(source1 + channel) : zero;
        const Words values0 = {p.x, q.x, p.y, q.y}, values1 = {p.z, q.z, p.w, q.w};
#pragma unroll
        for (int k = 0; k < RANK / 8; k++) {
            const Words w = *(const Words*)(weight + k * 8 * PADDED + channel);
            multiply_add(sums[k], values0, w.x, w.y);
            multiply_add(sums[k], values1, w.z, w.w);
        }
    }
    for (int k = 0; k < RANK / 8; k++) {
        const int column = VECTORS + k * 8 + lane() % 4 * 2;
        to.at(upper, column) = rows.exist(upper) ? rounded({sums[k].x, sums[k].y}) : 0;
        to.at(lower, column) = rows.exist(lower) ? rounded({sums[k].z, sums[k].w}) : 0;
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
        const Words upper = *(const Words*)tile.at(m * 16 + row, own);
        const Words lower = *(const Words*)tile.at(m * 16 + row + 8, own);
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

// Taps and bias times log2(e), which spares the exponential a product.
struct Filter {
    Pair taps[FILTER], bias;

    __device__ Filter(int direction, int channel, const float* filters, const float* conv_bias) {
        for (int k = 0; k < FILTER; k++) {
            taps[k] = LOG2E * *(const Pair*)(filters + (direction * FILTER + k) * PADDED + channel);
        }
        bias = LOG2E * *(const Pair*)(conv_bias + direction * PADDED + channel);
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

// Gradients of taps and bias, `grad` being that of the filter's result.
struct FilterGradients {
    Pair taps[FILTER], bias;

    __device__ FilterGradients() : bias({0.0f, 0.0f}) {
        for (int k = 0; k < FILTER; k++) taps[k] = {0.0f, 0.0f};
    }
    __device__ void straight(const Window& window, Pair grad) {
#pragma unroll
        for (int k = 0; k < FILTER; k++) taps[k] = taps[k] + grad * window.rows[k];
        bias = bias + grad;
    }
    __device__ void reversed(const Window& window, Pair grad) {
#pragma unroll
        for (int k = 0; k < FILTER; k++) taps[HALO - k] = taps[HALO - k] + grad * window.rows[k];
        bias = bias + grad;
    }
    __device__ void store(float* place) const {
        for (int k = 0; k < FILTER; k++) *(Pair*)(place + k * PADDED) = taps[k];
        *(Pair*)(place + FILTER * PADDED) = bias;
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
    half_word* grad_projections, float* partial_filters, int batch, int tokens, int most
) {
    const Rows rows0(0, batch, tokens, most), rows1(1, batch, tokens, most);
    char* shared = launched_shared();
    const Tile tile0(shared, 0), tile1(shared, 1);
    copy_rows(rows0, tile0, grad_u);
    copy_rows(rows1, tile1, grad_u);
    constexpr int PRODUCTS = 2 * (ROWS / 16), SUMS = 2 * (ROWS / 8);
    for (int unit = warp(); unit < PRODUCTS; unit += WARPS) {
        const int direction = unit % 2;
        const Rows rows(direction, batch, tokens, most);
        project_steps(rows, direction, unit / 2 * 16, {shared, direction}, grad_delta, dt_t);
    }
    constexpr int BUSY = WARPS > PRODUCTS ? PRODUCTS : 0;   // warps with a product leave the sums to the others
    const int idle = warp() - BUSY;
    for (int unit = idle < 0 ? SUMS : idle; unit < SUMS; unit += WARPS - BUSY) {
        const int direction = unit % 2;
        const Rows rows(direction, batch, tokens, most);
        const long stride = (long)batch * tokens * VECTORS;
        add_blocks(rows, direction, unit / 2 * 8, stride, {shared, direction}, partial_BC);
    }
    sync_block();
#if TRAINED
    for (int k = warp() * 32 + lane(); k < ROWS * COLUMNS; k += WARPS * 32) {   // words of both directions
        const int direction = k / (ROWS * COLUMNS / 2), row = k / (COLUMNS / 2) % ROWS, column = k % (COLUMNS / 2) * 2;
        const Rows rows(direction, batch, tokens, most);
        if (rows.own(row)) {
            *(word*)(grad_projections + (rows.index + row) * COLUMNS + column) =
                Projections(shared, direction).at(row, column);
        }
    }
#endif
    const int channel = warp() * 64 + lane() * 2;
    const bool live = channel < WIDTH;
    const half_word* row_x = x + rows0.index * 2 * WIDTH + channel;
    Inputs inputs(row_x, live ? rows0.end : 0);
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
        seen.push(activation(k <= rows0.token ? *(const word*)(row_x - k * 2 * WIDTH) : 0));
    }
    half_word* out = grad_x + (rows0.index - HALO) * 2 * WIDTH + channel;
#if TRAINED
    FilterGradients trained0, trained1;
#endif
#pragma unroll 1
    for (int base = 0; base < rows0.count + HALO; base += GROUP) {
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
            if (rows1.own(row)) *(word*)(out + k * 2 * WIDTH) = rounded(LN2 * total);
#if TRAINED
            if (rows0.own(row)) trained0.straight(seen, grads0.rows[HALO]);
            if (rows1.own(row)) trained1.reversed(seen, grads1.rows[HALO]);
#endif
        }
        out += GROUP * 2 * WIDTH;
    }
#if TRAINED
    float* place = partial_filters + ((long)blockIdx.y * gridDim.x + blockIdx.x) * 2 * (FILTER + 1) * PADDED + channel;
    trained0.store(place);
    trained1.store(place + (FILTER + 1) * PADDED);
#endif
}
