// Streams of sixteen states that take turns: kvcache/codec/rans.py says how they lie. Included once for each kind of CPU,
// without guard.

namespace ms {
namespace MS_ISA {

constexpr int kStates = 16, kBits = 12, kTotal = 1 << kBits;
constexpr uint32_t kLeast = 1 << 16;

struct Share {
  const uint32_t *size;  // of kTotal, of each symbol
  uint32_t start[256];
  double inverse[256];  // a little more than 1 / size: its quotients of 32 bits are right
};

MS_TARGET static void count_shares(const uint8_t *symbols, int64_t count, int levels, uint32_t *shares) {
  uint32_t seen[4][256] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) ++seen[k][symbols[i + k]];
  for (; i < count; ++i) ++seen[0][symbols[i]];
  int64_t sum = 0;
  for (int s = 0; s < levels; ++s) {
    const uint64_t all = (uint64_t)seen[0][s] + seen[1][s] + seen[2][s] + seen[3][s];
    const uint64_t share = all * kTotal / (uint64_t)count;
    shares[s] = all ? (share ? (uint32_t)share : 1) : 0;
    sum += shares[s];
  }
  for (int64_t over; (over = sum - kTotal) != 0;) {
    int most = 0;
    for (int s = 1; s < levels; ++s)
      if (shares[s] > shares[most]) most = s;
    const int64_t less = over < (int64_t)(shares[most] / 2) ? over : (int64_t)(shares[most] / 2);
    shares[most] = (uint32_t)((int64_t)shares[most] - less);
    sum -= less;
  }
}

// Returns bytes, or kNoPayload.
MS_TARGET static int64_t put_table(const uint32_t *shares, int levels, uint8_t *to, int64_t room) {
  const int64_t bitmap = (levels + 7) / 8;
  int64_t nbytes = bitmap;
  for (int s = 0; s < levels; ++s) nbytes += shares[s] ? 2 : 0;
  if (nbytes > room) return kNoPayload;
  memset(to, 0, (size_t)bitmap);
  uint8_t *at = to + bitmap;
  for (int s = 0; s < levels; ++s) {
    if (!shares[s]) continue;
    to[s / 8] |= (uint8_t)(1 << s % 8);
    *at++ = (uint8_t)shares[s];
    *at++ = (uint8_t)(shares[s] >> 8);
  }
  return nbytes;
}

// Sixteen symbols or, of the last of a group, fewer. Words go in front of `to`; null where there is no room.
MS_TARGET static inline uint8_t *encode_turn(const Share &share, const uint8_t *symbols, int count, uint32_t *states,
                                             uint8_t *to, const uint8_t *begin) {
  for (int lane = count - 1; lane >= 0; --lane) {
    const int s = symbols[lane];
    uint32_t x = states[lane];
    if (x >> (32 - kBits) >= share.size[s]) {
      if (to - begin < 2) return nullptr;
      const uint16_t word = (uint16_t)x;
      memcpy(to -= 2, &word, 2);
      x >>= 16;
    }
    const uint32_t q = (uint32_t)((double)x * share.inverse[s]);
    states[lane] = (q << kBits) + (x - q * share.size[s]) + share.start[s];
  }
  return to;
}

#if MS_AVX512
// Whole turns, the last first; stops where room is short.
MS_TARGET static inline int64_t encode_turns(const Share &share, const uint8_t *symbols, int64_t turns, uint32_t *states,
                                             uint8_t **to_, const uint8_t *begin) {
  uint8_t *to = *to_;
  __m512i x = _mm512_loadu_si512(states);
  for (; turns > 0 && to - begin >= 2 * kStates; --turns) {
    const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(symbols + (turns - 1) * kStates)));
    const __m512i size = _mm512_i32gather_epi32(s, share.size, 4), start = _mm512_i32gather_epi32(s, share.start, 4);
    const __m256i low = _mm512_castsi512_si256(s), high = _mm512_extracti64x4_epi64(s, 1);
    const __m512d inverse_low = _mm512_i32gather_pd(low, share.inverse, 8);
    const __m512d inverse_high = _mm512_i32gather_pd(high, share.inverse, 8);
    const __mmask16 large = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x, 32 - kBits), size);
    const int words = __builtin_popcount(large);
    to -= 2 * words;
    _mm256_mask_storeu_epi16(to, (__mmask16)((1u << words) - 1), _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(large, x)));
    x = _mm512_mask_srli_epi32(x, large, x, 16);
    const __m512d x_low = _mm512_cvtepu32_pd(_mm512_castsi512_si256(x));
    const __m512d x_high = _mm512_cvtepu32_pd(_mm512_extracti64x4_epi64(x, 1));
    const __m256i q_low = _mm512_cvttpd_epu32(_mm512_mul_pd(x_low, inverse_low));
    const __m256i q_high = _mm512_cvttpd_epu32(_mm512_mul_pd(x_high, inverse_high));
    const __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(q_low), q_high, 1);
    const __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(q, size));
    x = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(q, kBits), rest), start);
  }
  _mm512_storeu_si512(states, x);
  *to_ = to;
  return turns;
}

// Whole turns, the first first; stops where words may be short.
MS_TARGET static inline int64_t decode_turns(const uint32_t *slots, uint8_t *symbols, int64_t turns, uint32_t *states,
                                             const uint8_t **from_, const uint8_t *end) {
  const uint8_t *from = *from_;
  int64_t done = 0;
  __m512i x = _mm512_loadu_si512(states);
  for (; done < turns && end - from >= 2 * kStates; ++done) {
    const __m512i slot = _mm512_i32gather_epi32(_mm512_and_si512(x, _mm512_set1_epi32(kTotal - 1)), slots, 4);
    const __m512i less = _mm512_and_si512(_mm512_srli_epi32(slot, 8), _mm512_set1_epi32(kTotal - 1));
    const __m512i top = _mm512_srli_epi32(x, kBits);
    const __m512i all = _mm512_add_epi32(_mm512_mullo_epi32(less, top), top);
    x = _mm512_add_epi32(all, _mm512_srli_epi32(slot, 20));
    _mm_storeu_si128((__m128i *)(symbols + done * kStates), _mm512_cvtepi32_epi8(slot));
    const __mmask16 small = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32((int)kLeast));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    x = _mm512_mask_or_epi32(x, small, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(small, words));
    from += 2 * __builtin_popcount(small);
  }
  _mm512_storeu_si512(states, x);
  *from_ = from;
  return done;
}
#else
MS_TARGET static inline int64_t encode_turns(const Share &share, const uint8_t *symbols, int64_t turns, uint32_t *states,
                                             uint8_t **to_, const uint8_t *begin) {
  uint8_t *to = *to_;
  for (; turns > 0 && to - begin >= 2 * kStates; --turns) {
    const uint8_t *s = symbols + (turns - 1) * kStates;
    for (int lane = kStates - 1; lane >= 0; --lane) {
      uint32_t x = states[lane];
      const uint32_t size = share.size[s[lane]];
      const uint16_t word = (uint16_t)x;
      const int is_large = x >> (32 - kBits) >= size;
      memcpy(to - 2, &word, 2);
      to -= 2 * is_large;
      x >>= 16 * is_large;
      const uint32_t q = (uint32_t)((double)x * share.inverse[s[lane]]);
      states[lane] = (q << kBits) + (x - q * size) + share.start[s[lane]];
    }
  }
  *to_ = to;
  return turns;
}

MS_TARGET static inline int64_t decode_turns(const uint32_t *slots, uint8_t *symbols, int64_t turns, uint32_t *states,
                                             const uint8_t **from_, const uint8_t *end) {
  const uint8_t *from = *from_;
  int64_t done = 0;
  for (; done < turns && end - from >= 2 * kStates; ++done)
    for (int lane = 0; lane < kStates; ++lane) {
      uint32_t x = states[lane];
      const uint32_t slot = slots[x & (kTotal - 1)];
      symbols[done * kStates + lane] = (uint8_t)slot;
      x = ((slot >> 8 & (kTotal - 1)) + 1) * (x >> kBits) + (slot >> 20);
      uint16_t word;
      memcpy(&word, from, 2);
      const int is_small = x < kLeast;
      states[lane] = is_small ? x << 16 | word : x;
      from += 2 * is_small;
    }
  *from_ = from;
  return done;
}
#endif

// symbols: [groups][count]; shares: room for [groups][256]. Returns bytes, or kNoPayload.
MS_TARGET static int64_t encode_stream(const uint8_t *symbols, int groups, int64_t count, const int32_t *levels,
                                       uint32_t *shares, uint8_t *to, int64_t room) {
  int64_t tables = 0;
  for (int group = 0; group < groups; ++group) {
    count_shares(symbols + group * count, count, levels[group], shares + group * 256);
    const int64_t nbytes = put_table(shares + group * 256, levels[group], to + tables, room - tables);
    if (nbytes < 0) return kNoPayload;
    tables += nbytes;
  }
  if (room - tables < 4 * kStates) return kNoPayload;
  uint32_t states[kStates];
  for (uint32_t &state : states) state = kLeast;
  uint8_t *const begin = to + tables + 4 * kStates, *at = to + room;
  for (int group = groups - 1; group >= 0; --group) {
    const uint8_t *of = symbols + group * count;
    Share share;
    share.size = shares + group * 256;
    uint32_t start = 0;
    for (int s = 0; s < levels[group]; ++s) {
      share.start[s] = start;
      start += share.size[s];
      share.inverse[s] = share.size[s] ? 1.0 / share.size[s] * (1.0 + 0x1p-50) : 0.0;
    }
    int64_t turns = count / kStates;
    if (!(at = encode_turn(share, of + turns * kStates, (int)(count % kStates), states, at, begin))) return kNoPayload;
    while ((turns = encode_turns(share, of, turns, states, &at, begin)) > 0) {
      if (!(at = encode_turn(share, of + --turns * kStates, kStates, states, at, begin))) return kNoPayload;
    }
  }
  memcpy(to + tables, states, sizeof states);
  const int64_t words = to + room - at;
  memmove(begin, at, (size_t)words);
  return tables + 4 * kStates + words;
}

// Of one group, from `from` on: what each of kTotal slots means. Returns bytes, or a fault.
MS_TARGET static int64_t read_table(const uint8_t *from, int64_t left, int levels, uint32_t *slots) {
  const int64_t bitmap = (levels + 7) / 8;
  if (left < bitmap) return kTable;
  for (int s = levels; s < bitmap * 8; ++s)
    if (from[s / 8] >> s % 8 & 1) return kTable;
  int64_t at = bitmap;
  uint32_t start = 0;
  for (uint32_t s = 0; s < (uint32_t)levels; ++s) {
    if (!(from[s / 8] >> s % 8 & 1)) continue;
    if (left - at < 2) return kTable;
    const uint32_t size = from[at] | (uint32_t)from[at + 1] << 8;
    at += 2;
    if (size == 0 || size > kTotal - start) return kTable;
    for (uint32_t i = 0; i < size; ++i) slots[start + i] = s | (size - 1) << 8 | i << 20;
    start += size;
  }
  return start == kTotal ? at : (int64_t)kTable;
}

// slots: kTotal. Returns 0 or a fault; all of the stream is used.
MS_TARGET static int64_t decode_stream(const uint8_t *from, int64_t nbytes, int groups, int64_t count, const int32_t *levels,
                                       uint32_t *slots, uint8_t *symbols) {
  const uint8_t *const end = from + nbytes, *table = from, *at = from;
  for (int group = 0; group < groups; ++group) {  // where tables end
    const int64_t used = read_table(at, end - at, levels[group], slots);
    if (used < 0) return used;
    at += used;
  }
  if (end - at < 4 * kStates) return kFirstStates;
  uint32_t states[kStates];
  memcpy(states, at, sizeof states);
  at += sizeof states;
  for (const uint32_t state : states)
    if (state < kLeast) return kFirstStates;
  if ((end - at) % 2) return kWords;
  for (int group = 0; group < groups; ++group, symbols += count) {
    if (groups > 1) table += read_table(table, end - table, levels[group], slots);
    const int64_t turns = count / kStates;
    int64_t done = decode_turns(slots, symbols, turns, states, &at, end);
    for (int64_t i = done * kStates; i < count; ++i) {
      uint32_t &x = states[i % kStates];
      const uint32_t slot = slots[x & (kTotal - 1)];
      symbols[i] = (uint8_t)slot;
      x = ((slot >> 8 & (kTotal - 1)) + 1) * (x >> kBits) + (slot >> 20);
      if (x >= kLeast) continue;
      if (end - at < 2) return kWords;
      uint16_t word;
      memcpy(&word, at, 2);
      at += 2;
      x = x << 16 | word;
    }
  }
  if (at != end) return kEnd;
  for (const uint32_t state : states)
    if (state != kLeast) return kEnd;
  return 0;
}

}  // namespace MS_ISA
}  // namespace ms
