// The scan's forward pass of a block, which scan.cu runs, prompt.cu where the last state is wanted as well, and
// scan_from.cu where the first one is given.

#include "scan.cuh"

// As many blocks as shall fit on a multiprocessor: twelve warps, which leaves 168 registers for a thread, or eight, which
// leaves 255 for more states.
constexpr int MAX_BLOCKS = (N <= 24 ? 12 : 8) / DIRECTIONS;

// A warp has this in shared memory: a stream for what another direction has left, and three more.
typedef Shared<2 + DIRECTIONS, 0> Memory;

// These are the tensors that the kernel reads and writes for each token.
struct Tensors {
    const half_word *u, *delta, *vectors, *gate;
    half_word *out, *mean;
    int batch;
};

// Visits the first half of the steps, whose y is left to the other direction, or the second half, to which it adds what
// that direction has left. With one direction the second half is all.
template <bool SECOND>
__device__ inline void sweep_half(
    const Tensors& tensors, const Place& at, Memory& mine, const Pair (&decay)[STATES], Pair skip, const Offset& offset,
    Pair (&state)[STATES]
) {
    const int middle = at.middle(), begin = SECOND ? middle : 0, end = SECOND ? at.tokens : middle;
    const long own = at.row(tensors.batch), image = at.image_row();
    const Order order = {at.tokens, (bool)at.direction};
    const Range all = {0, at.tokens};
    Vectors vectors(tensors.vectors + own * COLUMNS, order);
    Stream<word, 0> us(tensors.u + own * WIDTH + at.first, WIDTH, order, begin, all);
    Stream<word, 1> dts(tensors.delta + own * WIDTH + at.first, WIDTH, order, begin, all);
    Stream<word, 2> gates(tensors.gate + image * 2 * WIDTH + at.first, 2 * WIDTH, order, begin, all);
    Stream<word, 3> others(tensors.out + image * WIDTH + at.first, WIDTH, order, begin, all);
    Results<word> results(tensors.out + image * WIDTH + at.channel, WIDTH, order, begin);
    Results<word> means(tensors.mean + image * WIDTH + at.channel, WIDTH, order, begin);
    const auto visit = [&](const Step& step, int, int) {
        const Pair ut = activation(us.at(step)), dt = from_fp16(dts.at(step)), input = dt * ut;
        Pair y = skip * ut;
        each_four(step, [&](int n, const float (&b)[4], const float (&c)[4]) {
#pragma unroll
            for (int j = 0; j < live(n); j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
                y = y + c[j] * offset.beside(state[n + j], n + j);
            }
        });
        if (SECOND) {
            const Pair z = nonzero(activation(gates.at(step)));
            if (DIRECTIONS == 2) y = 0.5f * (y + activation(others.at(step)));
            if (FP16 && tensors.mean) means.put(rounded(y), at.live);
            y = y * (z * sigmoid(z));
        }
        results.put(rounded(y), at.live);
    };
    if constexpr (SECOND && DIRECTIONS == 2) {
        sweep<2>(mine, order, begin, end, vectors, visit, nothing, us, dts, gates, others);
    } else if constexpr (SECOND) {
        sweep<2>(mine, order, begin, end, vectors, visit, nothing, us, dts, gates);
    } else {
        sweep<2>(mine, order, begin, end, vectors, visit, nothing, us, dts);
    }
}

// Scans the tokens of this block and gates the result. It begins with the states `first` of the direction, or zeros
// where that is null, and leaves the state behind its last token.
__device__ inline void scan_tokens(
    const Tensors& tensors, const Place& at, const float* A_log0, const float* A_log1, const float* D0, const float* D1,
    const float* first, const float* ends, const Offset& offset, Pair (&state)[STATES]
) {
    __shared__ Memory shared[DIRECTIONS];
    Memory& mine = shared[at.direction];
    const bool reverse = at.direction;
    Pair decay[STATES];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    enter(state, decay, first, ends, at, tensors.batch, reverse);
    const Pair skip = load_skip(reverse ? D1 : D0, at);
    if (DIRECTIONS == 2) {
        sweep_half<false>(tensors, at, mine, decay, skip, offset, state);
        sync_block();
    }
    sweep_half<true>(tensors, at, mine, decay, skip, offset, state);
}
