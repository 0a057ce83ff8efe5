// An engine's memory. Nothing here needs the C++ library when it runs (memory is malloc's): the object wants the C
// library alone.
#pragma once
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../model.h"

struct MsEngine : ms::Engine {};

namespace ms {

inline size_t elem_size(const Engine &e) { return e.config.elem == MS_F32 ? 4 : 2; }

// Zeroed; freed with the engine. Null where there is no memory.
inline void *take(Engine &e, size_t nbytes) {
  void *memory = nullptr;
  const size_t huge = (size_t)2 << 20;  // a page of 4 KiB costs more time than what is read in it
  if (posix_memalign(&memory, nbytes >= huge ? huge : 4096, nbytes ? nbytes : 1)) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (nbytes >= huge) madvise(memory, nbytes, MADV_HUGEPAGE);
#endif
  memset(memory, 0, nbytes);
  void **more = (void **)realloc(e.arena, sizeof(void *) * (size_t)(e.num_arena + 1));
  if (!more) {
    free(memory);
    return nullptr;
  }
  e.arena = more;
  e.arena[e.num_arena++] = memory;
  return memory;
}

inline float *floats(Engine &e, long count) { return (float *)take(e, sizeof(float) * (size_t)count); }

template <class T>
bool grow(T *&array, size_t &capacity, size_t wanted) {
  if (wanted <= capacity) return true;
  free(array);
  array = nullptr;
  capacity = 0;
  if (posix_memalign((void **)&array, 4096, sizeof(T) * (wanted + wanted / 2 + 64))) return false;
  capacity = wanted + wanted / 2 + 64;
  return true;
}

}  // namespace ms
