// float16 by integers, as every CPU has them: to nearest, and to the next one below or above.
#pragma once
#include <cstdint>
#include <cstring>

namespace ms {

inline uint32_t bits_of(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

// Of a float16 that is a number; others become something beyond 65504.
inline float from_half(uint16_t half) {
  const float number = float_of((uint32_t)(half & 0x7fff) << 13) * float_of(0x77800000u);  // * 2^112
  return float_of(bits_of(number) | (uint32_t)(half & 0x8000) << 16);
}

// Ties to even. What is beyond becomes infinite, or another one that is no number.
inline uint16_t to_half(float number) {
  const uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000;
  uint32_t most = bits & 0x7fffffff;
  const uint32_t large = most > 0x47800000u ? 0x47800000u : most;  // 65536
  const uint32_t normal = (large - 0x38000000u + 0xfff + (large >> 13 & 1)) >> 13;
  const uint32_t small = bits_of(float_of(most < 0x38800000u ? most : 0u) + 0.5f) - 0x3f000000u;
  return (uint16_t)(sign | (most < 0x38800000u ? small : normal));
}

inline bool is_number(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// The next float16 below (towards < 0) or above, where it is none itself.
inline uint16_t half_towards(float number, int towards) {
  const uint16_t half = to_half(number);
  if (!is_number(half)) return half;  // infinite either way
  const float back = from_half(half);
  if (towards < 0 ? back <= number : back >= number) return half;
  if ((half & 0x7fff) == 0) return towards < 0 ? 0x8001 : 0x0001;
  return (uint16_t)(half + ((towards < 0) == (half >> 15) ? 1 : -1));
}

inline uint16_t half_at(const uint8_t *halves, int64_t i) {
  uint16_t half;
  memcpy(&half, halves + 2 * i, 2);
  return half;
}

// Which levels heads have, the most first: one or two.
struct Group {
  int count = 0;
  int32_t levels[2] = {0, 0};

  Group(const int32_t *of, int heads) {
    for (int head = 0; head < heads; ++head) {
      if (count && of[head] == levels[0]) continue;
      if (count == 2) break;
      if (count == 1 && of[head] > levels[0]) levels[1] = levels[0], levels[0] = of[head];
      else levels[count] = of[head];
      ++count;
      if (count == 2) break;
    }
  }
};

}  // namespace ms
