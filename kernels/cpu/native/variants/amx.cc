// AVX512 lanes, and bf16 products in tiles. Without a compiler for them an empty table is left (compiler.py).
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) || defined(MS_EMULATE_AMX)
#include <immintrin.h>
#if defined(MS_EMULATE_AMX)
#include MS_EMULATE_AMX  // in tests: the instructions in C++
#endif
#define MS_VARIANT amx
#define MS_LANES "../lanes/avx512.h"
#define MS_TILES
#define MS_TABLE amx_variant
#include "variant.h"
#else
#include "../model.h"
namespace ms {
const Variant amx_variant = {nullptr, nullptr, nullptr};
}
#endif
