// Products with a model's weights, which stand in its elem or in int8 (numerics.h). Included inside a variant's own
// namespace, behind all products.
//
// int8 is widened to the elem a stretch at a time, and multiplied as ever while it is in the nearest cache; a stretch ends
// with a block of 32 k, where every product may put its sums down (pairs have a way of their own, pairs/int8.h). The
// scales come when a sum is whole.
#pragma once

constexpr int kStretch = 8;  // blocks of 32 k: 16 KiB of bf16

template <class E>
struct Weights {
  Matrix matrix;
  int blocks;
  MS_INLINE Weights(const Matrix &m, long width) : matrix(m), blocks((int)(width / 32)) {}
};

template <class E>
MS_INLINE void widen(const int8_t *from, typename E::Store *to, long n) {
#if defined(MS_TABLES)
  if constexpr (sizeof(typename E::Store) == 2) {
    for (long i = 0; i < n; i += 64) {
      __m512i first, second;
      load_bf16_of_int8(from + i, first, second);
      _mm512_storeu_si512(to + i, first);
      _mm512_storeu_si512(to + i + 32, second);
    }
    return;
  }
#endif
  for (long i = 0; i < n; i += 16) E::put(to + i, load_int8(from + i));
}

// sums[row][column of the group] = A B of its tiles [first, last), from +0.
template <class E>
MS_ALONE void multiply_int8(const typename Inputs<E>::T *a, long width, int rows, const int8_t *group, int blocks, int first, int last, float (*sums)[32]) {
  alignas(64) typename E::Store widened[kStretch * kGroup];
  for (int block = 0, some; block < blocks; block += some) {
    some = blocks - block < kStretch ? blocks - block : kStretch;
    widen<E>(group + block * kGroup, widened, some * kGroup);
    const Packed<E> stretch = {widened, some};
    const auto *x = Inputs<E>::blocks(a, block);
    if (block == 0) {
      Put begun = {sums[0], 32};
      multiply<1>(x, width, rows, stretch, some, first, last, begun);
    } else {
      Continue going_on = {sums[0], 32};
      multiply<1>(x, width, rows, stretch, some, first, last, going_on);
    }
  }
}
#if defined(MS_PAIRS)
#include "../pairs/int8.h"
#endif

// C of `rows` rows, tiles [first, last) of 16 columns.
template <class E, class Out>
MS_INLINE void multiply_weights(const typename Inputs<E>::T *a, long width, int rows, const Weights<E> &weights, int first, int last, Out &out) {
  typedef typename E::Store Store;
  const float *scales = weights.matrix.scales;
  if (!scales) {
    const Packed<E> packed = {(const Store *)weights.matrix.packed, weights.blocks};
    return multiply<1>(a, width, rows, packed, weights.blocks, first, last, out);
  }
  for (int tile = first, next; tile < last; tile = next) {
    next = (tile | 1) + 1 < last ? (tile | 1) + 1 : last;
    const int begin = tile & 1, end = begin + next - tile;
    const int8_t *group = (const int8_t *)weights.matrix.packed + (long)(tile >> 1) * weights.blocks * kGroup;
    alignas(64) float sums[kRowBlock][32];
    multiply_int8<E>(a, width, rows, group, weights.blocks, begin, end, sums);
    for (int t = begin; t < end; t++) {
      const int column = tile - begin + t;
      const V scale = load(scales + column * 16);
      for (int m = 0; m < rows; m++) {
        const V sum = load(sums[m] + t * 16);
        out.end(m, column, Out::kFromZero ? mul(sum, scale) : fma(sum, scale, out.begin(m, column)));
      }
    }
  }
}
