// Cached blocks, whole or in part, from one pool into another: all layers in one launch, one signal a layer.
//
// The grid's y axis is the layer; words[layer] is written when that layer's thread blocks are done, whatever
// the order of the layers. With words == nullptr there is no signal.
#include "arrival.cuh"
#include "block_put.h"

extern "C" __global__ void __launch_bounds__(256) block_put(
    const char* source, char* target, int64_t source_layer_stride, int64_t target_layer_stride,
    const Range* ranges, uint32_t num_ranges, uint32_t pieces, unsigned int* done, unsigned long long* words,
    unsigned long long sequence
) {
    const BlockPut work{source, target, source_layer_stride, target_layer_stride, ranges, num_ranges, pieces};
    const uint32_t layer = blockIdx.y;
    put_ranges(work, layer, Thread{threadIdx.x, threadIdx.y, blockDim.x, blockDim.y, blockIdx.x, gridDim.x});
    if (words != nullptr) arrive(done + layer, gridDim.x, words + layer, sequence);
}
