// avx512.h, and pairs of bf16 in one register, multiplied by VDPBF16PS: the odd ones first, then the even ones, each
// a correctly rounded FMA; denormals zero both ways, whatever MXCSR says. A CPU that does it otherwise is refused
// when the object is loaded (library.is_right). Included inside a variant's own namespace.
#pragma once
#include "avx512.h"

struct Pairs16 { __m512i v; };  // sixteen pairs, the even one in the lower half of each word
constexpr int kDotRows = 8;     // sixteen sums of VDPBF16PS, two registers of weights: 98 % of what it can do

MS_INLINE Pairs16 load_words(const uint16_t *p) { return {_mm512_loadu_si512(p)}; }
MS_INLINE Pairs16 load_words(const int8_t *p) {  // whole numbers, which bf16 holds
  return {(__m512i)_mm512_cvtne2ps_pbh(load_int8(p + 16).v, load_int8(p).v)};
}
MS_INLINE void load_two_words(const int8_t *p, Pairs16 &first, Pairs16 &second) { load_bf16_of_int8(p, first.v, second.v); }
MS_INLINE void store_words(uint16_t *p, Pairs16 a) { _mm512_storeu_si512(p, a.v); }
MS_INLINE Pairs16 splat_pair(const uint16_t *p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
MS_INLINE V dot(V sum, Pairs16 a, Pairs16 b) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }
// Words `at` to `at` + 15 of sixteen rows -> to[word][row], `step` elements from word to word.
MS_INLINE void transpose_words(const uint16_t *const *rows, long at, uint16_t *to, long step) {
  V columns[16];
  transpose((const char *const *)rows, at * 4, columns);
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * step, _mm512_castps_si512(columns[i].v));
}
// 32 of two rows -> [32][2].
MS_INLINE void interleave(const uint16_t *first, const uint16_t *second, uint16_t *to) {
  alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second), at = _mm512_load_si512(low);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, at, b));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, _mm512_add_epi16(at, _mm512_set1_epi16(16)), b));
}
// Rounded and put down; of what no denormal is (arithmetic makes none), as round_bf16 does it.
MS_INLINE void put_bf16(uint16_t *p, V a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
MS_INLINE float tree_max(V a) { return _mm512_reduce_max_ps(a.v); }
