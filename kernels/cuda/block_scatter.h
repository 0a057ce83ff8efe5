// Block scatter, one thread's share: new rows of K and V into the blocks of one layer of a pool.
//
//     source   token * token_stride + head * head_stride       any strides, a head's values side by side
//     target   [block][K | V][row][head][value]                row = slot % block_size, block = slot / block_size
//
// A thread keeps to one unit of the row (x) and walks over tokens (y, then the grid): what depends on the unit
// is computed once, no thread divides inside the loop but for the slot, and neighbours touch neighbouring bytes.
#pragma once

#include "portable.h"

struct BlockScatter {
    const char* key;
    const char* value;
    int64_t key_token_stride, key_head_stride;      // bytes
    int64_t value_token_stride, value_head_stride;  // bytes
    const int64_t* slots;                           // [num_tokens] block * block_size + row
    char* layer;
    uint32_t num_slots;   // num_blocks * block_size; a slot outside [0, num_slots) is not written
    uint32_t block_size;  // rows
    uint32_t num_tokens;  // below 2^31, as num_slots is
    uint32_t num_heads;
    uint32_t head_nbytes;  // a multiple of the unit, as are all strides and pointers
};

// The row of a slot's key in the layer, in rows from its start; the value is block_size rows further on.
PORTABLE int64_t key_row(uint32_t slot, uint32_t block_size) {
    const uint32_t block = slot / block_size;
    return int64_t(slot) + int64_t(block) * block_size;
}

template <typename Unit>
PORTABLE void scatter_rows(const BlockScatter& work, const Thread& thread) {
    constexpr uint32_t IN_FLIGHT = 2;  // tokens, of which each has a load of K and one of V under way
    const uint32_t units_per_head = work.head_nbytes / sizeof(Unit);
    const uint32_t units_per_row = units_per_head * work.num_heads;
    const int64_t row_nbytes = int64_t(work.head_nbytes) * work.num_heads;
    const int64_t value_shift = row_nbytes * work.block_size;
    const uint32_t stride = thread.num_blocks * thread.size_y;  // tokens

    for (uint32_t unit = thread.x; unit < units_per_row; unit += thread.size_x) {
        const uint32_t head = unit / units_per_head;
        const int64_t in_head = int64_t(unit - head * units_per_head) * sizeof(Unit);
        const char* key = work.key + head * work.key_head_stride + in_head;
        const char* value = work.value + head * work.value_head_stride + in_head;
        char* target = work.layer + int64_t(unit) * sizeof(Unit);

        const uint32_t first = thread.block * thread.size_y + thread.y;
        for (uint32_t token = first; token < work.num_tokens; token += IN_FLIGHT * stride) {
            Unit keys[IN_FLIGHT], values[IN_FLIGHT];
            int64_t rows[IN_FLIGHT];
            UNROLL for (uint32_t i = 0; i < IN_FLIGHT; ++i) {
                const uint32_t at = token + i * stride;
                const int64_t slot = at < work.num_tokens ? work.slots[at] : -1;
                rows[i] = uint64_t(slot) < work.num_slots ? key_row(uint32_t(slot), work.block_size) : -1;
                if (rows[i] >= 0) {
                    keys[i] = *reinterpret_cast<const Unit*>(key + at * work.key_token_stride);
                    values[i] = *reinterpret_cast<const Unit*>(value + at * work.value_token_stride);
                }
            }
            UNROLL for (uint32_t i = 0; i < IN_FLIGHT; ++i) {
                if (rows[i] >= 0) {
                    char* row = target + rows[i] * row_nbytes;
                    *reinterpret_cast<Unit*>(row) = keys[i];
                    *reinterpret_cast<Unit*>(row + value_shift) = values[i];
                }
            }
        }
    }
}
