#define MS_VARIANT portable
#define MS_LANES "../lanes/portable.h"
#define MS_PAIRS
#define MS_TABLE portable_variant
#include "variant.h"
