// The product on the tiles of AMX, and inputs as they read them. Included inside a variant's own namespace, behind
// step/product.h, whose sums these are to the bit: TDPBF16PS runs two chains of FMAs from +0 over the even and the odd of
// 32 k and adds their sum to C; to nearest, denormals zero both ways, whatever MXCSR says. How many rows and columns
// a tile has, and where C waits between blocks, is free.
//
// Written on a machine without AMX: tests run it in an emulation of these instructions (tests/kernels/cpu/tiles), and what
// an engine loads is compared with the portable variant first (library.is_right).
#pragma once

// bf16 that is multiplied in tiles. Weights and KV stand as for the others.
struct Bf16Tiles : Bf16 {};
typedef Bf16Tiles Half;

// [row / 16][column / 32][16 rows][32 columns] of bf16: a tile is 1 KiB that is read in order.
template <>
struct Inputs<Bf16Tiles> {
  typedef uint16_t T;
  static MS_INLINE long at(long width, long row, long column) {
    return (row & ~15L) * width + (column >> 5) * 512 + (row & 15) * 32 + (column & 31);
  }
  static MS_INLINE const T *rows(const T *from, long width, long row) { return from + row * width; }
  static MS_INLINE T *rows(T *from, long width, long row) { return from + row * width; }
  static MS_INLINE const T *blocks(const T *from, int block) { return from + block * 512; }
  static MS_INLINE void put_rounding(T *to, long width, long row, long column, V value) { put(to, width, row, column, round_bf16(value)); }
  static MS_INLINE void move(T *inputs, long width, long from, long to) {
    for (long i = 0; i < width; i += 32) __builtin_memcpy(inputs + at(width, to, i), inputs + at(width, from, i), 64);
  }
  static MS_INLINE void put(T *to, long width, long row, long column, V rounded, int n = 16) {
    if (n >= 16 && column % 16 == 0) return store_bf16(to + at(width, row, column), rounded);
    alignas(32) uint16_t x[16];
    store_bf16(x, rounded);
    for (int i = 0; i < n && i < 16; i++) to[at(width, row, column + i)] = x[i];
  }
};

// The intrinsics do not tell every compiler what they read (GCC 12: nothing of a tile, 8 bytes of a configuration):
// what they are to find in memory is put down before one of these.
MS_INLINE void settle() { __asm__ volatile("" : : : "memory"); }

MS_INLINE void release_tiles() { _tile_release(); }

// Which rows the tiles have: sums 0 to 3, A 4 and 5, B 6 and 7 of `pair`; sums 0 to 3, A 4, B 5 to 7 of a `stripe`.
// Loaded anew for every product: between two, whoever ran on this thread (on_layer, torch) may have loaded another.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
MS_INLINE void shape_pair(int upper, int lower) {
  TileShapes shapes;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = (uint8_t)upper;
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = (uint8_t)lower;
  settle();
  _tile_loadconfig(&shapes);
}
MS_INLINE void shape_stripe(int rows) {
  TileShapes shapes;
  for (int i = 0; i < 5; i++) shapes.rows[i] = (uint8_t)rows;
  settle();
  _tile_loadconfig(&shapes);
}

// The number of a tile is part of an instruction's name: one type for each.
template <int N>
struct Tile;
#define MS_TILE(n)                                                                                    \
  template <>                                                                                         \
  struct Tile<n> {                                                                                    \
    static MS_INLINE void zero() { _tile_zero(n); }                                                   \
    static MS_INLINE void load(const void *p, long bytes) { _tile_loadd(n, p, bytes); }               \
    static MS_INLINE void store(void *p, long bytes) { _tile_stored(n, p, bytes); }                   \
  };
MS_TILE(0) MS_TILE(1) MS_TILE(2) MS_TILE(3) MS_TILE(4) MS_TILE(5) MS_TILE(6) MS_TILE(7)
#undef MS_TILE

// A: tile (row / 16, block) is 16 rows of 64 bytes, `bytes` apart.
struct InTiles {
  const uint16_t *base;
  long width;
  static constexpr long bytes = 64;
  MS_INLINE const uint16_t *at(int row, int block) const { return base + row * width + block * 512; }
};
// B: packed as weights are, which come from memory in order; or in the cache already.
struct FromMemory {
  Packed<Bf16Tiles> packed;
  static constexpr bool kAhead = true;
};
struct FromCache {
  Packed<Bf16Tiles> packed;
  static constexpr bool kAhead = false;
};
constexpr long kPairBytes = 2 * kPair * sizeof(uint16_t);  // from two k of a tile to its next two

template <int N, class Out>
MS_INLINE void begin_tile(Out &out, int m, int tile) {
  if constexpr (Out::kFromZero) Tile<N>::zero();
  else Tile<N>::load(out.c + m * out.stride + tile * 16, out.stride * 4);
}
template <int N, class Out>
MS_INLINE void end_tile(Out &out, int m, int rows, int tile) {
  if constexpr (Out::kInPlace) {
    Tile<N>::store(out.c + m * out.stride + tile * 16, out.stride * 4);
  } else {
    alignas(64) float sums[16][16];
    Tile<N>::store(sums[0], 64);
    for (int i = 0; i < rows; i++) out.end(m + i, tile, load(sums[i]));
    settle();
  }
}
// Half of a group, and of the group four blocks ahead.
template <int N, class B>
MS_INLINE void load_weights(const uint16_t *tile, int block) {
  const uint16_t *p = tile + block * kGroup;
  if (B::kAhead)
    for (int line = 0; line < 16; line++) prefetch(p + 4 * kGroup + line * 2 * kPair);
  Tile<N>::load(p, kPairBytes);
}

// Up to 16 rows by T tiles: weights are read once.
template <int T, class A, class B, class Out>
MS_INLINE void stripe(const A &a, const B &b, int m, int rows, int tile, Out &out) {
  const uint16_t *b0 = b.packed(tile).base, *b1 = b.packed(tile + (T > 1)).base;
  const uint16_t *b2 = b.packed(tile + (T > 2 ? 2 : 0)).base, *b3 = b.packed(tile + (T > 2 ? 3 : 0)).base;
  begin_tile<0>(out, m, tile);
  if constexpr (T > 1) begin_tile<1>(out, m, tile + 1);
  if constexpr (T > 2) begin_tile<2>(out, m, tile + 2), begin_tile<3>(out, m, tile + 3);
  for (int k = 0; k < b.packed.blocks; k++) {
    Tile<4>::load(a.at(m, k), a.bytes);
    load_weights<5, B>(b0, k);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (T > 1) {
      load_weights<6, B>(b1, k);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (T > 2) {
      load_weights<7, B>(b2, k);
      _tile_dpbf16ps(2, 4, 7);
      load_weights<5, B>(b3, k);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  end_tile<0>(out, m, rows, tile);
  if constexpr (T > 1) end_tile<1>(out, m, rows, tile + 1);
  if constexpr (T > 2) end_tile<2>(out, m, rows, tile + 2), end_tile<3>(out, m, rows, tile + 3);
}

// 17 to 32 rows by T tiles, T <= 2: each tile that is read is multiplied twice.
template <int T, class A, class B, class Out>
MS_INLINE void pair(const A &a, const B &b, int m, int lower, int tile, Out &out) {
  const uint16_t *b0 = b.packed(tile).base, *b1 = b.packed(tile + (T > 1)).base;
  begin_tile<0>(out, m, tile);
  if constexpr (T > 1) begin_tile<1>(out, m, tile + 1);
  begin_tile<2>(out, m + 16, tile);
  if constexpr (T > 1) begin_tile<3>(out, m + 16, tile + 1);
  for (int k = 0; k < b.packed.blocks; k++) {
    Tile<4>::load(a.at(m, k), a.bytes);
    Tile<6>::load(b0 + k * kGroup, kPairBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (T > 1) {
      Tile<7>::load(b1 + k * kGroup, kPairBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    Tile<5>::load(a.at(m + 16, k), a.bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (T > 1) _tile_dpbf16ps(3, 5, 7);
  }
  end_tile<0>(out, m, 16, tile);
  if constexpr (T > 1) end_tile<1>(out, m, 16, tile + 1);
  end_tile<2>(out, m + 16, lower, tile);
  if constexpr (T > 1) end_tile<3>(out, m + 16, lower, tile + 1);
}

// C of `rows` rows, tiles [first, last) of 16 columns.
template <class A, class B, class Out>
MS_INLINE void multiply_tiles(const A &a, int rows, const B &b, int first, int last, Out &out) {
  settle();
  for (int m = 0; m < rows; m += 32) {
    const int left = rows - m;
    int tile = first;
    if (left <= 16) {
      shape_stripe(left);
      for (; tile + 4 <= last; tile += 4) stripe<4>(a, b, m, left, tile, out);
      if (tile + 2 <= last) stripe<2>(a, b, m, left, tile, out), tile += 2;
      if (tile < last) stripe<1>(a, b, m, left, tile, out);
      continue;
    }
    const int lower = left < 32 ? left - 16 : 16;
    shape_pair(16, lower);
    for (; tile + 2 <= last; tile += 2) pair<2>(a, b, m, lower, tile, out);
    if (tile < last) pair<1>(a, b, m, lower, tile, out);
  }
}

template <int kColumn, class Out>
MS_INLINE void multiply(const uint16_t *a, long width, int rows, Packed<Bf16Tiles> weights, int, int first, int last, Out &out) {
  multiply_tiles(InTiles{a, width}, rows, FromMemory{weights}, first, last, out);
}
