// Sixteen fp32 lanes in one AVX512 register. Included inside a variant's own namespace; same functions as its siblings.
#pragma once

struct V { __m512 v; };
struct Ints { __m512i v; };
struct Mask { __mmask16 v; };
constexpr int kRows = 4, kTiles = 2;  // of the product's inner kernel: accumulators stay in registers

MS_INLINE V load(const float *p) { return {_mm512_loadu_ps(p)}; }
MS_INLINE void store(float *p, V a) { _mm512_storeu_ps(p, a.v); }
MS_INLINE V splat(float x) { return {_mm512_set1_ps(x)}; }
MS_INLINE V zeros() { return {_mm512_setzero_ps()}; }
MS_INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
MS_INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
MS_INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
MS_INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
MS_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }   // a * b + c
MS_INLINE V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
MS_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }               // b where one is NaN
MS_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
MS_INLINE Ints ints(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
MS_INLINE Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
MS_INLINE Mask greater(Ints a, Ints b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
MS_INLINE Mask both(Mask a, Mask b) { return {(__mmask16)(a.v & b.v)}; }
MS_INLINE bool any(Mask m) { return m.v != 0; }
MS_INLINE V select(Mask m, V a, V b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
// The bits of n, shifted into an exponent, added to those of p.
MS_INLINE V add_exponent(V p, V n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
// To the nearest bf16, ties to even; NaN stays NaN.
MS_INLINE V round_bf16(V a) {
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(cut, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000)))};
}
MS_INLINE V load_bf16(const uint16_t *p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16))};
}
MS_INLINE V load_int8(const int8_t *p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)))}; }
#if defined(__AVX512VBMI__)
// The bytes of 0 to 127 as bf16, each exact.
struct Bf16Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Bf16Bytes() : low(), high() {
    for (int i = 1; i < 128; i++) {
      int exponent = 6;
      while (!(i >> exponent)) exponent--;
      const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 127);
      low[i] = (uint8_t)bits;
      high[i] = (uint8_t)(bits >> 8);
    }
  }
};
constexpr Bf16Bytes kBf16Bytes;
// 64 whole numbers, 8 bits each -> 64 of bf16, by tables: in half the time of converting them.
#define MS_TABLES 1
MS_INLINE void load_bf16_of_int8(const int8_t *p, __m512i &first, __m512i &second) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking works in quarters
  const __m512i x = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p)), size = _mm512_abs_epi8(x);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBf16Bytes.low), size, _mm512_load_si512(kBf16Bytes.low + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kBf16Bytes.high), size, _mm512_load_si512(kBf16Bytes.high + 64));
  const __m512i both = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8((char)0x80), 0xf8);  // high | sign of x
  first = _mm512_unpacklo_epi8(low, both);
  second = _mm512_unpackhi_epi8(low, both);
}
#endif
// What round_bf16 gave.
MS_INLINE void store_bf16(uint16_t *p, V a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
// 16 pairs of bf16 -> first and second of each pair.
MS_INLINE void load_pairs(const uint16_t *p, V &first, V &second) {
  __m512i w = _mm512_loadu_si512(p);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u)));
}
// Lanes 8 apart are added, then 4, 2, 1.
MS_INLINE float tree_sum(V a) {
  __m512 v = a.v;
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  return _mm512_cvtss_f32(v);
}
// 16 rows of 16 words of 32 bits, word j of all rows -> columns[j].
#define MS_TRANSPOSES 1
MS_INLINE void transpose(__m512i (&r)[16], V *columns) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  // r[4 * i + j]: of rows 4 i to 4 i + 3, words j, 4 + j, 8 + j, 12 + j in its four quarters.
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; j++) {
    columns[j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[j], t[8 + j], 0x88));
    columns[8 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd));
    columns[4 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88));
    columns[12 + j].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd));
  }
}
MS_INLINE void transpose(const char *const *rows, long offset, V *columns) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + offset);
  transpose(r, columns);
}
MS_INLINE void split_pairs(V pairs, V &first, V &second) {
  __m512i w = _mm512_castps_si512(pairs.v);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u)));
}
MS_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
MS_INLINE void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
// Round to nearest, denormals are zero in both directions, no traps.
MS_INLINE unsigned enter_float_mode() {
  unsigned was = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  return was;
}
MS_INLINE void leave_float_mode(unsigned was) { _mm_setcsr(was); }
