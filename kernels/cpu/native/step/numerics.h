// What is computed, to the bit: the numerics classes, which differ in the product alone. Included inside a variant's
// own namespace, behind its lanes.
//
//   product    C[m][n] (+)= sum of A[m][k] B[k][n], k ascending, never split, and padded with zeros to blocks of 32.
//              A sum that continues (the residual) starts from C, another one from +0.
//     cpu1     of blocks: in each two chains of fp32 FMAs from +0, one over the even k and one over the odd; then
//              C = C + (even + odd). What AMX computes, and what AVX512, AVX2 and any CPU can.
//     cpu2     of pairs, bf16 only: one chain of fp32 FMAs through C; of k, k + 1 first the odd one, then the even one.
//              What VDPBF16PS computes, and what any CPU can; AMX cannot.
//     int8     weights of layers and of the head (pack.h): whole numbers, exact in bf16 and fp32, multiplied as they are
//              by cpu1 or cpu2 from +0; then C = sum * scale of the column, and of a sum that continues C = sum * scale + C
//              in one FMA. Rows of the embedding that are looked up stay in the elem.
//   rows       norm: squares by 16 lanes of FMAs, then tree_sum; 1 / sqrt(mean + eps) by correctly rounded steps.
//   attention  in segments of 256 absolute positions, see attention.h.
//   rounding   to nearest, ties to even; denormals are zero; to the elem of the model where a value is put down
//              for a product or for the pool (bf16: by integers; f32: nothing to round). The residual is fp32.
//
// No function here depends on how many rows there are, nor on threads. Every FMA is written out and
// -ffp-contract=off keeps the compiler from making others. Only correctly rounded operations and integers:
// no reciprocal or root estimates, which differ between makers.
#pragma once

constexpr float kLog2e = 1.44269504f;
constexpr float kFiniteBf16 = 3.38953139e38f;  // largest
constexpr float kFiniteF32 = 3.40282347e38f;

// 2^t for t <= 127; below -126 as there. Exactly 1 at 0, elsewhere within 2e-7.
MS_INLINE V exp2v(V t) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  t = max(splat(-126.0f), t);          // in this order a NaN stays one
  V n = add(t, magic), r = sub(t, sub(n, magic));
  V p = fma(splat(1.32647273e-3f), r, splat(9.67151299e-3f));
  p = fma(p, r, splat(5.55073470e-2f));
  p = fma(p, r, splat(2.40222424e-1f));
  p = fma(p, r, splat(6.93147004e-1f));
  p = fma(p, r, splat(1.0f));
  return add_exponent(p, n);
}

MS_INLINE V silu(V g) {
  V e = exp2v(min(splat(126.0f), mul(g, splat(-kLog2e))));
  return div(g, add(splat(1.0f), e));
}

// An element type: how weights, activations and KV stand in memory. Values in registers are always fp32.
struct Bf16 {
  typedef uint16_t Store;
  static MS_INLINE V round(V a) { return round_bf16(a); }
  static MS_INLINE V get(const Store *p) { return load_bf16(p); }
  static MS_INLINE void put(Store *p, V rounded) { store_bf16(p, rounded); }
  static MS_INLINE float get1(const Store *p) { uint32_t b = (uint32_t)*p << 16; float x; __builtin_memcpy(&x, &b, 4); return x; }
  // Two k of both tiles: [2 tiles][16 n][2 k].
  static constexpr int kTileStep = 32;
  static MS_INLINE void pair(const Store *p, int tile, V &even, V &odd) { load_pairs(p + tile * 32, even, odd); }
  static MS_INLINE int at(int k, int n) { return (n >> 4) * 32 + (n & 15) * 2 + (k & 1); }
  static MS_INLINE float finite() { return kFiniteBf16; }
};
struct F32 {
  typedef float Store;
  static MS_INLINE V round(V a) { return a; }
  static MS_INLINE V get(const Store *p) { return load(p); }
  static MS_INLINE void put(Store *p, V a) { store(p, a); }
  static MS_INLINE float get1(const Store *p) { return *p; }
  // Two k of both tiles: [2 k][2 tiles][16 n].
  static constexpr int kTileStep = 16;
  static MS_INLINE void pair(const Store *p, int tile, V &even, V &odd) { even = load(p + tile * 16); odd = load(p + 32 + tile * 16); }
  static MS_INLINE int at(int k, int n) { return (k & 1) * 32 + n; }
  static MS_INLINE float finite() { return kFiniteF32; }
};
constexpr long kPair = 32;           // elements of two k of a tile of 16 columns
constexpr long kGroup = 32 * kPair;  // of 32 k of a group of two tiles

// n of 16 elements, n > 0; those behind are zero, and are not written.
template <class E>
MS_INLINE V get_some(const typename E::Store *p, int n) {
  if (n >= 16) return E::get(p);
  alignas(64) float x[16] = {};
  for (int i = 0; i < n; i++) x[i] = E::get1(p + i);
  return load(x);
}
template <class E>
MS_INLINE void put_some(typename E::Store *p, V rounded, int n) {
  if (n >= 16) return E::put(p, rounded);
  alignas(64) typename E::Store x[16];
  E::put(x, rounded);
  for (int i = 0; i < n; i++) p[i] = x[i];
}

// Inputs of products, as the product reads them: rows of fp32, rounded. Tiles and pairs have them otherwise; `rows` is
// where those from row r on stand, r a multiple of 16.
template <class E>
struct Inputs {
  typedef float T;
  static MS_INLINE const T *rows(const T *from, long width, long row) { return from + row * width; }
  static MS_INLINE T *rows(T *from, long width, long row) { return from + row * width; }
  static MS_INLINE const T *blocks(const T *from, int block) { return from + block * 32; }  // from this block of k on
  static MS_INLINE void put(T *to, long width, long row, long column, V rounded, int n = 16) {
    put_some<F32>(to + row * width + column, rounded, n);
  }
  // Of arithmetic's results, which are no denormals; to be rounded first.
  static MS_INLINE void put_rounding(T *to, long width, long row, long column, V value) { put(to, width, row, column, E::round(value)); }
  // Row `from` to the place of row `to`.
  static MS_INLINE void move(T *inputs, long width, long from, long to) {
    __builtin_memcpy(rows(inputs, width, to), rows(inputs, width, from), sizeof(T) * (size_t)width);
  }
};

// An infinity or NaN in the pool would reach rows that do not see its position: 0 * inf. Who computed it still has it.
template <class E>
MS_INLINE V clamped(V a) { return max(min(a, splat(E::finite())), splat(-E::finite())); }

// 1 / sqrt(mean square + eps) of n floats, n a multiple of 16.
MS_INLINE float norm_factor(const float *x, int n, int count, float eps) {
  V s = zeros();
  for (int i = 0; i < n; i += 16) { V v = load(x + i); s = fma(v, v, s); }
  return 1.0f / __builtin_sqrtf(tree_sum(s) / (float)count + eps);
}
