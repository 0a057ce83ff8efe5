// What this CPU has and this system saves, asked of the CPU itself: what __builtin_cpu_supports answers is the compiler's
// runtime, and zig's says no to everything.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ms {

struct Cpu {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;

  Cpu() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    const bool fma = c >> 12 & 1;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = fma && (b >> 5 & 1) && (saved & 0x6) == 0x6;
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vbmi = c >> 1 & 1;
    avx512 = avx2 && f && dq && bw && vl && (saved & 0xe6) == 0xe6;
    const bool bf16_tiles = d >> 22 & 1, tiles = d >> 24 & 1;
    amx = avx512 && vbmi && tiles && bf16_tiles && (saved & 0x60000) == 0x60000;
    const unsigned subleaves = a;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = avx512 && vbmi && (a >> 5 & 1);
#if defined(MS_ASSUME_AMX)  // in tests: the instructions are emulated
    amx = avx512;
#endif
  }
};

// The system gives tiles to a process that asks, and with it to all threads that it makes later: to be asked before a
// team is made. It refuses where it is too old, and where a thread's alternative signal stack has no room for them.
inline bool may_use_tiles() {
#if defined(MS_ASSUME_AMX)
  return true;
#elif defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace ms
#endif
