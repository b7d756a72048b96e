// This takes the gradients of the scan's inputs back to x, through x_proj, SiLU and the convolutions of one direction,
// or of both, whose results are added. Those of B | C | dt_r, gp, are found by project_gradients.cu.
//
//     gc_t = (grad_u_t + gp_t proj) silu'(conv(x)_t + bias)                         gradient of the convolution
//     grad_x_t = sum_j f0[K-1-j] gc0_{t+j} + f1[K-1-j] gc1_{t-j}                    direction 0 looks back, 1 ahead
//
// A block has some tokens of one image, a warp 64 of their channels in all directions. The gradients gc that these
// tokens need are those of ROWS tokens, K - 1 of them belonging to the next block (direction 0) or to the one before
// (direction 1), which computes them too. grad_u of these rows and gp are copied to shared memory asynchronously. Then
// each warp goes on alone: adds gp proj to its channels on the matrix units, and walks the rows in the order of tokens,
// a lane with two channels. One window of K rows of x serves both directions: at x_t it ends in token t of direction 0
// and begins with token t - K + 1 of direction 1.
//
// Compile-time constants: DIRECTIONS (d, 1 or 2), STATES, WIDTH (E), COLUMNS (P: B | C | dt_r, all padded), FILTER (K),
// ROWS (a multiple of 16), WARPS (of a block), FP16 (activations are fp16, otherwise bf16), TRAINED (write the
// gradients of the filters).
// Shapes, all contiguous unless said otherwise, with W = E rounded up to a multiple of 64 and zeros in between, and the
// direction as first index: grad_u (d, B, L, E), gp (d, B, L, P), x and grad_x (B, L, E) with rows 2 E apart, filters
// (d, K, W) fp32, whose row K - 1 belongs to the token itself, conv_bias (d, W) fp32, proj_t, all as packed by
// prepare.cu, partial_filters (B tiles, d, K + 1, W) fp32: gradients of the filters and, last, of the bias, from the
// tokens of each tile.

#include "sizes.cuh"

constexpr int HALO = FILTER - 1;
constexpr bool BOTH = DIRECTIONS == 2;
// What belongs to direction 1 has this index. It is 0 where there is no such direction: then nobody uses what is read
// there, and the compiler leaves it out.
constexpr int SECOND = DIRECTIONS - 1;
// So many rows of x are on their way to a thread.
constexpr int GROUP = 4;

// Computes the slope of SiLU at `scaled` / -log2(e), divided by -log2(e), which cancels the factor in the filters'
// taps.
__device__ inline float silu_slope(float scaled) {
    const float gate = reciprocal(1.0f + exp2_fast(scaled));
    return gate * (LN2 * LN2 * (scaled - scaled * gate) - LN2);
}

// Rows are the tokens of one direction whose gradients a block computes. Row 0 is the block's first token in direction
// 0, and in direction 1 row HALO is.
struct Rows {
    // Row 0 has token `token`, rows from `begin` to `end` are in the image, and the block has `count` tokens.
    int token, begin, end, count;
    // The block's first token has this row.
    int first;
    // Row 0 has this index among those of all images and directions.
    long index;

    __device__ Rows(int direction, int batch, int tokens, int most) : first(direction * HALO) {
        token = blockIdx.y * most - first;
        count = min(most, tokens - token - first);
        begin = token < 0 ? -token : 0;
        end = min(count + HALO, tokens - token);
        index = ((long)direction * batch + blockIdx.z) * tokens + token;
    }
    __device__ bool exist(int row) const { return (unsigned)(row - begin) < (unsigned)(end - begin); }
    // Says whether the token is this block's and not its neighbour's.
    __device__ bool own(int row) const { return (unsigned)(row - first) < (unsigned)count; }
};

// Projections have gp of one direction in shared memory. Its rows are padded such that those of eight lanes begin in
// different banks.
struct Projections {
    static constexpr int PITCH = COLUMNS + 8;
    static constexpr int BYTES = ROWS * PITCH * 2;
    char* memory;

    __device__ Projections(int direction) : memory(launched_shared() + direction * BYTES) {}
    __device__ char* at(int row, int column) const { return memory + (row * PITCH + column) * 2; }
    // Loads an operand of a product, 16 rows and 16 columns.
    __device__ Words values(int row, int column) const {
        return load_values(at(row + lane() % 16, column + lane() / 16 * 8));
    }
};

// A Tile has a warp's 64 channels of one direction's rows in shared memory. In odd rows the halves change places: then
// eight lanes that access four pieces of 16 bytes in each of two rows find them in different banks.
struct Tile {
    static constexpr int BYTES = ROWS * 64 * 2;
    char* memory;

    __device__ Tile(int direction)
        : memory(launched_shared() + DIRECTIONS * Projections::BYTES + (warp() * DIRECTIONS + direction) * BYTES) {}
    // Gives the place of the word, or of the 16 bytes, that begin with this channel.
    __device__ void* at(int row, int channel) const { return memory + row * 128 + (channel * 2 ^ row % 2 * 64); }
};

constexpr int SHARED = DIRECTIONS * (Projections::BYTES + WARPS * Tile::BYTES);
constexpr int REGISTERS = 56 + 2 * FILTER + DIRECTIONS * (4 * FILTER + TRAINED * (8 + 2 * FILTER));
constexpr int FIT_SHARED = 227 * 1024 / (SHARED + 1024);
constexpr int FIT_REGISTERS = 65536 / (WARPS * 32 * REGISTERS);
constexpr int FIT = FIT_SHARED < FIT_REGISTERS ? FIT_SHARED : FIT_REGISTERS;
// So many blocks shall be on a multiprocessor at once.
constexpr int MAX_BLOCKS = FIT < 1 ? 1 : FIT > 16 ? 16 : FIT;

// Starts to copy the warp's channels of grad_u, and its share of gp. Rows that are not in the image become zeros.
__device__ inline void copy_rows(const Rows& rows, int channel, Tile tile, const half_word* grad_u) {
    const int own = lane() % 8 * 8;
    const half_word* source = grad_u + (rows.index + lane() / 8) * WIDTH + channel + own;
#pragma unroll
    for (int k = 0; k < ROWS; k += 4) {
        const int row = k + lane() / 8;
        copy_async(tile.at(row, own), source + k * WIDTH, channel + own < WIDTH && rows.exist(row));
    }
}
__device__ inline void copy_rows(const Rows& rows, Projections to, const half_word* gp) {
    constexpr int PIECES = COLUMNS / 8;
    for (int k = warp() * 32 + lane(); k < ROWS * PIECES; k += WARPS * 32) {
        const int row = k / PIECES, column = k % PIECES * 8;
        copy_async(to.at(row, column), gp + (rows.index + row) * COLUMNS + column, rows.exist(row));
    }
}

// Computes tile += gp (ROWS x P) proj (P x 64). Which channel is which column of a product is chosen such that a lane
// gets eight channels in a row.
__device__ inline void spread(Tile tile, Projections gp, const Words* weight) {
    const int row = lane() / 4, part = lane() % 4;
#pragma unroll 1
    for (int half = 0; half < 64; half += 32) {
        const int own = half + part * 8;
        Quad sums[ROWS / 16][4];
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) {
            const Eight upper = activations(*(const Words*)tile.at(m * 16 + row, own));
            const Eight lower = activations(*(const Words*)tile.at(m * 16 + row + 8, own));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Pair p = upper.pairs[j], q = lower.pairs[j];
                sums[m][j] = {p.a, p.b, q.a, q.b};
            }
        }
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 16) {
            const Words v = weight[0], w = weight[32];
            weight += 64;
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) multiply_add(sums[m], gp.values(m * 16, column), v, w);
        }
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) {
            Eight upper, lower;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                upper.pairs[j] = {sums[m][j].x, sums[m][j].y};
                lower.pairs[j] = {sums[m][j].z, sums[m][j].w};
            }
            *(Words*)tile.at(m * 16 + row, own) = upper.words();
            *(Words*)tile.at(m * 16 + row + 8, own) = lower.words();
        }
    }
}

// A Window has the last rows that a walk has seen.
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
    // These multiply the last tap with the last row, or the first tap with it.
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

// FilterGradients are those of taps and bias, `grad` being that of the filter's result divided by -log2(e).
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
        for (int k = 0; k < FILTER; k++) *(Pair*)(place + k * PADDED) = -LOG2E * taps[k];
        *(Pair*)(place + FILTER * PADDED) = -LOG2E * bias;
    }
};

// Inputs are two channels of x in the order of tokens, GROUP after GROUP, with the next one on its way.
struct Inputs {
    const half_word* place;
    int left;
    word ahead[GROUP];

    __device__ Inputs(const half_word* row, int tokens) : place(row), left(tokens) { fetch(); }
    __device__ void fetch() {
#pragma unroll
        for (int k = 0; k < GROUP; k++) ahead[k] = k < left ? *(const word*)(place + k * 2 * WIDTH) : 0;
        place += GROUP * 2 * WIDTH;
        left -= GROUP;
    }
    __device__ void take(word (&rows)[GROUP]) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) rows[k] = ahead[k];
        fetch();
    }
};

// The grid has blocks of 64 WARPS channels, tiles of `most` tokens, and images.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MAX_BLOCKS) prepare_backward(
    const half_word* grad_u, const half_word* gp, const half_word* x, const float* filters, const float* conv_bias,
    const Words* proj_t, half_word* grad_x, float* partial_filters, int batch, int tokens, int most
) {
    const int base = (blockIdx.x * WARPS + warp()) * 64, own = lane() * 2, channel = base + own;
    const Rows rows0(0, batch, tokens, most), rows1(SECOND, batch, tokens, most);
    const Tile tile0(0), tile1(SECOND);
    copy_rows(rows0, Projections(0), gp);
    if (BOTH) copy_rows(rows1, Projections(SECOND), gp);
    copy_rows(rows0, base, tile0, grad_u);
    if (BOTH) copy_rows(rows1, base, tile1, grad_u);
    const half_word* row_x = x + rows0.index * 2 * WIDTH + channel;
    const bool live = channel < WIDTH;
    Inputs inputs(row_x, live ? rows0.end : 0);
    Window seen, grads0, grads1;
    for (int k = HALO; k > 0; k--) {
        seen.push(activation(live && k <= rows0.token ? *(const word*)(row_x - k * 2 * WIDTH) : 0));
    }
    wait_for_copies();
    sync_block();
    if (base >= PADDED) return;
#pragma unroll 1
    for (int direction = 0; direction < DIRECTIONS; direction++) {
        const Words* weight = proj_t + (direction * PADDED + base) / 32 * (COLUMNS / 16) * 64 + lane();
        spread(Tile(direction), Projections(direction), weight);
    }
    sync_warp();

    const Filter filter0(0, channel, filters, conv_bias), filter1(SECOND, channel, filters, conv_bias);
    half_word* out = grad_x + (rows0.index - HALO) * 2 * WIDTH + channel;
    // So many rows are left that give a result; the first HALO of them only fill the windows.
    int left = live ? rows0.count + HALO : 0;
#if TRAINED
    FilterGradients trained0, trained1;
#endif
#pragma unroll 1
    for (int first = 0; first < rows0.count + HALO; first += GROUP) {
        word arrived[GROUP];
        inputs.take(arrived);
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const int row = first + k;
            seen.push(activation(arrived[k]));
            const Pair y0 = filter0.straight(seen, filter0.bias), y1 = filter1.reversed(seen, filter1.bias);
            const Pair slope0 = {silu_slope(y0.a), silu_slope(y0.b)}, slope1 = {silu_slope(y1.a), silu_slope(y1.b)};
            grads0.push(activation(*(const word*)tile0.at(row, own)) * slope0);
            grads1.push(activation(*(const word*)tile1.at(row, own)) * slope1);
            Pair total = filter0.reversed(grads0, {0.0f, 0.0f});
            if (BOTH) total = filter1.straight(grads1, total);
            store_if((k >= HALO || row >= HALO) && k < left, out + k * 2 * WIDTH, rounded(total));
#if TRAINED
            if (rows0.own(row)) trained0.straight(seen, grads0.rows[HALO]);
            if (BOTH && rows1.own(row)) trained1.reversed(seen, grads1.rows[HALO]);
#endif
        }
        out += GROUP * 2 * WIDTH;
        left -= GROUP;
    }
#if TRAINED
    const long part = (long)blockIdx.z * gridDim.y + blockIdx.y;
    float* place = partial_filters + part * DIRECTIONS * (FILTER + 1) * PADDED + channel;
    trained0.store(place);
    if (BOTH) trained1.store(place + (FILTER + 1) * PADDED);
#endif
}
