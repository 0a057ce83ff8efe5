// The CUDA kernels' address arithmetic on a CPU: the same headers, every thread of the launch in turn.
//
// Threads run in an order that differs from the hardware's, which is what a launch without communication
// between its threads has to stand. Signals are not emulated: they are about memory order, not addresses.
#include "block_put.h"
#include "block_scatter.h"

template <typename Body>
static void each_thread(uint32_t num_blocks, uint32_t size_x, uint32_t size_y, Body body) {
    for (uint32_t block = num_blocks; block-- > 0;)
        for (uint32_t y = size_y; y-- > 0;)
            for (uint32_t x = size_x; x-- > 0;) body(Thread{x, y, size_x, size_y, block, num_blocks});
}

// Arguments as the kernels declare them, then the launch; returns 1 for a unit that no kernel has.
extern "C" int emulate_scatter(
    const char* key, const char* value, int64_t key_token_stride, int64_t key_head_stride,
    int64_t value_token_stride, int64_t value_head_stride, const int64_t* slots, char* layer, uint32_t num_slots,
    uint32_t block_size, uint32_t num_tokens, uint32_t num_heads, uint32_t head_nbytes, void*, void*, uint64_t,
    uint32_t unit, uint32_t num_blocks, uint32_t size_x, uint32_t size_y
) {
    const BlockScatter work{
        key, value, key_token_stride, key_head_stride, value_token_stride, value_head_stride, slots,
        layer, num_slots, block_size, num_tokens, num_heads, head_nbytes,
    };
    if (unit != 16 && unit != 4 && unit != 2) return 1;
    each_thread(num_blocks, size_x, size_y, [&](Thread thread) {
        if (unit == 16) scatter_rows<Unit16>(work, thread);
        else if (unit == 4) scatter_rows<uint32_t>(work, thread);
        else scatter_rows<uint16_t>(work, thread);
    });
    return 0;
}

extern "C" int emulate_put(
    const char* source, char* target, int64_t source_layer_stride, int64_t target_layer_stride,
    const Range* ranges, uint32_t num_ranges, uint32_t pieces, void*, void*, uint64_t, uint32_t num_blocks,
    uint32_t num_layers, uint32_t size_x, uint32_t size_y
) {
    const BlockPut work{source, target, source_layer_stride, target_layer_stride, ranges, num_ranges, pieces};
    for (uint32_t layer = 0; layer < num_layers; ++layer)
        each_thread(num_blocks, size_x, size_y, [&](Thread thread) { put_ranges(work, layer, thread); });
    return 0;
}

extern "C" int64_t emulate_key_row(uint32_t slot, uint32_t block_size) { return key_row(slot, block_size); }
extern "C" int64_t piece_nbytes() { return PIECE_NBYTES; }
