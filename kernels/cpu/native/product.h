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

// c[r][t] += rows r of A times tiles t of B. A[r][k] stands at a + r * row + k * column.
template <int R, int T, class B>
MS_INLINE void accumulate(const float *a, long row, long column, const B &b, int blocks, V (&c)[R][T]) {
  for (int block = 0; block < blocks; block++) {
    V even[R][T], odd[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) even[r][t] = odd[r][t] = zeros();
    const float *k = a + block * 32 * column;
    for (int p = 0; p < 16; p++, k += 2 * column) {
      V x[T], y[T];
      for (int t = 0; t < T; t++) b.pair(block, p, t, x[t], y[t]);
      if (R > 1) b.ahead(block, p);
      for (int r = 0; r < R; r++) {
        V first = splat(k[r * row]), second = splat(k[r * row + column]);
        for (int t = 0; t < T; t++) {
          even[r][t] = fma(first, x[t], even[r][t]);
          odd[r][t] = fma(second, y[t], odd[r][t]);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) c[r][t] = add(c[r][t], add(even[r][t], odd[r][t]));
  }
}

// R rows by T tiles from `first` on: out.begin gives where a sum starts, out.end takes it.
template <int R, int T, class B, class Out>
MS_INLINE void block(const float *a, long row, long column, const B &b, int blocks, int m, int tile, Out &out) {
  V c[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) c[r][t] = out.begin(m + r, tile + t);
  accumulate<R, T>(a, row, column, b, blocks, c);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) out.end(m + r, tile + t, c[r][t]);
}

template <int T, class B, class Out>
MS_INLINE void some_rows(const float *a, long row, long column, int rows, const B &b, int blocks, int tile, Out &out) {
  int m = 0;
  for (; m + kRows <= rows; m += kRows) block<kRows, T>(a + m * row, row, column, b, blocks, m, tile, out);
  if (kRows > 2 && m + 2 <= rows) { block<(kRows > 2 ? 2 : 1), T>(a + m * row, row, column, b, blocks, m, tile, out); m += 2; }
  for (; m < rows; m++) block<1, T>(a + m * row, row, column, b, blocks, m, tile, out);
}

// C of `rows` rows, tiles [first, last) of 16 columns; Bs(tile) is B from that tile on.
template <class Bs, class Out>
MS_INLINE void multiply(const float *a, long row, long column, int rows, Bs bs, int blocks, int first, int last, Out &out) {
  int tile = first;
  if (tile < last && (tile & 1)) some_rows<1>(a, row, column, rows, bs(tile), blocks, tile, out), tile++;
  for (; tile + kTiles <= last; tile += kTiles) some_rows<kTiles>(a, row, column, rows, bs(tile), blocks, tile, out);
  for (; tile < last; tile++) some_rows<1>(a, row, column, rows, bs(tile), blocks, tile, out);
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

// Where results go.
struct Put {  // C = A B
  float *c;
  long stride;
  MS_INLINE V begin(int, int) { return zeros(); }
  MS_INLINE void end(int m, int tile, V sum) { store(c + m * stride + tile * 16, sum); }
};
struct Continue {  // C = C + A B
  float *c;
  long stride;
  MS_INLINE V begin(int m, int tile) { return load(c + m * stride + tile * 16); }
  MS_INLINE void end(int m, int tile, V sum) { store(c + m * stride + tile * 16, sum); }
};
