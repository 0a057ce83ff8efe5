// Weights as the products read them: tiles of 32 k by 16 n, two tiles (32 columns) a group, groups one after the
// other, so that a product reads memory in order. Padding is zero.
//
//   packed   [n / 32][k / 32][2 tiles][kTile]
//   a tile   bf16 [16 pairs of k][16 n][2]    fp32 [32 k][16 n]
#pragma once
#include <cstring>

#include "model.h"

namespace ms {

constexpr long kTileElements = 512;

// weights [n][k], row i goes to column i % 16 of tile first + i / 16 * step. packed has k padded to `blocks` * 32.
template <class T, bool kPairs>
void pack_tiles(const T *weights, T *packed, long n, long k, long blocks, long first, long step) {
  for (long i = 0; i < n; i++) {
    const long tile = first + i / 16 * step, column = i % 16;
    T *to = packed + (tile / 2 * blocks * 2 + tile % 2) * kTileElements;
    for (long j = 0; j < k; j++) {
      const long at = kPairs ? (j % 32 / 2) * 32 + column * 2 + j % 2 : j % 32 * 16 + column;
      to[j / 32 * 2 * kTileElements + at] = weights[i * k + j];
    }
  }
}

inline void pack(int elem, const void *weights, void *packed, long n, long k, long blocks, long first, long step) {
  if (elem == MS_BF16)
    pack_tiles<uint16_t, true>((const uint16_t *)weights, (uint16_t *)packed, n, k, blocks, first, step);
  else
    pack_tiles<float, false>((const float *)weights, (float *)packed, n, k, blocks, first, step);
}

}  // namespace ms
