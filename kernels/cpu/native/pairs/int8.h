// Products of pairs with weights in int8, from +0. Included inside a variant's own namespace, behind step/weights.h.
#pragma once

// The first share of rows widens weights in registers and keeps them for the others, in the nearest cache: what is
// widened before waits for memory with nothing to do meanwhile.
template <int T>
MS_INLINE void dot_all_int8(const uint16_t *a, long stride, int rows, const int8_t *b, int pairs, uint16_t *kept, float *sums) {
  const bool is_kept = rows > kDotRows;
  const int parts = is_kept ? (pairs + kDeep - 1) / kDeep : 1;
  const auto run = [&](int share, const uint16_t *x, auto weights, int depth, float *c, bool is_first) {
    if (is_first) dot_some<T, true>(share, x, stride, weights, depth, c, 32);
    else dot_some<T, false>(share, x, stride, weights, depth, c, 32);
  };
  for (int part = 0, p = 0, depth; part < parts; part++, p += depth) {
    depth = (pairs - p) / (parts - part);
    for (int m = 0, share; m < rows; m += share) {
      share = next_share(rows - m);
      const uint16_t *x = a + m * stride + 2 * p;
      const int8_t *bytes = b + p * 2 * kPair;
      if (!is_kept) run(share, x, Bytes{bytes}, depth, sums + m * 32, part == 0);
      else if (m == 0) run(share, x, KeptBytes(bytes, kept), depth, sums, part == 0);
      else run(share, x, Words{kept}, depth, sums + m * 32, part == 0);
    }
  }
}

template <>
void multiply_int8<Pairs>(const uint16_t *a, long width, int rows, const int8_t *group, int blocks, int first, int last, float (*sums)[32]) {
  alignas(64) uint16_t kept[kDeep * 2 * kPair];
  const long stride = width + Inputs<Pairs>::kGap;
  if (last - first == 2) dot_all_int8<2>(a, stride, rows, group, blocks * 16, kept, sums[0]);
  else dot_all_int8<1>(a, stride, rows, group + first * kPair, blocks * 16, kept, sums[0] + first * 16);
}
