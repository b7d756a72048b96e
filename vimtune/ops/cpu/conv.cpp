// Depthwise causal convolution with optional SiLU, forward and backward, fp32, channel-last.
//
// A work item is one sample and BLOCK adjacent positions, all channels: rows are read and written in
// full. Position i of the filter's walk lies at token i, or tokens - 1 - i when reversed.

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace {
constexpr int BLOCK = 32;
}

extern "C" {

// `ConvArguments` in library.py mirrors this. Strides count floats, and channels are adjacent everywhere.
struct ConvArguments {
    // weight has shape (width, inner) and is contiguous.
    const float *x, *weight, *bias, *grad;
    // What stands before the first position, (width - 1, inner), the same for all samples and contiguous; the last row
    // is its neighbour. Null stands for zeros. Only the forward pass knows it.
    const float* tail;
    // The result and the gradients are contiguous. Those that nobody wants are null.
    float* out;
    float *grad_x, *grad_weight, *grad_bias;
    TeamLauncher launch;
    int64_t batch, tokens, inner, width;
    int64_t x_batch, x_token, grad_batch, grad_token;
    int64_t num_threads, silu, reverse;
};

}  // extern "C"

namespace {

struct Item {
    const ConvArguments& a;
    // The item has the positions from `start` to `end` of this sample.
    int64_t sample, start, end;

    Item(const ConvArguments& a, int64_t item) : a(a) {
        const int64_t blocks = ceil_div(a.tokens, BLOCK);
        sample = item / blocks;
        start = item % blocks * BLOCK;
        end = std::min(a.tokens, start + BLOCK);
    }
    int64_t token(int64_t position) const { return a.reverse ? a.tokens - 1 - position : position; }
    const float* x(int64_t position) const { return a.x + sample * a.x_batch + token(position) * a.x_token; }
    const float* grad(int64_t position) const {
        return a.grad + sample * a.grad_batch + token(position) * a.grad_token;
    }
    int64_t row(int64_t position) const { return (sample * a.tokens + token(position)) * a.inner; }

    // Computes the filter's sum at `position` before SiLU. Positions before the first one are in the tail, or zeros.
    vf filtered(int64_t position, int64_t e, int lanes) const {
        vf y = a.bias ? load(a.bias + e, lanes) : vf{};
        for (int64_t lag = a.tail ? a.width - 1 : 0; lag > position; --lag)
            y += load(a.weight + (a.width - 1 - lag) * a.inner + e, lanes) *
                 load(a.tail + (a.width - 1 + position - lag) * a.inner + e, lanes);
        for (int64_t lag = std::min(a.width - 1, position); lag >= 0; --lag)
            y += load(a.weight + (a.width - 1 - lag) * a.inner + e, lanes) * load(x(position - lag) + e, lanes);
        return y;
    }
};

// Calls `body(e, lanes)` for each vector of channels.
template <class Body>
void for_channels(int64_t inner, const Body& body) {
    int64_t e = 0;
    for (; e + W <= inner; e += W) body(e, W);
    if (e < inner) body(e, static_cast<int>(inner - e));
}

void forward_item(const ConvArguments& a, int64_t index) {
    const Item item(a, index);
    for (int64_t position = item.start; position < item.end; ++position)
        for_channels(a.inner, [&](int64_t e, int lanes) {
            const vf y = item.filtered(position, e, lanes);
            store(a.out + item.row(position) + e, a.silu ? y * sigmoid(y) : y, lanes);
        });
}

void backward_item(const ConvArguments& a, int64_t index, float* before, float* part_weight, float* part_bias) {
    const Item item(a, index);
    const int64_t width = a.width;
    const int64_t halo_end = std::min(a.tokens, item.end + width - 1);

    // This finds the gradient before SiLU, for the block's positions and those later ones that read from them.
    for (int64_t position = item.start; position < halo_end; ++position)
        for_channels(a.inner, [&](int64_t e, int lanes) {
            vf grad = load(item.grad(position) + e, lanes);
            if (a.silu) {
                const vf y = item.filtered(position, e, lanes), gate = sigmoid(y);
                grad *= gate * (1.0f + y * (1.0f - gate));
            }
            store(before + (position - item.start) * a.inner + e, grad, lanes);
        });
    if (a.grad_x)
        for (int64_t position = item.start; position < item.end; ++position)
            for_channels(a.inner, [&](int64_t e, int lanes) {
                vf sum{};
                for (int64_t lag = 0; lag < width && position + lag < halo_end; ++lag)
                    sum += load(a.weight + (width - 1 - lag) * a.inner + e, lanes) *
                           load(before + (position + lag - item.start) * a.inner + e, lanes);
                store(a.grad_x + item.row(position) + e, sum, lanes);
            });
    if (part_weight)
        for (int64_t lag = 0; lag < width; ++lag)
            for_channels(a.inner, [&](int64_t e, int lanes) {
                vf sum{};
                for (int64_t position = std::max(item.start, lag); position < item.end; ++position)
                    sum += load(before + (position - item.start) * a.inner + e, lanes) *
                           load(item.x(position - lag) + e, lanes);
                store(part_weight + (index * width + width - 1 - lag) * a.inner + e, sum, lanes);
            });
    if (part_bias)
        for_channels(a.inner, [&](int64_t e, int lanes) {
            vf sum{};
            for (int64_t position = item.start; position < item.end; ++position)
                sum += load(before + (position - item.start) * a.inner + e, lanes);
            store(part_bias + index * a.inner + e, sum, lanes);
        });
}

void add_items(const float* partial, int64_t items, int64_t size, float* target) {
    std::fill(target, target + size, 0.0f);
    for (int64_t item = 0; item < items; ++item)
        for (int64_t i = 0; i < size; ++i) target[i] += partial[item * size + i];
}

}  // namespace

extern "C" {

// These two return 0, or 1 when memory ran out.
__attribute__((visibility("default"))) int vimtune_conv_forward(const ConvArguments* a) {
    return !parallel_for(a->batch * ceil_div(a->tokens, BLOCK), static_cast<int>(a->num_threads), a->launch, 0,
                         [a](int64_t item, float*) { forward_item(*a, item); });
}

__attribute__((visibility("default"))) int vimtune_conv_backward(const ConvArguments* a) {
    const int64_t items = a->batch * ceil_div(a->tokens, BLOCK);
    Buffer weight, bias;
    if (a->grad_weight && !(weight = allocate(items * a->width * a->inner))) return 1;
    if (a->grad_bias && !(bias = allocate(items * a->inner))) return 1;
    const size_t scratch = (BLOCK + a->width - 1) * a->inner;
    if (!parallel_for(items, static_cast<int>(a->num_threads), a->launch, scratch, [&](int64_t item, float* memory) {
            backward_item(*a, item, memory, weight.get(), bias.get());
        }))
        return 1;
    // The caller gets grad_weight as (width, inner) and transposes it.
    if (a->grad_weight) add_items(weight.get(), items, a->width * a->inner, a->grad_weight);
    if (a->grad_bias) add_items(bias.get(), items, a->inner, a->grad_bias);
    return 0;
}

}  // extern "C"
