// What Python hands over: kernels/codec/native.py has the same fields.
#pragma once
#include <cstdint>

namespace ms {

enum Dtype : int32_t { kFloat32, kBfloat16, kFloat16 };
enum Coder : int32_t { kNone, kPack, kElsewhere, kRans };  // elsewhere: symbols as bytes, which Python codes (zstd)

struct Job {
  int32_t dtype, coder, num_heads, head_dim;
  int64_t num_tokens;
  int64_t widths[2];          // elements of a row of K, and of V; exact jobs alone
  const int32_t *levels[2];   // of each head
  const float *signs;         // [heads][dim], or null: not rotated
  uint8_t *rows[2];           // raw, as they lie
  int64_t strides[2];         // bytes from row to row
  uint8_t *symbols;           // [K | V][heads][tokens][dim] of coder kElsewhere, or first planes
  uint8_t *body;              // of a payload, behind the mask of heads
  int64_t room;               // bytes of body
};

// What an encoder says, but for a count of bytes.
constexpr int64_t kNoPayload = -1;

// What a decoder says, but for the count of bytes that it has used; native.py has the words.
enum Fault : int64_t {
  kShort = -1,
  kKeyScales = -2,
  kValueScales = -3,
  kSymbols = -4,
  kTable = -5,
  kFirstStates = -6,
  kWords = -7,
  kEnd = -8,
  kMemory = -9,
};

}  // namespace ms
