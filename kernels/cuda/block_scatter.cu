// K and V of new tokens, right after RoPE, into the blocks of a pool that may be another process's.
//
// One entry per unit of copying. With word == nullptr there is no signal: then the caller's stream signals by
// cuStreamWriteValue64 with flags 0, which fences before it writes.
#include "arrival.cuh"
#include "block_scatter.h"

#define BLOCK_SCATTER(name, Unit)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) name(                                                  \
        const char* key, const char* value, int64_t key_token_stride, int64_t key_head_stride,               \
        int64_t value_token_stride, int64_t value_head_stride, const int64_t* slots, char* layer,            \
        uint32_t num_slots, uint32_t block_size, uint32_t num_tokens, uint32_t num_heads,                    \
        uint32_t head_nbytes, unsigned int* done, unsigned long long* word, unsigned long long sequence      \
    ) {                                                                                                      \
        const BlockScatter work{                                                                             \
            key, value, key_token_stride, key_head_stride, value_token_stride, value_head_stride, slots,     \
            layer, num_slots, block_size, num_tokens, num_heads, head_nbytes,                                \
        };                                                                                                   \
        scatter_rows<Unit>(                                                                                  \
            work, Thread{threadIdx.x, threadIdx.y, blockDim.x, blockDim.y, blockIdx.x, gridDim.x}            \
        );                                                                                                   \
        if (word != nullptr) arrive(done, gridDim.x, word, sequence);                                        \
    }

BLOCK_SCATTER(block_scatter_16, Unit16)
BLOCK_SCATTER(block_scatter_4, uint32_t)
BLOCK_SCATTER(block_scatter_2, uint16_t)
