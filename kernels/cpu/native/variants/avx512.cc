#define MS_VARIANT avx512
#define MS_LANES "../lanes/avx512.h"
#define MS_TABLE avx512_variant
#include "variant.h"
