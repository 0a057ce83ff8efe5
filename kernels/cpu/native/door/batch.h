// A batch at the door: whether it fits, and into which units its attention is divided.
#pragma once
#include "../model.h"

namespace ms {

// Null, or what is wrong with it: more rows or blocks than there is room for would corrupt memory in silence.
const char *check(const Engine &e, const MsBatch &b);

// Units of e.batch. False where there is no memory.
bool divide(Engine &e);

}  // namespace ms
