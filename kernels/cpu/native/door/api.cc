// The C interface: makes engines, steps, and ends them. Nothing passes unchecked (batch.h).
#include <ctime>
#include <new>

#include "../pack.h"
#include "batch.h"
#include "cpu.h"
#include "memory.h"

namespace ms {
int64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
}  // namespace ms

namespace {

using ms::Engine;
using ms::floats;
using ms::round_up;
using ms::take;

constexpr int kMaxThreads = 64;

const ms::Variant *variant_of(int32_t variant) {
  switch (variant) {
    case MS_PORTABLE: return &ms::portable_variant;
#if defined(__x86_64__)
    case MS_AVX2: return &ms::avx2_variant;
    case MS_AVX512: return &ms::avx512_variant;
    case MS_AVX512BF16: return ms::avx512bf16_variant.step ? &ms::avx512bf16_variant : nullptr;
    case MS_AMX: return ms::amx_variant.step ? &ms::amx_variant : nullptr;
#endif
    default: return nullptr;
  }
}

void step_of_thread(void *engine, int thread) {
  Engine *e = (Engine *)engine;
  variant_of(e->config.variant)->step(e, thread);
}

}  // namespace

extern "C" {

int32_t ms_abi_version() { return 4; }

int32_t ms_supports(int32_t variant, int32_t elem) {
  if (!variant_of(variant) || elem < 0 || elem >= MS_NUM_ELEMS) return 0;
  if (elem == MS_BF16_PAIRS ? variant != MS_PORTABLE && variant != MS_AVX512BF16 : variant == MS_AVX512BF16) return 0;
#if defined(__x86_64__)
  const ms::Cpu cpu;
  if (variant == MS_AVX2) return cpu.avx2;
  if (variant == MS_AVX512) return cpu.avx512;
  if (variant == MS_AVX512BF16) return cpu.avx512bf16;
  if (variant == MS_AMX) return cpu.amx && ms::may_use_tiles();
#endif
  return 1;
}

MsEngine *ms_create(const MsConfig *config) {
  if (!ms_supports(config->variant, config->elem) || config->weights < 0 || config->weights >= MS_NUM_WEIGHTS) return nullptr;
  if (config->threads < 1 || config->threads > kMaxThreads) return nullptr;
  MsEngine *e = (MsEngine *)calloc(1, sizeof(MsEngine));
  if (!e) return nullptr;
  const MsConfig &c = e->config = *config;
  e->hidden = round_up(c.hidden, 32);
  e->heads_width = round_up((long)c.num_heads * c.head_dim, 32);
  e->head_width = round_up(c.head_dim, 16);
  e->qkv_width = round_up((long)(c.num_heads + 2 * c.num_kv_heads) * e->head_width, 32);
  e->intermediate = round_up(c.intermediate, 32);
  e->vocab = round_up(c.vocab, 32);
  e->head_dim = round_up(c.head_dim, 32);
  const long rows = c.max_rows, logits = c.max_logits;
  e->layers = (ms::Layer *)take(*e, sizeof(ms::Layer) * (size_t)c.num_layers);
  e->scratch = (ms::Scratch *)take(*e, sizeof(ms::Scratch) * (size_t)c.threads);
  e->x = floats(*e, rows * e->hidden);
  // Inputs of products: fp32, or bf16 in tiles of 16 rows, which is less but for the last tile.
  e->normed = floats(*e, round_up(rows > logits ? rows : logits, 16) * e->hidden);
  e->attended = floats(*e, round_up(rows, 16) * e->heads_width);
  e->middle = floats(*e, round_up(rows, 16) * e->intermediate);
  e->queries = floats(*e, rows * c.num_heads * e->head_width);
  bool is_whole = e->layers && e->scratch && e->x && e->normed && e->attended && e->middle && e->queries;
  for (int t = 0; is_whole && t < c.threads; t++) {
    ms::Scratch &w = e->scratch[t];
    w.keys = floats(*e, ms::kSegment * e->head_dim);
    w.values = floats(*e, ms::kSegment * e->head_dim);
    w.queries = floats(*e, e->head_dim * ms::kLanes);
    w.scores = floats(*e, (long)ms::kSegment * ms::kLanes);
    w.out = floats(*e, ms::kLanes * e->head_dim);
    w.sums = floats(*e, ms::kWideLanes * e->head_dim);
    w.head = floats(*e, ms::kRowBlock * e->head_dim);
    w.normed = floats(*e, ms::kFewRows * e->hidden);
    w.zeros = floats(*e, e->head_dim);
    const long tiles = c.variant == MS_AMX ? ms::tile_elements(e->head_dim) : c.elem == MS_BF16_PAIRS ? ms::pair_elements(e->head_dim) : 0;
    w.tiles = (uint16_t *)take(*e, sizeof(uint16_t) * (size_t)tiles);
    is_whole = w.keys && w.values && w.queries && w.scores && w.out && w.sums && w.head && w.normed && w.zeros && w.tiles;
  }
  void *team = nullptr;
  if (is_whole && !posix_memalign(&team, alignof(ms::Team), sizeof(ms::Team))) e->team = new (team) ms::Team(c.threads, ms::phases_of(c.num_layers));
  if (!e->team || !e->team->started()) {
    ms_destroy(e);
    return nullptr;
  }
  return e;
}

int64_t ms_logits_width(const MsEngine *e) { return e->vocab; }

const char *ms_step(MsEngine *e, const MsBatch *batch, MsOnLayer on_layer) {
  if (!e->head.packed) return "ms_set_model";
  for (int i = 0; i < e->config.num_layers; i++)
    if (!e->layers[i].kv) return "ms_set_layer";
  if (const char *wrong = ms::check(*e, *batch)) return wrong;
  e->batch = *batch;
  e->on_layer = on_layer;
  e->ended = 0;
  e->told_ns = ms::clock_ns();
  if (!ms::divide(*e)) return "memory";
  e->team->run(step_of_thread, (Engine *)e);
  return nullptr;
}

void ms_destroy(MsEngine *e) {
  if (!e) return;
  if (e->team) e->team->~Team();
  free(e->team);
  for (int i = 0; i < e->num_arena; i++) free(e->arena[i]);
  free(e->arena);
  free(e->packs);
  free(e->segments);
  free(e->units);
  free(e->merges);
  free(e->span_firsts);
  free(e->wanted_before);
  free(e->parts);
  free(e);
}

const char *ms_product(int32_t variant, int32_t elem, int32_t weights, int32_t m, int32_t n, int32_t k, const float *a, const void *b, float *c) {
  if (!ms_supports(variant, elem)) return "variant";
  if (weights < 0 || weights >= MS_NUM_WEIGHTS) return "weights";
  if (m < 1 || n < 1 || k < 1 || n % 32 || k % 32) return "m, n, k";
  void *packed = nullptr, *inputs = nullptr, *scales = nullptr;
  const bool has_room = !posix_memalign(&packed, 4096, (size_t)n * (size_t)k * 4) &&
                        !posix_memalign(&inputs, 4096, (size_t)round_up(m, 16) * (size_t)k * 4) &&
                        !posix_memalign(&scales, 4096, (size_t)n * 4);
  if (has_room) {
    const ms::Matrix matrix = {packed, weights == MS_INT8 ? (float *)scales : nullptr};
    ms::pack(elem, b, matrix, n, k, k / 32, 0, 1);
    variant_of(variant)->product(elem, m, n, k, a, inputs, matrix, c);
  }
  free(packed);
  free(inputs);
  free(scales);
  return has_room ? nullptr : "memory";
}

const char *ms_map(int32_t variant, int32_t function, int32_t n, float *values) {
  if (!ms_supports(variant, variant == MS_AVX512BF16 ? MS_BF16_PAIRS : MS_BF16)) return "variant";
  if (n % 16 || function < 0 || function > 2) return "n, function";
  variant_of(variant)->map(function, n, values);
  return nullptr;
}
}
