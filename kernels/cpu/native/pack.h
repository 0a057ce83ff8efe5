// Weights as the products read them: groups of 32 columns (two tiles of 16), one after the other, so that a product
// reads memory in one stream, which the processor fetches ahead: read as two tiles behind each other, weights came
// at a third of the speed. Padding is zero.
//
// All variants share a layout, which the elem alone decides; bf16 has one, whichever product multiplies it.
//
//   bf16 [n / 32][k / 2][2 tiles][16 n][2 k]     fp32 [n / 32][k / 2][2 k][2 tiles][16 n]
//   int8 as the elem that it is widened to, and a scale for each n
#pragma once
#include <cstring>

#include "model.h"

namespace ms {

// Of everything that is packed (door/weights.cc): files of packed weights are kept, and one of another layout is not
// taken. Count on whenever a byte of it would be another one.
constexpr int kLayoutVersion = 1;

// A row of weights, `at(j)` of them, to column `column` of tile `tile`. packed has k padded to `blocks` * 32.
template <bool kPairs, class T, class At>
void pack_row(T *packed, long k, long blocks, long tile, long column, At at) {
  T *to = packed + tile / 2 * blocks * 1024;
  for (long j = 0; j < k; j++) {
    const long place = kPairs ? tile % 2 * 32 + column * 2 + j % 2 : j % 2 * 32 + tile % 2 * 16 + column;
    to[j / 2 * 64 + place] = at(j);
  }
}

inline float float_of(float x) { return x; }
inline float float_of(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// int8: scale = the row's largest magnitude / 127 in fp32, weight = row / scale, to the nearest whole number, ties to
// even. A row that is not finite gets a scale that is none, and so are all sums with it.
template <bool kPairs, class T>
float pack_row_int8(const T *row, int8_t *packed, long k, long blocks, long tile, long column) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  float largest = 0.0f, odd = 0.0f;  // odd: 0, or NaN
  for (long j = 0; j < k; j++) {
    const float x = float_of(row[j]), size = x < 0.0f ? -x : x;
    odd += x - x;
    largest = size > largest ? size : largest;
  }
  const float scale = largest / 127.0f;
  const bool is_whole = odd == 0.0f && scale > 0.0f;
  pack_row<kPairs>(packed, k, blocks, tile, column, [&](long j) -> int8_t {
    if (!is_whole) return 0;
    const float q = float_of(row[j]) / scale, whole = q + magic - magic;  // a scale that is a denormal may be too small
    return (int8_t)(whole > 127.0f ? 127.0f : whole < -127.0f ? -127.0f : whole);
  });
  return scale + odd;
}

// weights [n][k], row i goes to column i % 16 of tile first + i / 16 * step.
template <bool kPairs, class T>
void pack_tiles(const T *weights, const Matrix &to, long n, long k, long blocks, long first, long step) {
  for (long i = 0; i < n; i++) {
    const long tile = first + i / 16 * step, column = i % 16;
    const T *row = weights + i * k;
    if (to.scales) to.scales[tile * 16 + column] = pack_row_int8<kPairs>(row, (int8_t *)to.packed, k, blocks, tile, column);
    else pack_row<kPairs>((T *)to.packed, k, blocks, tile, column, [row](long j) { return row[j]; });
  }
}

inline void pack(int elem, const void *weights, const Matrix &to, long n, long k, long blocks, long first, long step) {
  if (elem == MS_F32) pack_tiles<false>((const float *)weights, to, n, k, blocks, first, step);
  else pack_tiles<true>((const uint16_t *)weights, to, n, k, blocks, first, step);
}

}  // namespace ms
