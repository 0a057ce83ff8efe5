// What this CPU has and this system saves, asked of the CPU itself: what __builtin_cpu_supports answers is the compiler's
// runtime, and zig's says no to everything.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

namespace ms {

struct Cpu {
  bool avx2 = false, avx512 = false;

  Cpu() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    const bool fma = c >> 12 & 1;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = fma && (b >> 5 & 1) && (saved & 0x6) == 0x6;
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    avx512 = avx2 && f && dq && bw && vl && (saved & 0xe6) == 0xe6;
  }
};

}  // namespace ms
#endif
