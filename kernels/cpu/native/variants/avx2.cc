#define MS_VARIANT avx2
#define MS_LANES "../lanes/avx2.h"
#define MS_TABLE avx2_variant
#include "variant.h"
