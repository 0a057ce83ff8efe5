// The C interface of codecs, by the best this CPU has: the same bytes whatever that is. kvcache/codec/ has them in numpy.
//
// Compiled without contraction of products and sums: which roundings there are is part of the form.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../cpu/native/door/cpu.h"
#include "job.h"
#include "halves.h"

namespace ms {

// Floats that encoding needs beside symbols.
static inline int64_t encode_numbers(const Job &job) {
  const int64_t keys = (job.num_tokens + 2) * job.head_dim, values = (int64_t)job.num_heads * job.head_dim;
  return keys > values ? keys : values;
}

}  // namespace ms

#define MS_ISA portable
#define MS_TARGET
#include "levels.h"
#include "bytes.h"
#include "rans.h"
#include "payload.h"
#undef MS_ISA
#undef MS_TARGET

#if defined(__x86_64__)
#define MS_ISA avx2
#define MS_TARGET __attribute__((target("avx2")))
#include "levels.h"
#include "bytes.h"
#include "rans.h"
#include "payload.h"
#undef MS_ISA
#undef MS_TARGET

#define MS_AVX512 1
#define MS_ISA avx512
#define MS_TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#include "levels.h"
#include "bytes.h"
#include "rans.h"
#include "payload.h"
#endif

namespace {

using Work = int64_t (*)(const ms::Job &, uint8_t *);

struct Variant {
  const char *name;
  bool runs;
  Work work[4];  // encode, decode, encode_planes, decode_planes
};

#define MS_WORK(isa) {ms::isa::encode, ms::isa::decode, ms::isa::encode_planes, ms::isa::decode_planes}
#if defined(__x86_64__)
const ms::Cpu kCpu;
const Variant kVariants[] = {
    {"portable", true, MS_WORK(portable)}, {"avx2", kCpu.avx2, MS_WORK(avx2)}, {"avx512", kCpu.avx512, MS_WORK(avx512)}};
#else
const Variant kVariants[] = {{"portable", true, MS_WORK(portable)}};
#endif
constexpr int kNumVariants = sizeof kVariants / sizeof kVariants[0];

// Bytes beside what Python gives: numbers, tables and symbols.
int64_t memory_of(const ms::Job &job) {
  const int64_t symbols = job.num_tokens * (job.widths[0] + job.widths[1]);
  const int64_t tables = 4 * 4096 + 4 * 256 * (int64_t)job.num_heads;
  return 4 * ms::encode_numbers(job) + 12 * (int64_t)job.head_dim + tables + symbols + 64;
}

}  // namespace

#define MS_DOOR extern "C" __attribute__((visibility("default")))

// The best that runs here, or -1 where `variant` does not.
MS_DOOR int32_t ms_codec_variant(const char *variant) {
  for (int i = kNumVariants - 1; i >= 0; --i)
    if (kVariants[i].runs && (!*variant || !strcmp(kVariants[i].name, variant))) return i;
  return -1;
}

// work: 0 encode, 1 decode, 2 encode planes, 3 decode planes. Bytes, or what job.h says.
MS_DOOR int64_t ms_codec_work(int32_t variant, int32_t work, const ms::Job *job) {
  uint8_t *memory = (uint8_t *)malloc((size_t)memory_of(*job));
  if (!memory) return ms::kMemory;
  const int64_t told = kVariants[variant].work[work](*job, memory);
  free(memory);
  return told;
}
