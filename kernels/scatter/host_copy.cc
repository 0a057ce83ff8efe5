// Many copies from one mapping of memory to another, four at a time.
//
// A copy of a few KiB ends before the processor has found out that it should fetch ahead, so one after the other
// waits for memory most of its time. Four that take turns line by line keep four times as many fetches on their way,
// and stores that go around the caches need not read first what they overwrite. Both ends are memory that is not in
// the caches anyway.
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kTogether = 4;
constexpr int64_t kLine = 64;
constexpr int64_t kLongest = 64 << 10;  // from there on one memcpy is as quick

struct Span {
  int64_t source, target, nbytes;
};

#if defined(__SSE2__)
bool goes_together(const Span *spans, const char *target) {
  for (int64_t i = 0; i < kTogether; ++i) {
    if (spans[i].nbytes != spans[0].nbytes) return false;
    if (((uintptr_t)target + (uint64_t)spans[i].target) % sizeof(__m128i)) return false;
  }
  return spans[0].nbytes >= kLine && spans[0].nbytes <= kLongest;
}

void copy_together(char *target, const char *source, const Span *spans) {
  const int64_t nbytes = spans[0].nbytes, whole = nbytes / kLine * kLine;
  for (int64_t at = 0; at < whole; at += kLine) {
    for (int64_t i = 0; i < kTogether; ++i) {
      const __m128i *from = (const __m128i *)(source + spans[i].source + at);
      __m128i *to = (__m128i *)(target + spans[i].target + at);
      for (int64_t part = 0; part < kLine / (int64_t)sizeof(__m128i); ++part)
        _mm_stream_si128(to + part, _mm_loadu_si128(from + part));
    }
  }
  for (int64_t i = 0; i < kTogether; ++i)
    memcpy(target + spans[i].target + whole, source + spans[i].source + whole, (size_t)(nbytes - whole));
}
#endif

}  // namespace

// spans: count of them. The caller has checked that they lie in both regions.
extern "C" __attribute__((visibility("default"))) void ms_copy_spans(char *target, const char *source, const Span *spans,
                                                                     int64_t count) {
  int64_t i = 0;
  while (i < count) {
#if defined(__SSE2__)
    if (i + kTogether <= count && goes_together(spans + i, target)) {
      copy_together(target, source, spans + i);
      i += kTogether;
      continue;
    }
#endif
    memcpy(target + spans[i].target, source + spans[i].source, (size_t)spans[i].nbytes);
    ++i;
  }
#if defined(__SSE2__)
  _mm_sfence();  // such stores are in no order: whoever reads what is stored later must find them
#endif
}
