// Sixteen fp32 lanes in plain C++: right on any CPU with IEEE arithmetic, and slow. Included inside a variant's own namespace.
#pragma once

struct V { float x[16]; };
struct Ints { int32_t x[16]; };
struct Mask { bool x[16]; };
constexpr int kRows = 1, kTiles = 1;

#define MS_EACH for (int i = 0; i < 16; i++)
MS_INLINE uint32_t bits_of(float x) { uint32_t b; __builtin_memcpy(&b, &x, 4); return b; }
MS_INLINE float of_bits(uint32_t b) { float x; __builtin_memcpy(&x, &b, 4); return x; }
MS_INLINE V load(const float *p) { V r; MS_EACH r.x[i] = p[i]; return r; }
MS_INLINE void store(float *p, V a) { MS_EACH p[i] = a.x[i]; }
MS_INLINE V splat(float x) { V r; MS_EACH r.x[i] = x; return r; }
MS_INLINE V zeros() { return splat(0.0f); }
MS_INLINE V add(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] + b.x[i]; return r; }
MS_INLINE V sub(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] - b.x[i]; return r; }
MS_INLINE V mul(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] * b.x[i]; return r; }
MS_INLINE V div(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] / b.x[i]; return r; }
MS_INLINE V fma(V a, V b, V c) { V r; MS_EACH r.x[i] = __builtin_fmaf(a.x[i], b.x[i], c.x[i]); return r; }
MS_INLINE V fnma(V a, V b, V c) { V r; MS_EACH r.x[i] = __builtin_fmaf(-a.x[i], b.x[i], c.x[i]); return r; }
MS_INLINE V max(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return r; }
MS_INLINE V min(V a, V b) { V r; MS_EACH r.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i]; return r; }
MS_INLINE Ints ints(const int32_t *p) { Ints r; MS_EACH r.x[i] = p[i]; return r; }
MS_INLINE Ints splat_int(int32_t x) { Ints r; MS_EACH r.x[i] = x; return r; }
MS_INLINE Mask greater(Ints a, Ints b) { Mask r; MS_EACH r.x[i] = a.x[i] > b.x[i]; return r; }
MS_INLINE Mask both(Mask a, Mask b) { Mask r; MS_EACH r.x[i] = a.x[i] && b.x[i]; return r; }
MS_INLINE bool any(Mask m) { bool r = false; MS_EACH r = r || m.x[i]; return r; }
MS_INLINE V select(Mask m, V a, V b) { V r; MS_EACH r.x[i] = m.x[i] ? a.x[i] : b.x[i]; return r; }
MS_INLINE V add_exponent(V p, V n) { V r; MS_EACH r.x[i] = of_bits(bits_of(p.x[i]) + (bits_of(n.x[i]) << 23)); return r; }
MS_INLINE V round_bf16(V a) {
  V r;
  MS_EACH {
    uint32_t b = bits_of(a.x[i]);
    r.x[i] = a.x[i] != a.x[i] ? of_bits(0x7fc00000u) : of_bits((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
  }
  return r;
}
MS_INLINE V load_bf16(const uint16_t *p) { V r; MS_EACH r.x[i] = of_bits((uint32_t)p[i] << 16); return r; }
MS_INLINE V load_int8(const int8_t *p) { V r; MS_EACH r.x[i] = (float)p[i]; return r; }
MS_INLINE void store_bf16(uint16_t *p, V a) { MS_EACH p[i] = (uint16_t)(bits_of(a.x[i]) >> 16); }
MS_INLINE void load_pairs(const uint16_t *p, V &first, V &second) {
  MS_EACH { first.x[i] = of_bits((uint32_t)p[2 * i] << 16); second.x[i] = of_bits((uint32_t)p[2 * i + 1] << 16); }
}
MS_INLINE float tree_sum(V a) {
  for (int h = 8; h; h >>= 1)
    for (int i = 0; i < h; i++) a.x[i] = a.x[i] + a.x[i + h];
  return a.x[0];
}
MS_INLINE void prefetch(const void *) {}
MS_INLINE void prefetch_far(const void *) {}

// Pairs of bf16, as avx512bf16.h has them.
struct Pairs16 { uint32_t x[16]; };
constexpr int kDotRows = 1;
MS_INLINE Pairs16 load_words(const uint16_t *p) { Pairs16 r; __builtin_memcpy(r.x, p, 64); return r; }
MS_INLINE Pairs16 load_words(const int8_t *p) {
  Pairs16 r;
  MS_EACH r.x[i] = bits_of((float)p[2 * i]) >> 16 | bits_of((float)p[2 * i + 1]);
  return r;
}
MS_INLINE void load_two_words(const int8_t *p, Pairs16 &first, Pairs16 &second) { first = load_words(p), second = load_words(p + 32); }
MS_INLINE void store_words(uint16_t *p, Pairs16 a) { __builtin_memcpy(p, a.x, 64); }
MS_INLINE Pairs16 splat_pair(const uint16_t *p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  Pairs16 r;
  MS_EACH r.x[i] = word;
  return r;
}
MS_INLINE V dot(V sum, Pairs16 a, Pairs16 b) {
  V r;
  MS_EACH r.x[i] = __builtin_fmaf(of_bits(a.x[i] & 0xffff0000u), of_bits(b.x[i] & 0xffff0000u), sum.x[i]);
  MS_EACH r.x[i] = __builtin_fmaf(of_bits(a.x[i] << 16), of_bits(b.x[i] << 16), r.x[i]);
  return r;
}
MS_INLINE void transpose_words(const uint16_t *const *rows, long at, uint16_t *to, long step) {
  for (int word = 0; word < 16; word++)
    MS_EACH __builtin_memcpy(to + word * step + 2 * i, rows[i] + (at + word) * 2, 4);
}
MS_INLINE void interleave(const uint16_t *first, const uint16_t *second, uint16_t *to) {
  for (int i = 0; i < 32; i++) to[2 * i] = first[i], to[2 * i + 1] = second[i];
}
MS_INLINE void put_bf16(uint16_t *p, V a) { store_bf16(p, round_bf16(a)); }
MS_INLINE float tree_max(V a) {
  for (int h = 8; h; h >>= 1)
    for (int i = 0; i < h; i++) a.x[i] = a.x[i] > a.x[i + h] ? a.x[i] : a.x[i + h];
  return a.x[0];
}
#undef MS_EACH

#if defined(__x86_64__)
MS_INLINE unsigned enter_float_mode() {
  unsigned was = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  return was;
}
MS_INLINE void leave_float_mode(unsigned was) { _mm_setcsr(was); }
#elif defined(__aarch64__)
// Flush to zero. Results are called tiny before rounding here and after it on x86: a class of its own.
MS_INLINE unsigned long enter_float_mode() {
  unsigned long was, now;
  __asm__ volatile("mrs %0, fpcr" : "=r"(was));
  now = (was & ~(3ul << 22)) | (1ul << 24);
  __asm__ volatile("msr fpcr, %0" : : "r"(now));
  return was;
}
MS_INLINE void leave_float_mode(unsigned long was) { __asm__ volatile("msr fpcr, %0" : : "r"(was)); }
#else
MS_INLINE unsigned enter_float_mode() { return 0; }
MS_INLINE void leave_float_mode(unsigned) {}
#endif
