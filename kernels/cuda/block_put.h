// Block put, one thread's share: ranges of bytes from one pool into another, the same ranges in every layer.
//
// A range is cut into pieces of PIECE_NBYTES that the thread blocks take in turn. `pieces` is how many takers a
// range has at most: any value copies everything, one that fits the longest range spreads it best.
#pragma once

#include "portable.h"

struct Range {
    int64_t source;  // bytes from the start of a layer of the source
    int64_t target;  // bytes from the start of a layer of the target
    int64_t nbytes;
};

struct BlockPut {
    const char* source;
    char* target;
    int64_t source_layer_stride, target_layer_stride;  // bytes
    const Range* ranges;
    uint32_t num_ranges;
    uint32_t pieces;
};

constexpr int64_t PIECE_NBYTES = 16384;

template <typename Unit>
PORTABLE void copy_piece(const char* source, char* target, int64_t nbytes, const Thread& thread) {
    constexpr int IN_FLIGHT = 4;
    const int64_t step = int64_t(thread.size_x) * sizeof(Unit);
    for (int64_t at = int64_t(thread.x) * sizeof(Unit); at < nbytes; at += IN_FLIGHT * step) {
        Unit units[IN_FLIGHT];
        UNROLL for (int i = 0; i < IN_FLIGHT; ++i) {
            if (at + i * step < nbytes) units[i] = *reinterpret_cast<const Unit*>(source + at + i * step);
        }
        UNROLL for (int i = 0; i < IN_FLIGHT; ++i) {
            if (at + i * step < nbytes) *reinterpret_cast<Unit*>(target + at + i * step) = units[i];
        }
    }
}

// The widest unit that fits both addresses and the length: the same for all threads of a block.
PORTABLE void copy_aligned(const char* source, char* target, int64_t nbytes, const Thread& thread) {
    const uint64_t bits = uint64_t(source) | uint64_t(target) | uint64_t(nbytes);
    if (bits % 16 == 0) copy_piece<Unit16>(source, target, nbytes, thread);
    else if (bits % 4 == 0) copy_piece<uint32_t>(source, target, nbytes, thread);
    else if (bits % 2 == 0) copy_piece<uint16_t>(source, target, nbytes, thread);
    else copy_piece<uint8_t>(source, target, nbytes, thread);
}

PORTABLE void put_ranges(const BlockPut& work, uint32_t layer, const Thread& thread) {
    const char* source = work.source + int64_t(layer) * work.source_layer_stride;
    char* target = work.target + int64_t(layer) * work.target_layer_stride;
    const uint64_t num_tasks = uint64_t(work.num_ranges) * work.pieces;
    for (uint64_t task = thread.block; task < num_tasks; task += thread.num_blocks) {
        const Range range = work.ranges[task / work.pieces];
        const int64_t piece = int64_t(task % work.pieces);
        for (int64_t at = piece * PIECE_NBYTES; at < range.nbytes; at += work.pieces * PIECE_NBYTES) {
            const int64_t left = range.nbytes - at;
            const int64_t nbytes = left < PIECE_NBYTES ? left : PIECE_NBYTES;
            copy_aligned(source + range.source + at, target + range.target + at, nbytes, thread);
        }
    }
}
