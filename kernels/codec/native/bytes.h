// Symbols as bits, elements as planes of bytes: kvcache/codec/{pack,planes}.py say how they lie. Included once for
// each kind of CPU, without guard.

namespace ms {
namespace MS_ISA {

static inline int bits_for(int levels) { return 32 - __builtin_clz((unsigned)levels - 1); }

// Eight symbols, a byte each, as eight times `bits` bits; and back.
MS_TARGET static inline uint64_t squeezed(uint64_t x, int bits) {
  const uint64_t one = (1u << bits) - 1;
  const uint64_t two = (1u << 2 * bits) - 1, four = ((uint64_t)1 << 4 * bits) - 1;
  x = (x & one * 0x0001000100010001u) | (x >> (8 - bits) & (one << bits) * 0x0001000100010001u);
  x = (x & two * 0x0000000100000001u) | (x >> (16 - 2 * bits) & (two << 2 * bits) * 0x0000000100000001u);
  return (x & four) | (x >> (32 - 4 * bits) & four << 4 * bits);
}

MS_TARGET static inline uint64_t spread(uint64_t x, int bits) {
  const uint64_t one = (1u << bits) - 1;
  const uint64_t two = (1u << 2 * bits) - 1, four = ((uint64_t)1 << 4 * bits) - 1;
  x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
  x = (x & two * 0x0000000100000001u) | (x << (16 - 2 * bits) & two * 0x0000000100000001u << 16);
  return (x & one * 0x0001000100010001u) | (x << (8 - bits) & one * 0x0001000100010001u << 8);
}

// Returns bytes written, or kNoPayload.
MS_TARGET static int64_t pack(const uint8_t *symbols, int64_t count, int levels, uint8_t *to, int64_t room) {
  const int bits = bits_for(levels);
  const int64_t nbytes = (count * bits + 7) / 8;
  if (nbytes > room) return kNoPayload;
  int64_t i = 0, at = 0;
  for (; i + 8 <= count && at + 8 <= room; i += 8, at += bits) {  // what is written too far is written again
    uint64_t eight;
    memcpy(&eight, symbols + i, 8);
    eight = squeezed(eight, bits);
    memcpy(to + at, &eight, 8);
  }
  for (; i < count; i += 8, at += bits) {
    uint64_t eight = 0;
    const int64_t left = count - i < 8 ? count - i : 8;
    memcpy(&eight, symbols + i, (size_t)left);
    eight = squeezed(eight, bits);
    memcpy(to + at, &eight, (size_t)((left * bits + 7) / 8));
  }
  return nbytes;
}

// Returns bytes read, or kShort.
MS_TARGET static int64_t unpack(const uint8_t *from, int64_t left, int64_t count, int levels, uint8_t *symbols) {
  const int bits = bits_for(levels);
  const int64_t nbytes = (count * bits + 7) / 8;
  if (nbytes > left) return kShort;
  int64_t i = 0, at = 0;
  for (; i + 8 <= count && at + 8 <= left; i += 8, at += bits) {
    uint64_t eight;
    memcpy(&eight, from + at, 8);
    eight = spread(eight, bits);
    memcpy(symbols + i, &eight, 8);
  }
  for (; i < count; i += 8, at += bits) {
    uint64_t eight = 0;
    const int64_t some = count - i < 8 ? count - i : 8;
    memcpy(&eight, from + at, (size_t)((some * bits + 7) / 8));
    eight = spread(eight, bits);
    memcpy(symbols + i, &eight, (size_t)some);
  }
  return nbytes;
}

// first: [elements]; rest: [bytes of an element - 1][elements].
MS_TARGET static void split(const uint8_t *row, int64_t width, int item, uint8_t *first, uint8_t *rest, int64_t plane) {
  if (item == 2) {
    for (int64_t i = 0; i < width; ++i) {
      uint16_t word;
      memcpy(&word, row + 2 * i, 2);
      word = (uint16_t)(word << 1 | word >> 15);
      first[i] = (uint8_t)(word >> 8);
      rest[i] = (uint8_t)word;
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    uint32_t word;
    memcpy(&word, row + 4 * i, 4);
    word = word << 1 | word >> 31;
    first[i] = (uint8_t)(word >> 24);
    rest[i] = (uint8_t)(word >> 16);
    rest[plane + i] = (uint8_t)(word >> 8);
    rest[2 * plane + i] = (uint8_t)word;
  }
}

MS_TARGET static void join(const uint8_t *first, const uint8_t *rest, int64_t plane, int64_t width, int item, uint8_t *row) {
  if (item == 2) {
    for (int64_t i = 0; i < width; ++i) {
      uint16_t word = (uint16_t)(first[i] << 8 | rest[i]);
      word = (uint16_t)(word >> 1 | word << 15);
      memcpy(row + 2 * i, &word, 2);
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    uint32_t word = (uint32_t)first[i] << 24 | (uint32_t)rest[i] << 16 | (uint32_t)rest[plane + i] << 8 | rest[2 * plane + i];
    word = word >> 1 | word << 31;
    memcpy(row + 4 * i, &word, 4);
  }
}

}  // namespace MS_ISA
}  // namespace ms
