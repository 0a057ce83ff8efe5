// Weights as the products read them: groups of 32 columns (two tiles of 16), one after the other, so that a product
// reads memory in one stream, which the processor fetches ahead: read as two tiles behind each other, weights came
// at a third of the speed. Padding is zero.
//
// All variants share a layout, which the elem alone decides; bf16 has one, whichever product multiplies it.
//
//   bf16 [n / 32][k / 2][2 tiles][16 n][2 k]     fp32 [n / 32][k / 2][2 k][2 tiles][16 n]
#pragma once
#include <cstring>

#include "model.h"

namespace ms {

// Of everything that is packed (door/weights.cc): files of packed weights are kept, and one of another layout is not
// taken. Count on whenever a byte of it would be another one.
constexpr int kLayoutVersion = 1;

// weights [n][k], row i goes to column i % 16 of tile first + i / 16 * step. packed has k padded to `blocks` * 32.
template <class T, bool kPairs>
void pack_tiles(const T *weights, T *packed, long n, long k, long blocks, long first, long step) {
  for (long i = 0; i < n; i++) {
    const long tile = first + i / 16 * step, column = i % 16;
    T *to = packed + tile / 2 * blocks * 1024;
    for (long j = 0; j < k; j++) {
      const long at = kPairs ? tile % 2 * 32 + column * 2 + j % 2 : j % 2 * 32 + tile % 2 * 16 + column;
      to[j / 2 * 64 + at] = weights[i * k + j];
    }
  }
}

inline void pack(int elem, const void *weights, void *packed, long n, long k, long blocks, long first, long step) {
  if (elem == MS_F32)
    pack_tiles<float, false>((const float *)weights, (float *)packed, n, k, blocks, first, step);
  else
    pack_tiles<uint16_t, true>((const uint16_t *)weights, (uint16_t *)packed, n, k, blocks, first, step);
}

}  // namespace ms
