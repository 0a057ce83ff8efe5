// The product of the class of pairs, for any number of rows and columns. Included inside a variant's own namespace,
// behind step/product.h. Weights and KV stand in memory as for the class of blocks; inputs of products are bf16.
#pragma once

// bf16 that is multiplied in pairs.
struct Pairs : Bf16 {};

// Rows of bf16, with a gap of a cache line: rows of a power of two bytes would meet in the same lines of a cache.
template <>
struct Inputs<Pairs> {
  typedef uint16_t T;
  static constexpr long kGap = 32;
  static MS_INLINE const T *rows(const T *from, long width, long row) { return from + row * (width + kGap); }
  static MS_INLINE T *rows(T *from, long width, long row) { return from + row * (width + kGap); }
  static MS_INLINE const T *blocks(const T *from, int block) { return from + block * 32; }
  static MS_INLINE void put(T *to, long width, long row, long column, V rounded, int n = 16) {
    put_some<Bf16>(rows(to, width, row) + column, rounded, n);
  }
  static MS_INLINE void put_rounding(T *to, long width, long row, long column, V value) { put_bf16(rows(to, width, row) + column, value); }
  static MS_INLINE void move(T *inputs, long width, long from, long to) {
    __builtin_memcpy(rows(inputs, width, to), rows(inputs, width, from), sizeof(T) * (size_t)width);
  }
};

// 0 to N - 1, for arrays whose places the compiler is to know from the start: else it keeps them in memory.
template <int... I>
struct Places {};
template <int N, int... I>
struct Counted : Counted<N - 1, N - 1, I...> {};
template <int... I>
struct Counted<0, I...> {
  typedef Places<I...> All;
};

// Weights of a product, two k of T tiles at a time: bf16 as it stands; or int8, and bf16 of it that is kept.
struct Words {
  const uint16_t *at;
  template <int R, int T>
  MS_INLINE void take(Pairs16 (&to)[T]) {
    for (int t = 0; t < T; t++) to[t] = load_words(at + t * kPair);
    at += 2 * kPair;
  }
};
struct Bytes {
  const int8_t *at;
  // One row waits for memory, and tables widen faster; of many the tables' ports are the product's own.
  template <int R, int T>
  MS_INLINE void take(Pairs16 (&to)[T]) {
    if constexpr (R <= 4 && T == 2) load_two_words(at, to[0], to[1]);
    else
      for (int t = 0; t < T; t++) to[t] = load_words(at + t * kPair);
    at += 2 * kPair;
  }
};
struct KeptBytes : Bytes {
  uint16_t *kept;
  MS_INLINE KeptBytes(const int8_t *from, uint16_t *to) : Bytes{from}, kept(to) {}
  template <int R, int T>
  MS_INLINE void take(Pairs16 (&to)[T]) {
    Bytes::take<R>(to);
    for (int t = 0; t < T; t++) store_words(kept + t * kPair, to[t]);
    kept += 2 * kPair;
  }
};

// c[r][t] (+)= rows r of A times tiles t of B, `pairs` of k. A function of its own: registers enough for its sums.
// Nothing is fetched ahead: weights come in one stream, which the processor sees; asking for them took a tenth longer.
template <int R, int T, bool kFromZero, class B, int... I>
MS_ALONE void dot_rows(const uint16_t *a, long stride, B b, int pairs, float *c, long width, Places<I...>) {
  V sums[R * T] = {(kFromZero ? zeros() : load(c + I / T * width + I % T * 16))...};
  for (const auto *end = b.at + pairs * 2 * kPair; b.at < end; a += 2) {
    Pairs16 weights[T];
    b.template take<R>(weights);
    Pairs16 x;
    (((x = I % T ? x : splat_pair(a + I / T * stride)), (sums[I] = dot(sums[I], x, weights[I % T]))), ...);
  }
  (store(c + I / T * width + I % T * 16, sums[I]), ...);
}
template <int T, bool kFromZero, int R = kDotRows, class B>
MS_INLINE void dot_some(int rows, const uint16_t *a, long stride, B b, int pairs, float *c, long width) {
  if (R == 1 || rows == R) return dot_rows<R, T, kFromZero>(a, stride, b, pairs, c, width, typename Counted<R * T>::All());
  if constexpr (R > 1) dot_some<T, kFromZero, R - 1>(rows, a, stride, b, pairs, c, width);
}

// Rows that are left, in shares of one size: a single row left over would cost as much as three.
MS_INLINE int next_share(int rows) {
  const int shares = (rows + kDotRows - 1) / kDotRows;
  return (rows + shares - 1) / shares;
}

constexpr int kDeep = 288;  // pairs: of so many, the weights of two tiles stay in the nearest cache while all rows pass

template <int T, class Out>
MS_INLINE void dot_all(const uint16_t *a, long stride, int rows, const uint16_t *b, int pairs, int tile, Out &out) {
  const int shares = (rows + kDotRows - 1) / kDotRows, parts = shares > 1 ? (pairs + kDeep - 1) / kDeep : 1;
  alignas(64) float sums[Out::kInPlace ? 1 : kRowBlock][T * 16];
  float *c = sums[0];
  long width = T * 16;
  if constexpr (Out::kInPlace) c = out.c + tile * 16, width = out.stride;
  for (int part = 0, p = 0, depth; part < parts; part++, p += depth) {
    depth = (pairs - p) / (parts - part);
    const uint16_t *x = a + 2 * p, *weights = b + p * 2 * kPair;
    for (int m = 0, share; m < rows; m += share) {
      share = next_share(rows - m);
      if (part == 0) dot_some<T, Out::kFromZero>(share, x + m * stride, stride, Words{weights}, depth, c + m * width, width);
      else dot_some<T, false>(share, x + m * stride, stride, Words{weights}, depth, c + m * width, width);
    }
  }
  if constexpr (!Out::kInPlace)
    for (int m = 0; m < rows; m++) {
      if constexpr (T == 2) out.both(m, tile, load(sums[m]), load(sums[m] + 16));
      else out.end(m, tile, load(sums[m]));
    }
}

// C of `rows` rows, tiles [first, last) of 16 columns; groups of two tiles of B are `group` elements apart.
template <class Out>
MS_INLINE void multiply_pairs(const uint16_t *a, long stride, int rows, const uint16_t *b, long group, int pairs, int first, int last, Out &out) {
  int tile = first;
  const auto at = [&](int t) { return b + (t >> 1) * group + (t & 1) * kPair; };
  if (tile < last && (tile & 1)) dot_all<1>(a, stride, rows, at(tile), pairs, tile, out), tile++;
  for (; tile + 2 <= last; tile += 2) dot_all<2>(a, stride, rows, at(tile), pairs, tile, out);
  if (tile < last) dot_all<1>(a, stride, rows, at(tile), pairs, tile, out);
}
template <int kColumn, class Out>
MS_INLINE void multiply(const uint16_t *a, long width, int rows, Packed<Pairs> weights, int, int first, int last, Out &out) {
  multiply_pairs(a, width + Inputs<Pairs>::kGap, rows, weights.base, weights.blocks * kGroup, weights.blocks * 16, first, last, out);
}
