// The few AMX instructions of the native step, in C++ after their manual: what a CPU without AMX runs them by.
// -DMS_EMULATE_AMX='"amx_emulator.h"' puts these in the intrinsics' place; amx_trap.cc runs the compiled instructions.
//
// TDPBF16PS, a row of A by a column of B, 32 k: two chains of fp32 FMAs from +0, over the even k and over the odd;
// then C + (even + odd). To nearest, denormals zero both ways, MXCSR not read. What the CPU would fault on ends here.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace amx_emulator {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as LDTILECFG reads it");

// Of a thread, as on a CPU.
struct State {
  Config config;
  alignas(64) uint8_t tiles[kTiles][kMaxRows][kMaxBytes];
};
static thread_local State state;

[[noreturn]] static void fault(const char *what) {
  fprintf(stderr, "AMX: %s\n", what);
  abort();
}
static void need(bool is_so, const char *what) {
  if (!is_so) fault(what);
}
static int rows_of(int tile) {
  need(state.config.palette == 1, "no configuration");
  need(state.config.rows[tile] > 0 && state.config.column_bytes[tile] > 0, "a tile that is not configured");
  return state.config.rows[tile];
}

static void release() { memset(&state, 0, sizeof state); }

static void load_config(const void *from) {
  Config config;
  memcpy(&config, from, sizeof config);
  release();
  if (config.palette == 0) return;
  need(config.palette == 1 && config.start_row == 0, "palette, start_row");
  for (uint8_t byte : config.reserved) need(byte == 0, "reserved bytes");
  for (int t = 0; t < 16; t++) {
    need(t < kTiles || (config.rows[t] == 0 && config.column_bytes[t] == 0), "more tiles than eight");
    need(config.rows[t] <= kMaxRows && config.column_bytes[t] <= kMaxBytes, "rows, column_bytes");
    need((config.rows[t] == 0) == (config.column_bytes[t] == 0), "rows without columns");
  }
  state.config = config;
}

static void zero(int tile) {
  rows_of(tile);
  memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
}
static void load(int tile, const void *from, long stride) {
  const int rows = rows_of(tile);
  memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
  for (int r = 0; r < rows; r++) memcpy(state.tiles[tile][r], (const char *)from + r * stride, state.config.column_bytes[tile]);
}
static void store(int tile, void *to, long stride) {
  const int rows = rows_of(tile);
  for (int r = 0; r < rows; r++) memcpy((char *)to + r * stride, state.tiles[tile][r], state.config.column_bytes[tile]);
}

// A function of its own: no operation of it may move before the mode is set.
static __attribute__((noinline)) void dot_rows(int c, int a, int b) {
  const int rows = state.config.rows[c], columns = state.config.column_bytes[c] / 4, pairs = state.config.column_bytes[a] / 4;
  for (int m = 0; m < rows; m++) {
    float even[16] = {}, odd[16] = {}, sums[16];
    uint32_t left[16], right[16];
    memcpy(left, state.tiles[a][m], 64);
    for (int p = 0; p < pairs; p++) {
      const uint32_t first = left[p] << 16, second = left[p] & 0xffff0000u;
      float x, y;
      memcpy(&x, &first, 4);
      memcpy(&y, &second, 4);
      memcpy(right, state.tiles[b][p], 64);
      for (int n = 0; n < columns; n++) {
        const uint32_t low = right[n] << 16, high = right[n] & 0xffff0000u;
        float v, w;
        memcpy(&v, &low, 4);
        memcpy(&w, &high, 4);
        even[n] = __builtin_fmaf(x, v, even[n]);
        odd[n] = __builtin_fmaf(y, w, odd[n]);
      }
    }
    memcpy(sums, state.tiles[c][m], 64);
    for (int n = 0; n < columns; n++) sums[n] = sums[n] + (even[n] + odd[n]);
    memcpy(state.tiles[c][m], sums, (size_t)columns * 4);
  }
}
static void dot(int c, int a, int b) {
  need(c != a && c != b && a != b, "one tile twice");
  need(rows_of(c) == rows_of(a), "rows of C and A");
  need(state.config.column_bytes[a] == 4 * rows_of(b), "columns of A, rows of B");
  need(state.config.column_bytes[c] == state.config.column_bytes[b], "columns of C and B");
  const unsigned was = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  dot_rows(c, a, b);
  _mm_setcsr(was);
}

}  // namespace amx_emulator

#if defined(MS_EMULATE_AMX)
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulator::load_config(config)
#define _tile_release() amx_emulator::release()
#define _tile_zero(tile) amx_emulator::zero(tile)
#define _tile_loadd(tile, from, stride) amx_emulator::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_emulator::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulator::dot(c, a, b)
#endif
