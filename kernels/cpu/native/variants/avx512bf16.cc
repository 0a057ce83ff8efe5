// AVX512 lanes, and bf16 products in pairs; fp32 is left to the variant avx512. Without a compiler for them an empty
// table is left (compiler.py).
#if defined(__AVX512BF16__)
#define MS_VARIANT avx512bf16
#define MS_LANES "../lanes/avx512bf16.h"
#define MS_PAIRS
#define MS_PAIRS_ALONE
#define MS_TABLE avx512bf16_variant
#include "variant.h"
#else
#include "../model.h"
namespace ms {
const Variant avx512bf16_variant = {nullptr, nullptr, nullptr};
}
#endif
