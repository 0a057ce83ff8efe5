// What the copy loops need from either compiler. Every loop that computes an address lives in a header that a
// host C++ compiler can read as well, so that an off-by-one is found by a test on a machine without a GPU.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define PORTABLE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define PORTABLE inline
#define UNROLL
#endif

// One 16-byte load or store.
struct alignas(16) Unit16 {
    uint32_t words[4];
};

// Where a thread stands in its launch.
struct Thread {
    uint32_t x, y;        // in the thread block
    uint32_t size_x, size_y;
    uint32_t block;       // of the grid's x axis
    uint32_t num_blocks;  // on the grid's x axis
};
