// Sixteen fp32 lanes in two AVX2 registers, with FMA. Included inside a variant's own namespace.
#pragma once

struct V { __m256 lo, hi; };
struct Ints { __m256i lo, hi; };
struct Mask { __m256i lo, hi; };
constexpr int kRows = 2, kTiles = 1;

MS_INLINE V load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MS_INLINE void store(float *p, V a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
MS_INLINE V splat(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
MS_INLINE V zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MS_INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
MS_INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
MS_INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
MS_INLINE V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
MS_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
MS_INLINE V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
MS_INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
MS_INLINE V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
MS_INLINE Ints ints(const int32_t *p) { return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))}; }
MS_INLINE Ints splat_int(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
MS_INLINE Mask greater(Ints a, Ints b) { return {_mm256_cmpgt_epi32(a.lo, b.lo), _mm256_cmpgt_epi32(a.hi, b.hi)}; }
MS_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
MS_INLINE bool any(Mask m) { return _mm256_movemask_epi8(_mm256_or_si256(m.lo, m.hi)) != 0; }
MS_INLINE V select(Mask m, V a, V b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(m.lo)), _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(m.hi))};
}
MS_INLINE __m256 half_add_exponent(__m256 p, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
MS_INLINE V add_exponent(V p, V n) { return {half_add_exponent(p.lo, n.lo), half_add_exponent(p.hi, n.hi)}; }
MS_INLINE __m256 half_round_bf16(__m256 a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 cut = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u)));
  return _mm256_blendv_ps(cut, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
MS_INLINE V round_bf16(V a) { return {half_round_bf16(a.lo), half_round_bf16(a.hi)}; }
MS_INLINE __m256 half_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
MS_INLINE V load_bf16(const uint16_t *p) { return {half_load_bf16(p), half_load_bf16(p + 8)}; }
MS_INLINE V load_int8(const int8_t *p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
MS_INLINE void store_bf16(uint16_t *p, V a) {
  __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(a.lo), 16), hi = _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16);
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8));
}
MS_INLINE void load_pairs(const uint16_t *p, V &first, V &second) {
  __m256i lo = _mm256_loadu_si256((const __m256i *)p), hi = _mm256_loadu_si256((const __m256i *)(p + 16));
  __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)), _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}
MS_INLINE float tree_sum(V a) {
  __m256 v = _mm256_add_ps(a.lo, a.hi);                                       // 8 apart
  __m128 w = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));  // 4
  w = _mm_add_ps(w, _mm_movehl_ps(w, w));                                     // 2
  return _mm_cvtss_f32(_mm_add_ss(w, _mm_shuffle_ps(w, w, 1)));
}
MS_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
MS_INLINE unsigned enter_float_mode() {
  unsigned was = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  return was;
}
MS_INLINE void leave_float_mode(unsigned was) { _mm_setcsr(was); }
