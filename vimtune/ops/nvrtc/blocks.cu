// Computes out = s (W + W D) for block diagonal D = diag(D_1, ..., D_n) and a factor s of each row, and the gradients
// of s and D from that of `out`, g:
//
//     grad_s_o = sum_c g_oc (W + W D)_oc        grad_D_nij = sum_o W_oni s_o g_onj
//
// Memory limits all of it. A thread has one block of columns, whose D or gradient of D stays in registers, and takes
// row after row; neighbouring lanes have neighbouring blocks. Of a gradient a CUDA block finds a part, from its tile of
// rows or of columns; whoever launches adds up the parts.
//
// Compile-time constants: SIZE (b), AHEAD (rows that are on their way to a thread), WANT_SCALE, WANT_BLOCKS (the
// gradients to be found). Shapes, contiguous, fp32: weight, grad, out (M, O, n, b), row_scale (M, O),
// blocks (M, n, b, b), partial_scale (tiles of columns, M, O), partial_blocks (tiles of rows, M, n, b, b).

constexpr int THREADS = 128;
// A tile has this many blocks of columns, one for each lane of half a warp.
constexpr int BLOCKS = 16;
// This many rows are handled at once, one by each thread of a block of columns.
constexpr int AT_ONCE = THREADS / BLOCKS;
constexpr int ENTRIES = SIZE * SIZE;

// A Row is one row of a block of columns, or one row of D.
struct alignas(SIZE % 4 == 0 ? 16 : SIZE % 2 == 0 ? 8 : 4) Row { float at[SIZE]; };

struct Tile {
    // `column` counts tiles.
    int matrix, column;
    // The thread has this block of columns, and this is the first of its rows.
    int block, row;
    // The tile begins with this row.
    int begin;
    // Whether the thread's block lies within the matrix.
    bool exists;

    __device__ Tile(int num_blocks, int tile_rows) {
        const int columns = (num_blocks + BLOCKS - 1) / BLOCKS;
        matrix = (int)blockIdx.x / columns;
        column = (int)blockIdx.x % columns;
        block = column * BLOCKS + lane() % BLOCKS;
        begin = (int)blockIdx.y * tile_rows;
        row = begin + warp() * 2 + lane() / BLOCKS;
        exists = block < num_blocks;
    }
};

// Gives a row of a tensor, or zeros where the block or the row does not exist.
__device__ inline Row load(const Row* rows, long index, bool exists) { return exists ? rows[index] : Row{}; }

__device__ inline void load_block(Row (&d)[SIZE], const Row* blocks, const Tile& tile, int num_blocks) {
    const long first = ((long)tile.matrix * num_blocks + tile.block) * SIZE;
#pragma unroll
    for (int i = 0; i < SIZE; i++) d[i] = load(blocks, first + i, tile.exists);
}

// Computes w + w D for one row.
__device__ inline Row changed(Row w, const Row (&d)[SIZE]) {
    Row total = w;
#pragma unroll
    for (int k = 0; k < ENTRIES; k++) total.at[k % SIZE] += w.at[k / SIZE] * d[k / SIZE].at[k % SIZE];
    return total;
}

// The grid has tiles of columns of all matrices, and tiles of AT_ONCE AHEAD rows.
extern "C" __global__ void __launch_bounds__(THREADS) scaled_block_product(
    const Row* weight, const float* row_scale, const Row* blocks, Row* out, int rows, int num_blocks
) {
    const Tile tile(num_blocks, AT_ONCE * AHEAD);
    const long first = (long)tile.matrix * rows + tile.row;
    Row d[SIZE], w[AHEAD];
    float scale[AHEAD];
    load_block(d, blocks, tile, num_blocks);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        const bool exists = tile.exists && tile.row + k * AT_ONCE < rows;
        w[k] = load(weight, (first + k * AT_ONCE) * num_blocks + tile.block, exists);
        scale[k] = exists ? row_scale[first + k * AT_ONCE] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        Row total = changed(w[k], d);
#pragma unroll
        for (int j = 0; j < SIZE; j++) total.at[j] *= scale[k];
        if (!tile.exists || tile.row + k * AT_ONCE >= rows) continue;
        out[(first + k * AT_ONCE) * num_blocks + tile.block] = total;
    }
}

// Gives the sum over the lanes that have the same row.
__device__ inline float over_columns(float value) {
#pragma unroll
    for (int bit = BLOCKS / 2; bit > 0; bit /= 2) value += exchanged(value, bit);
    return value;
}

// Stores the sums over the threads that have the same block. It takes WARPS ENTRIES PITCH fp32 numbers of shared
// memory, where the padding keeps lanes, which go along either dimension, in different banks.
__device__ inline void store_over_rows(
    const float (&sums)[ENTRIES], float* partial, const Tile& tile, int matrices, int num_blocks
) {
    constexpr int WARPS = THREADS / 32, PITCH = BLOCKS + 1;
    float* memory = (float*)launched_shared();
#pragma unroll
    for (int k = 0; k < ENTRIES; k++) {
        const float total = sums[k] + exchanged(sums[k], BLOCKS);
        if (lane() < BLOCKS) memory[(warp() * ENTRIES + k) * PITCH + lane()] = total;
    }
    sync_block();
    const int first = tile.column * BLOCKS, count = min(BLOCKS, num_blocks - first) * ENTRIES;
    partial += (((long)blockIdx.y * matrices + tile.matrix) * num_blocks + first) * ENTRIES;
#pragma unroll
    for (int turn = 0; turn < BLOCKS * ENTRIES; turn += THREADS) {
        const int k = turn + warp() * 32 + lane();
        if (k >= count) break;
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += memory[(w * ENTRIES + k % ENTRIES) * PITCH + k / ENTRIES];
        partial[k] = total;
    }
}

// The grid has tiles of columns of all matrices, and tiles of `tile_rows` rows.
extern "C" __global__ void __launch_bounds__(THREADS) scaled_block_product_backward(
    const Row* grad, const Row* weight, const float* row_scale, const Row* blocks, float* partial_scale,
    float* partial_blocks, int matrices, int rows, int num_blocks, int tile_rows
) {
    const Tile tile(num_blocks, tile_rows);
    const int end = min(rows, tile.begin + tile_rows);
    const long first = (long)tile.matrix * rows;
    float* scales = partial_scale + (long)tile.column * matrices * rows + first;
    Row d[SIZE];
    float sums[ENTRIES] = {};
    if (WANT_SCALE) load_block(d, blocks, tile, num_blocks);
#pragma unroll 1
    // All lanes take every step, because they exchange values in it.
    for (int step = 0; tile.begin + step < end; step += AHEAD * AT_ONCE) {
        const int row = tile.row + step;
        Row w[AHEAD], g[AHEAD];
        float scale[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const bool exists = tile.exists && row + k * AT_ONCE < end;
            const long index = (first + row + k * AT_ONCE) * num_blocks + tile.block;
            w[k] = load(weight, index, exists);
            g[k] = load(grad, index, exists);
            scale[k] = WANT_BLOCKS && exists ? row_scale[first + row + k * AT_ONCE] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (WANT_BLOCKS) {
#pragma unroll
                for (int e = 0; e < ENTRIES; e++) sums[e] += scale[k] * w[k].at[e / SIZE] * g[k].at[e % SIZE];
            }
            if (WANT_SCALE) {
                const Row product = changed(w[k], d);
                float total = 0.0f;
#pragma unroll
                for (int j = 0; j < SIZE; j++) total += product.at[j] * g[k].at[j];
                total = over_columns(total);
                if (lane() % BLOCKS == 0 && row + k * AT_ONCE < end) scales[row + k * AT_ONCE] = total;
            }
        }
    }
    if (WANT_BLOCKS) store_over_rows(sums, partial_blocks, tile, matrices, num_blocks);
}
