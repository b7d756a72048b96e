// The scan's forward: y of both directions, added, halved and gated. See scan.cuh for the method and the shapes.

#include "scan.cuh"

constexpr int MAX_BLOCKS = 6;   // on a multiprocessor: 168 registers for a thread

#if SEGMENTED
extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_ends(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    float* ends, int batch, int total, int span
) {
    __shared__ Shared<2, 0> shared[2];
    const Place at(total, span);
    Shared<2, 0>& mine = shared[at.direction];
    const bool reverse = at.direction;
    if (blockIdx.z == (reverse ? 0 : gridDim.z - 1)) return;   // no segment follows
    const long own = at.row(batch);
    Pair decay[N], state[N], elapsed = {0.0f, 0.0f};
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    clear(state);

    Vectors vectors_now;
    Stream<word> us, dts;
    vectors_now.start(mine.vectors, vectors + own * COLUMNS, at.tokens, reverse, 0);
    us.start(mine.words[0], u + own * WIDTH + at.first, WIDTH, at.tokens, reverse, 0, at.tokens);
    dts.start(mine.words[1], delta + own * WIDTH + at.first, WIDTH, at.tokens, reverse, 0, at.tokens);
    const auto visit = [&](int slot, int k) {
        const Pair dt = from_fp16(dts.at(slot, k)), input = dt * activation(us.at(slot, k));
        elapsed = elapsed + dt;
        each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&)[4]) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
            }
        });
    };
    sweep<2>(0, at.tokens, vectors_now, visit, nothing, us, dts);
    leave(state, elapsed, ends, at, batch);
}
#endif

extern "C" __global__ void __launch_bounds__(64, MAX_BLOCKS) scan_forward(
    const half_word* u, const half_word* delta, const half_word* vectors, const float* A_log0, const float* A_log1,
    const float* D0, const float* D1, const half_word* gate, half_word* out, const float* ends, int batch, int total,
    int span
) {
    const Place at(total, span);
    const bool reverse = at.direction;
    const int tokens = at.tokens, middle = at.middle();
    const long own = at.row(batch), image = at.image_row();

    Pair decay[N], state[N];
    load_decay(decay, reverse ? A_log1 : A_log0, at);
    enter(state, decay, ends, at, batch, reverse);
    const Pair skip = load_skip(reverse ? D1 : D0, at);

    __shared__ Shared<4, 0> shared[2];
    Shared<4, 0>& mine = shared[at.direction];
    Vectors vectors_now;
    Stream<word> us, dts, gates, others;
    Results<word> results;
    const half_word* out_row = out + image * WIDTH;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = half ? middle : 0, end = half ? tokens : middle;
        sync_block();
        vectors_now.start(mine.vectors, vectors + own * COLUMNS, tokens, reverse, begin);
        us.start(mine.words[0], u + own * WIDTH + at.first, WIDTH, tokens, reverse, begin, end);
        dts.start(mine.words[1], delta + own * WIDTH + at.first, WIDTH, tokens, reverse, begin, end);
        gates.start(mine.words[2], gate + image * 2 * WIDTH + at.first, 2 * WIDTH, tokens, reverse, begin, end);
        others.start(mine.words[3], out_row + at.first, WIDTH, tokens, reverse, begin, end);
        results.start(out + image * WIDTH + at.channel, WIDTH, tokens, reverse, begin);
        const auto visit = [&](int slot, int k) {
            const Pair ut = activation(us.at(slot, k)), dt = from_fp16(dts.at(slot, k));
            const Pair input = dt * ut;
            Pair y = skip * ut;
            each_four(vectors_now, k, [&](int n, const float (&b)[4], const float (&c)[4]) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    state[n + j] = exp2_fast(dt * decay[n + j]) * state[n + j] + b[j] * input;
                    y = y + c[j] * state[n + j];
                }
            });
            if (half) {
                const Pair other = activation(others.at(slot, k)), z = activation(gates.at(slot, k));
                y = 0.5f * (y + other) * (z * sigmoid(z));
            }
            results.put(rounded(y), at.live);
        };
        sweep<2>(begin, end, vectors_now, visit, nothing, us, dts, gates, others);
    }
}
