// Selective scan in one direction or both: what forward (scan.cu) and backward (scan_backward.cu) share.
//
// A block owns one image and 64 channels: its first warp scans from the first token to the last, its second
// warp, which only a scan in both directions has, the other way. A thread owns two neighbouring channels with all their
// states in registers, so sums over states need no communication. Everything a step reads comes through shared memory,
// STAGE steps at a time, and is copied there while the STAGE steps before are computed.
//
// In the forward the two warps meet in the middle of the sequence: until then each leaves its y_t for the other, from
// then on it adds what the other left, so that the sum of the directions needs neither a second pass nor atomics. The
// only warp of a scan in one direction gates its y_t at once.
//
// Where images times channels are too few to fill the card, sequences are cut into segments, one a block (SEGMENTED).
// Since the recurrence is linear, scan_ends first finds the state behind each segment for a zero state before it, and
// the segment's sum of dt: a block then gets the state before its segment from those of the segments before, the
// decay over a segment being exp(A sum dt). scan_ends_backward does the same for the gradients of the states.
//
// Compile-time constants: DIRECTIONS (d, 1 or 2), WIDTH (E), COLUMNS (of a row of `vectors`: B_t, C_t, then anything),
// FP16 (activations are fp16, otherwise bf16), SEGMENTED, OFFSET (C_t reads the sum of the state and an offset, one for all
// tokens), and those of sizes.cuh.
// Shapes, all contiguous unless said otherwise: u, delta (d, B, L, E), vectors (d, B, L, COLUMNS), A_log (E, S), D (E),
// gate and its gradient (B, L, E) with rows 2 E apart, out and its gradient (B, L, E), ends (d, B, segments, E, ENTRY)
// fp32 for segments of `span` tokens, offset (E, S). First index: direction. Of A_log, D and offset a kernel takes two,
// those of direction 0 and of direction 1, of which a scan in one direction reads the first.

#include "sizes.cuh"

constexpr int CHANNELS = 64;
constexpr int THREADS = 32 * DIRECTIONS;
constexpr int STAGE = 8;
// Words of shared memory that a stream takes, for the stage in use and the next one.
constexpr int STREAM = 2 * STAGE * 32;
// Numbers in an entry of `ends`: a state, the sum of dt, and padding.
constexpr int ENTRY = N + 4;
constexpr bool RAGGED = WIDTH % CHANNELS != 0;

// A Place says where a thread works, and which tokens of an image are its block's. Lanes past the last channel read
// zeros and write nothing.
struct Place {
    // `first` is the first channel of the block and `channel` that of the thread.
    int image, direction, total, begin, tokens, first, channel;
    bool live;

    __device__ Place(int total, int span)
        : image(blockIdx.y), direction(DIRECTIONS == 2 ? warp() : 0), total(total),
          begin(SEGMENTED ? blockIdx.z * span : 0), tokens(SEGMENTED ? min(span, total - begin) : total),
          first(blockIdx.x * CHANNELS) {
        channel = first + 2 * lane();
        live = !RAGGED || channel < WIDTH;
    }
    // Gives the number of steps after which the other direction, if there is one, has left y for all tokens to come.
    __device__ int middle() const { return DIRECTIONS == 1 ? 0 : direction ? tokens / 2 : (tokens + 1) / 2; }
    // These give the row of the block's first token among those of all images, or of all images and directions.
    __device__ long image_row() const { return (long)image * total + begin; }
    __device__ long row(int batch) const { return ((long)direction * batch + image) * total + begin; }
    // Says where this thread's channels are in a segment, in tensors (d, B, segments, E).
    __device__ long in_segment(int batch, int segment) const {
        return (((long)direction * batch + image) * gridDim.z + segment) * WIDTH + channel;
    }
};

// An Order is that in which a warp visits its tokens. Steps come in stages of STAGE neighbouring tokens, of which the
// last may reach beyond the sequence.
struct Order {
    int tokens;
    bool reverse;

    // Gives the lowest token of the stage that begins with this step.
    __device__ int stage(int step) const { return reverse ? tokens - STAGE - step : step; }
    // Says which step of its stage visits the k-th lowest token, and the other way round.
    __device__ int within_stage(int k) const { return reverse ? STAGE - 1 - k : k; }
    // Says how far a pointer moves in so many steps.
    __device__ int along(int distance) const { return reverse ? -distance : distance; }
};

// A Range is a number of neighbouring tokens.
struct Range {
    int first, count;

    __device__ bool has(int token) const { return (unsigned)(token - first) < (unsigned)count; }
};

// A Step says where shared memory has the inputs of a step.
struct Step {
    // The words of all streams begin here.
    const word* words;
    // The lane's Word has this index among those of a stream.
    int index;
    const Quad* vectors;

    __device__ const Quad* B() const { return vectors; }
    __device__ const Quad* C() const { return vectors + N / 4; }
    __device__ void advance() {
        index += 32;
        vectors += 2 * N / 4;
    }
};

// A Stream brings the rows of one tensor through shared memory. A row holds a Word for each lane; lanes bring it in
// pieces of 16 bytes. The stream takes the warp's memory from the FIRST word of a lane on.
template <typename Word, int FIRST>
struct Stream {
    static constexpr int LANES = 32 * sizeof(Word) / 16;
    static constexpr int ROWS = 32 / LANES;
    const int row_bytes;
    // The lane's piece of the next stage begins here.
    const char* next;
    Range range;

    // `first` points to the block's first channel in the row of token 0, and rows are `width` Words / 2 apart. The
    // stream begins with step `begin`. Only tokens of `range` are copied, the others are zeros.
    __device__ Stream(const void* first, int width, const Order& order, int begin, Range range)
        : row_bytes(width * (int)sizeof(Word) / 2), range(range) {
        next = (const char*)first + (long)(order.stage(begin) + row()) * row_bytes + piece() * 16;
        if (RAGGED && blockIdx.x * CHANNELS + piece() * (CHANNELS / LANES) >= WIDTH) this->range.count = 0;
    }
    // Starts to copy the stage whose lowest token this is into half `slot` of the memory.
    __device__ void fetch(word* words, int slot, const Order& order, int token) {
        Word* memory = (Word*)(words + FIRST * STREAM) + slot * STAGE * 32 + piece() * (16 / (int)sizeof(Word));
        Word* place = memory + order.within_stage(row()) * 32;
#pragma unroll
        for (int k = 0; k < STAGE; k += ROWS) {
            copy_async(place + order.along(k * 32), next + k * row_bytes, range.has(token + row() + k));
        }
        next += order.along(STAGE * row_bytes);
    }
    __device__ Word at(const Step& step) const { return ((const Word*)(step.words + FIRST * STREAM))[step.index]; }

private:
    static __device__ int piece() { return lane() % LANES; }
    static __device__ int row() { return lane() / LANES; }
};

// Results are this thread's words of the rows that it writes, one a step.
template <typename Word>
struct Results {
    const int stride;
    Word* next;

    // `first` points to the word in the row of token 0, and rows lie `width` Words / 2 apart. Step `begin` is the
    // first.
    __device__ Results(void* first, int width, const Order& order, int begin)
        : stride(order.along(width * (int)sizeof(Word) / 2)) {
        const long rows = order.reverse ? begin + 1 - order.tokens : begin;
        next = (Word*)((char*)first + rows * stride);
    }
    __device__ void put(Word value, bool live) {
        if (live) *next = value;
        next = (Word*)((char*)next + stride);
    }
};

// Vectors puts B_t and C_t into shared memory as fp32. A lane brings eight values of one token in each of ROUNDS rounds,
// which have ROWS tokens. Where these take fewer than 32 lanes, the others bring what nobody needs.
struct Vectors {
    static constexpr int SIZE = STAGE * 2 * N;
    static constexpr int LANES = 2 * N / 8, ROUNDS = (STAGE * LANES + 31) / 32, ROWS = STAGE / ROUNDS;
    const half_word* source;
    const int tokens;
    Words ahead[ROUNDS];

    __device__ Vectors(const half_word* rows, const Order& order)
        : source(rows + lane() % LANES * 8), tokens(order.tokens) {}
    // Starts to load the stage whose lowest token this is.
    __device__ void load(int token) {
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            // Beyond the sequence any token will do, because nobody looks at it.
            const int row = max(0, min(token + lane() / LANES + k * ROWS, tokens - 1));
            ahead[k] = *(const Words*)(source + (long)row * COLUMNS);
        }
    }
    __device__ void unpack(float* tile, const Order& order) const {
        if (ROWS * LANES < 32 && lane() >= ROWS * LANES) return;
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            const Words v = ahead[k];
            const Pair p = activation(v.x), q = activation(v.y), r = activation(v.z), s = activation(v.w);
            const int row = order.within_stage(lane() / LANES + k * ROWS);
            Quad* place = (Quad*)(tile + row * 2 * N + lane() % LANES * 8);
            place[0] = {p.a, p.b, q.a, q.b};
            place[1] = {r.a, r.b, s.a, s.b};
        }
    }
};

// This is what a warp keeps in shared memory.
template <int STREAMS, int SUMS>
struct Shared {
    alignas(16) word words[STREAMS * STREAM];
    alignas(16) float vectors[Vectors::SIZE];
    Quad sums[SUMS > 0 ? SUMS : 1];
};

// Visits the steps from `begin` to `end`. It calls `visit(step, base, k)` once shared memory has the step, which is one
// of the stage that begins with step `base` and the k-th of a group of GROUP steps, and `finish()` behind each group.
template <int GROUP, typename Memory, typename Visit, typename Finish, typename... Streams>
__device__ inline void sweep(
    Memory& mine, const Order& order, int begin, int end, Vectors& vectors, Visit visit, Finish finish,
    Streams&... streams
) {
    int token = order.stage(begin), slot = 0;
    vectors.load(token);
    (streams.fetch(mine.words, slot, order, token), ...);
#pragma unroll 1
    for (int base = begin; base < end; base += STAGE, slot ^= 1) {
        wait_for_copies();
        sync_warp();
        vectors.unpack(mine.vectors, order);
        token += order.along(STAGE);
        vectors.load(token);
        (streams.fetch(mine.words, slot ^ 1, order, token), ...);
        sync_warp();
        Step step = {mine.words, slot * STAGE * 32 + lane(), (const Quad*)mine.vectors};
        int left = min(STAGE, end - base);
#pragma unroll 1
        for (; left >= GROUP; left -= GROUP) {
#pragma unroll
            for (int k = 0; k < GROUP; k++, step.advance()) visit(step, base, k);
            finish();
        }
        if (left == 0) continue;
#pragma unroll 1
        for (int k = 0; k < left; k++, step.advance()) visit(step, base, k);
        finish();
    }
    // Zeros behind the last stage are still on their way, and shall not overwrite what the next sweep copies.
    wait_for_copies();
}

// Calls `use(n, B_t[n .. n + 3], C_t[n .. n + 3])` for all states and those of the padding, four at a time. There are
// states n + j for j < `live(n)`.
template <typename Use>
__device__ inline void each_four(const Step& step, Use use) {
    const Quad *B = step.B(), *C = step.C();
#pragma unroll
    for (int n = 0; n < N; n += 4) {
        const Quad b4 = B[n / 4], c4 = C[n / 4];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
        use(n, b, c);
    }
}

__device__ inline constexpr int live(int n) { return STATES - n < 4 ? STATES - n : 4; }

__device__ inline void nothing() {}

__device__ inline void clear(Pair (&state)[STATES]) {
    for (int n = 0; n < STATES; n++) state[n] = {0.0f, 0.0f};
}

// Stores what a thread has for the states of its two channels.
__device__ inline void store(const Pair (&values)[STATES], float* rows) {
    for (int n = 0; n < STATES; n++) {
        rows[n] = values[n].a;
        rows[STATES + n] = values[n].b;
    }
}

// The backward divides the forward's result by the gate (`gate_slope`), which therefore must not be zero. So it adds a
// number that changes no gate above 1e-10 in fp32, and that is not minus any bf16 number.
__device__ inline Pair nonzero(Pair gate) {
    constexpr float TINY = 1.2345679e-18f;
    return {gate.a + TINY, gate.b + TINY};
}

__device__ inline Pair load_skip(const float* D, const Place& at) {
    return at.live ? Pair{D[at.channel], D[at.channel + 1]} : Pair{0.0f, 0.0f};
}

// Offset is what C reads beside the states.
struct Offset {
    Pair values[OFFSET ? STATES : 1];

    __device__ Offset(const float* offset, const Place& at) {
        const float* row = offset + (at.live ? at.channel : 0) * STATES;
        for (int n = 0; n < STATES && OFFSET; n++) values[n] = {row[n], row[STATES + n]};
    }
    // Gives what C reads of the n-th state.
    __device__ Pair beside(Pair state, int n) const { return OFFSET ? state + values[n] : state; }
};

// Loads A log2(e), so that exp2(dt * decay) is the decay of a step.
__device__ inline void load_decay(Pair (&decay)[STATES], const float* A_log, const Place& at) {
    const float* row = A_log + (at.live ? at.channel : 0) * STATES;
    for (int n = 0; n < STATES; n++) {
        decay[n] = {-LOG2E * exp2_fast(LOG2E * row[n]), -LOG2E * exp2_fast(LOG2E * row[STATES + n])};
    }
}

// Starts with the states `first` (E, S), or zeros where that is null, and passes them through the segments before this
// block's, or from the last segment on through those behind it.
__device__ inline void enter(
    Pair (&state)[STATES], const Pair (&decay)[STATES], const float* first, const float* ends, const Place& at, int batch,
    bool from_last
) {
    clear(state);
    if (first && at.live) {
        const float* row = first + at.channel * STATES;
        for (int n = 0; n < STATES; n++) state[n] = {row[n], row[STATES + n]};
    }
    if (!SEGMENTED) return;
    const int mine = blockIdx.z, step = from_last ? -1 : 1;
    for (int segment = from_last ? gridDim.z - 1 : 0; at.live && segment != mine; segment += step) {
        const float* entry = ends + at.in_segment(batch, segment) * ENTRY;
        const Pair elapsed = {entry[N], entry[ENTRY + N]};
        for (int n = 0; n < STATES; n++) {
            state[n] = exp2_fast(elapsed * decay[n]) * state[n] + Pair{entry[n], entry[ENTRY + n]};
        }
    }
}

#if SEGMENTED
__device__ inline void leave(const Pair (&state)[STATES], Pair elapsed, float* ends, const Place& at, int batch) {
    float* entry = ends + at.in_segment(batch, blockIdx.z) * ENTRY;
    if (!at.live) return;
    for (int n = 0; n < STATES; n++) {
        entry[n] = state[n].a;
        entry[ENTRY + n] = state[n].b;
    }
    entry[N] = elapsed.a;
    entry[ENTRY + N] = elapsed.b;
}
#endif
