// One variant of everything: the including file says MS_VARIANT (a namespace), MS_LANES (its lanes) and MS_TABLE; and
// MS_TILES where bf16 is multiplied in tiles, MS_PAIRS where it can be multiplied in pairs, MS_PAIRS_ALONE where nothing else.
// Nothing here may be a template or inline function of the standard library: the linker would keep one copy for all
// variants, compiled for whatever CPU.
#include "../model.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define MS_INLINE inline __attribute__((always_inline))
#define MS_ALONE __attribute__((noinline))

namespace ms {
namespace {
namespace MS_VARIANT {
#include MS_LANES
#include "../step/numerics.h"
#include "../step/product.h"
#include "../step/attention.h"
#if defined(MS_TILES)
#include "../tiles/product.h"
#include "../tiles/attention.h"
#else
typedef Bf16 Half;
MS_INLINE void release_tiles() {}
#endif
#if defined(MS_PAIRS)
#include "../pairs/product.h"
#include "../pairs/attention.h"
#endif
#include "../step/weights.h"
#include "../step/step.h"
}  // namespace MS_VARIANT
}  // namespace

extern const Variant MS_TABLE;
const Variant MS_TABLE = {MS_VARIANT::step, MS_VARIANT::product, MS_VARIANT::map};
}  // namespace ms
