// The product of the class, for any number of rows and columns: weights in tiles, activations in rows of fp32.
// Included inside a variant's own namespace. How rows and columns are blocked is free: it keeps the bits.
#pragma once

// B of an inner kernel: tiles of packed weights, or rows of fp32.
template <class E>
struct Tiles {
  const typename E::Store *base;  // pack.h has the layout
  MS_INLINE void pair(int block, int p, int tile, V &even, V &odd) const {
    E::pair(base + (block * 16 + p) * 2 * kPair, tile, even, odd);
  }
  // For several rows at a time the processor looks too little ahead by itself; for one it does not need to.
  MS_INLINE void ahead(int block, int p) const {
    const char *t = (const char *)(base + (block * 16 + p) * 2 * kPair) + 2048;
    for (size_t at = 0; at < 2 * kPair * sizeof(*base); at += 64) prefetch(t + at);
  }
};
struct Rows {
  const float *base;
  long stride;
  MS_INLINE void pair(int block, int p, int tile, V &even, V &odd) const {
    const float *row = base + (block * 32 + 2 * p) * stride + tile * 16;
    even = load(row);
    odd = load(row + stride);
  }
  MS_INLINE void ahead(int, int) const {}
};

// c[r][t] += rows r of A times tiles t of B. A[r][k] stands at a + r * row + k * kColumn. A function of its own, with
// its sums in memory between blocks: then the compiler has registers enough for all that a block needs.
template <int R, int T, int kColumn, class B>
MS_ALONE void accumulate(const float *a, long row, const B &b, int blocks, float (*c)[T][16]) {
  for (int block = 0; block < blocks; block++, a += 32 * kColumn) {
    V even[R][T], odd[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) even[r][t] = odd[r][t] = zeros();
    const float *k = a;
    for (int p = 0; p < 16; p++, k += 2 * kColumn) {
      V x[T], y[T];
      for (int t = 0; t < T; t++) b.pair(block, p, t, x[t], y[t]);
      if (R > 1) b.ahead(block, p);
      for (int r = 0; r < R; r++) {
        V first = splat(k[r * row]), second = splat(k[r * row + kColumn]);
        for (int t = 0; t < T; t++) {
          even[r][t] = fma(first, x[t], even[r][t]);
          odd[r][t] = fma(second, y[t], odd[r][t]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) store(c[r][t], add(load(c[r][t]), add(even[r][t], odd[r][t])));
  }
}

// R rows by T tiles from `tile` on: out.begin gives where a sum starts, out.end takes it.
template <int R, int T, int kColumn, class B, class Out>
MS_INLINE void some(const float *a, long row, const B &b, int blocks, int m, int tile, Out &out) {
  alignas(64) float c[R][T][16];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) store(c[r][t], out.begin(m + r, tile + t));
  accumulate<R, T, kColumn>(a + m * row, row, b, blocks, c);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) out.end(m + r, tile + t, load(c[r][t]));
}

template <int T, int kColumn, class B, class Out>
MS_INLINE void all_rows(const float *a, long row, int rows, const B &b, int blocks, int tile, Out &out) {
  int m = 0;
  for (; m + kRows <= rows; m += kRows) some<kRows, T, kColumn>(a, row, b, blocks, m, tile, out);
  for (; m + 2 <= rows; m += 2) some<2, T, kColumn>(a, row, b, blocks, m, tile, out);
  if (m < rows) some<1, T, kColumn>(a, row, b, blocks, m, tile, out);
}

// C of `rows` rows, tiles [first, last) of 16 columns; bs(tile) is B from that tile on.
template <int kColumn, class Bs, class Out>
MS_INLINE void multiply(const float *a, long row, int rows, Bs bs, int blocks, int first, int last, Out &out) {
  int tile = first;
  if (tile < last && (tile & 1)) all_rows<1, kColumn>(a, row, rows, bs(tile), blocks, tile, out), tile++;
  for (; tile + kTiles <= last; tile += kTiles) all_rows<kTiles, kColumn>(a, row, rows, bs(tile), blocks, tile, out);
  for (; tile < last; tile++) all_rows<1, kColumn>(a, row, rows, bs(tile), blocks, tile, out);
}

template <class E>
struct Packed {
  const typename E::Store *base;
  int blocks;
  MS_INLINE Tiles<E> operator()(int tile) const {
    return {base + (long)(tile >> 1) * blocks * kGroup + (tile & 1) * E::kTileStep};
  }
};
struct InRows {
  const float *base;
  long stride;
  MS_INLINE Rows operator()(int tile) const { return {base + tile * 16, stride}; }
};

// Where results go. kFromZero: every sum begins there; kInPlace: it begins and ends in c, and nothing else is done.
struct Put {  // C = A B
  static constexpr bool kFromZero = true, kInPlace = true;
  float *c;
  long stride;
  MS_INLINE V begin(int, int) { return zeros(); }
  MS_INLINE void end(int m, int tile, V sum) { store(c + m * stride + tile * 16, sum); }
};
struct Continue {  // C = C + A B
  static constexpr bool kFromZero = false, kInPlace = true;
  float *c;
  long stride;
  MS_INLINE V begin(int m, int tile) { return load(c + m * stride + tile * 16); }
  MS_INLINE void end(int m, int tile, V sum) { store(c + m * stride + tile * 16, sum); }
};
