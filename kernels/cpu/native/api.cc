// The C interface: makes engines, packs weights, checks batches at the door and divides their attention into units.
// More rows or blocks than there is room for would corrupt memory in silence, so nothing passes unchecked.
// Nothing here needs the C++ library when it runs (memory is malloc's): the object wants the C library alone.
#include "abi.h"

#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu.h"
#include "model.h"
#include "pack.h"

struct MsEngine : ms::Engine {};

namespace {

using ms::Engine;
using ms::round_up;
using ms::Unit;

constexpr int kMaxThreads = 64;

size_t elem_size(const Engine &e) { return e.config.elem == MS_BF16 ? 2 : 4; }

// Zeroed; freed with the engine. Null where there is no memory.
void *take(Engine &e, size_t nbytes) {
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

float *floats(Engine &e, long count) { return (float *)take(e, sizeof(float) * (size_t)count); }

float *copied(Engine &e, const float *from, long count, long padded) {
  float *to = from ? floats(e, padded) : nullptr;
  if (to) memcpy(to, from, sizeof(float) * (size_t)count);
  return to;
}

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

const ms::Variant *variant_of(int32_t variant) {
  switch (variant) {
    case MS_PORTABLE: return &ms::portable_variant;
#if defined(__x86_64__)
    case MS_AVX2: return &ms::avx2_variant;
    case MS_AVX512: return &ms::avx512_variant;
    case MS_AMX: return ms::amx_variant.step ? &ms::amx_variant : nullptr;
#endif
    default: return nullptr;
  }
}

void step_of_thread(void *engine, int thread) {
  Engine *e = (Engine *)engine;
  variant_of(e->config.variant)->step(e, thread);
}

// Which rows go where; null, or what is wrong with it.
const char *check(const Engine &e, const MsBatch &b) {
  const MsConfig &c = e.config;
  if (b.num_rows < 1 || b.num_rows > c.max_rows) return "num_rows";
  if (b.num_spans < 1 || b.num_spans > b.num_rows) return "num_spans";
  if (b.num_logits < 0 || b.num_logits > c.max_logits || b.num_logits > b.num_rows) return "num_logits";
  long row = 0;
  for (int s = 0; s < b.num_spans; s++) {
    const int rows = b.span_rows[s], context = b.span_contexts[s];
    if (rows < 1 || rows > b.num_rows - row) return "span_rows";
    if (context < rows || context > c.max_context || context > (long)b.table_width * c.block_size) return "span_contexts";
    for (int i = 0; i * (long)c.block_size < context; i++) {
      const int block = b.tables[(long)s * b.table_width + i];
      if (block < 0 || block >= c.num_blocks) return "tables";
    }
    for (int i = 0; i < rows; i++)
      if (b.positions[row + i] != context - rows + i) return "positions";
    row += rows;
  }
  if (row != b.num_rows) return "span_rows";
  for (int i = 0; i < b.num_rows; i++) {
    if (b.tokens[i] < 0 || b.tokens[i] >= c.vocab) return "tokens";
    if (b.slots[i] < -1 || b.slots[i] >= (int64_t)c.num_blocks * c.block_size) return "slots";
  }
  for (int i = 0; i < b.num_logits; i++)
    if (b.logit_rows[i] < 0 || b.logit_rows[i] >= b.num_rows) return "logit_rows";
  return nullptr;
}

// Rows of a chunk in tiles of lanes; of a single row each segment is a unit, and its parts are merged.
bool divide(Engine &e) {
  const MsBatch &b = e.batch;
  const MsConfig &c = e.config;
  const int group = c.num_heads / c.num_kv_heads, rows_of_unit = ms::kLanes / group;
  size_t units = 0, merges = 0;
  for (int s = 0; s < b.num_spans; s++) {
    const long segments = round_up(b.span_contexts[s], ms::kSegment) / ms::kSegment;
    units += (size_t)c.num_kv_heads * (size_t)(b.span_rows[s] == 1 ? segments : round_up(b.span_rows[s], rows_of_unit) / rows_of_unit);
    merges += b.span_rows[s] == 1 && segments > 1 ? (size_t)c.num_kv_heads : 0;
  }
  if (!grow(e.units, e.units_capacity, units) || !grow(e.merges, e.merges_capacity, merges)) return false;
  if (!grow(e.span_firsts, e.spans_capacity, (size_t)b.num_spans)) return false;
  e.num_units = e.num_merges = 0;
  long row = 0, part = 0;
  for (int s = 0; s < b.num_spans; row += b.span_rows[s], s++) {
    e.span_firsts[s] = row;
    const int rows = b.span_rows[s], segments = (int)(round_up(b.span_contexts[s], ms::kSegment) / ms::kSegment);
    for (int h = 0; h < c.num_kv_heads; h++) {
      if (rows > 1 || segments == 1) {
        for (int first = 0; first < rows; first += rows_of_unit)
          e.units[e.num_units++] = {s, first, rows - first < rows_of_unit ? rows - first : rows_of_unit, h, -1, 0, 0};
        continue;
      }
      e.merges[e.num_merges++] = {s, 0, 1, h, 0, segments, part};
      for (int i = 0; i < segments; i++, part += group) e.units[e.num_units++] = {s, 0, 1, h, i, 0, part};
    }
  }
  return grow(e.parts, e.parts_capacity, (size_t)(part * (e.head_dim + 16)));
}

}  // namespace

extern "C" {

int32_t ms_abi_version() { return 1; }

int32_t ms_supports(int32_t variant) {
  if (!variant_of(variant)) return 0;
#if defined(__x86_64__)
  const ms::Cpu cpu;
  if (variant == MS_AVX2) return cpu.avx2;
  if (variant == MS_AVX512) return cpu.avx512;
  if (variant == MS_AMX) return cpu.amx && ms::may_use_tiles();
#endif
  return 1;
}

MsEngine *ms_create(const MsConfig *config) {
  if (!ms_supports(config->variant) || config->threads < 1 || config->threads > kMaxThreads) return nullptr;
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
    w.sums = floats(*e, ms::kLanes * e->head_dim);
    w.head = floats(*e, ms::kRowBlock * e->head_dim);
    w.normed = floats(*e, ms::kFewRows * e->hidden);
    w.zeros = floats(*e, e->head_dim);
    w.tiles = c.variant == MS_AMX ? (uint16_t *)take(*e, sizeof(uint16_t) * (size_t)ms::tile_elements(e->head_dim)) : nullptr;
    is_whole = w.keys && w.values && w.queries && w.scores && w.out && w.sums && w.head && w.normed && w.zeros && (w.tiles || c.variant != MS_AMX);
  }
  void *team = nullptr;
  if (is_whole && !posix_memalign(&team, alignof(ms::Team), sizeof(ms::Team))) e->team = new (team) ms::Team(c.threads, ms::phases_of(c.num_layers));
  if (!e->team || !e->team->started()) {
    ms_destroy(e);
    return nullptr;
  }
  return e;
}

const char *ms_set_layer(MsEngine *e, int32_t index, const MsLayer *from) {
  const MsConfig &c = e->config;
  if (index < 0 || index >= c.num_layers) return "index";
  ms::Layer &to = e->layers[index];
  const size_t size = elem_size(*e);
  const long heads = (long)c.num_heads * c.head_dim;
  const long hidden = e->hidden / 32, wide = e->heads_width / 32, middle = e->intermediate / 32;
  to.qkv = take(*e, size * (size_t)(e->qkv_width * e->hidden));
  to.out = take(*e, size * (size_t)(e->hidden * e->heads_width));
  to.gate_up = take(*e, size * (size_t)(2 * e->intermediate * e->hidden));
  to.down = take(*e, size * (size_t)(e->hidden * e->intermediate));
  to.attention_norm = copied(*e, from->attention_norm, c.hidden, e->hidden);
  to.mlp_norm = copied(*e, from->mlp_norm, c.hidden, e->hidden);
  if (!to.qkv || !to.out || !to.gate_up || !to.down || !to.attention_norm || !to.mlp_norm) return "memory";
  to.q_norm = copied(*e, from->q_norm, c.head_dim, e->head_width);
  to.k_norm = copied(*e, from->k_norm, c.head_dim, e->head_width);
  to.out_bias = copied(*e, from->o_bias, c.hidden, e->hidden);
  if (from->q_bias) {
    to.qkv_bias = floats(*e, e->qkv_width);
    if (!to.qkv_bias) return "memory";
  }
  if ((from->q_norm && !to.q_norm) || (from->k_norm && !to.k_norm) || (from->o_bias && !to.out_bias)) return "memory";
  for (int h = 0; h < c.num_heads + 2 * c.num_kv_heads; h++) {
    const int kv = h - c.num_heads, of = kv < 0 ? h : kv % c.num_kv_heads;
    const char *weights = (const char *)(kv < 0 ? from->q : kv < c.num_kv_heads ? from->k : from->v);
    const float *bias = kv < 0 ? from->q_bias : kv < c.num_kv_heads ? from->k_bias : from->v_bias;
    weights += size * (size_t)((long)of * c.head_dim * c.hidden);
    ms::pack(c.elem, weights, to.qkv, c.head_dim, c.hidden, hidden, h * e->head_width / 16, 1);
    if (to.qkv_bias) memcpy(to.qkv_bias + h * e->head_width, bias + (long)of * c.head_dim, sizeof(float) * (size_t)c.head_dim);
  }
  ms::pack(c.elem, from->o, to.out, c.hidden, heads, wide, 0, 1);
  ms::pack(c.elem, from->gate, to.gate_up, c.intermediate, c.hidden, hidden, 0, 2);
  ms::pack(c.elem, from->up, to.gate_up, c.intermediate, c.hidden, hidden, 1, 2);
  ms::pack(c.elem, from->down, to.down, c.hidden, c.intermediate, middle, 0, 1);
  to.kv = from->kv;
  to.use_rope = from->use_rope;
  to.window = from->window;
  return nullptr;
}

const char *ms_set_model(MsEngine *e, const void *embedding, const void *head, const float *norm, const float *cos, const float *sin) {
  const MsConfig &c = e->config;
  const size_t size = elem_size(*e);
  const long table = (long)c.max_context * (c.head_dim / 2);
  e->head = take(*e, size * (size_t)(e->vocab * e->hidden));
  e->norm = copied(*e, norm, c.hidden, e->hidden);
  e->cos = copied(*e, cos, table, table + 16);
  e->sin = copied(*e, sin, table, table + 16);
  if (!e->head || !e->norm || !e->cos || !e->sin) return "memory";
  ms::pack(c.elem, head ? head : embedding, e->head, c.vocab, c.hidden, e->hidden / 32, 0, 1);
  if (!head) return nullptr;
  e->embedding = take(*e, size * (size_t)((long)c.vocab * c.hidden));
  if (!e->embedding) return "memory";
  memcpy(e->embedding, embedding, size * (size_t)((long)c.vocab * c.hidden));
  return nullptr;
}

int64_t ms_logits_width(const MsEngine *e) { return e->vocab; }

const char *ms_step(MsEngine *e, const MsBatch *batch, MsOnLayer on_layer) {
  if (!e->head) return "ms_set_model";
  for (int i = 0; i < e->config.num_layers; i++)
    if (!e->layers[i].kv) return "ms_set_layer";
  if (const char *wrong = check(*e, *batch)) return wrong;
  e->batch = *batch;
  e->on_layer = on_layer;
  e->ended = 0;
  if (!divide(*e)) return "memory";
  e->team->run(step_of_thread, (Engine *)e);
  return nullptr;
}

void ms_destroy(MsEngine *e) {
  if (!e) return;
  if (e->team) e->team->~Team();
  free(e->team);
  for (int i = 0; i < e->num_arena; i++) free(e->arena[i]);
  free(e->arena);
  free(e->units);
  free(e->merges);
  free(e->span_firsts);
  free(e->parts);
  free(e);
}

const char *ms_product(int32_t variant, int32_t elem, int32_t m, int32_t n, int32_t k, const float *a, const void *b, float *c) {
  if (!ms_supports(variant)) return "variant";
  if (m < 1 || n < 1 || k < 1 || n % 32 || k % 32) return "m, n, k";
  void *packed = nullptr, *inputs = nullptr;
  const bool has_room = !posix_memalign(&packed, 4096, (size_t)n * (size_t)k * 4) &&
                        !posix_memalign(&inputs, 4096, (size_t)round_up(m, 16) * (size_t)k * 4);
  if (has_room) {
    ms::pack(elem, b, packed, n, k, k / 32, 0, 1);
    variant_of(variant)->product(elem, m, n, k, a, inputs, packed, c);
  }
  free(packed);
  free(inputs);
  return has_room ? nullptr : "memory";
}

const char *ms_map(int32_t variant, int32_t function, int32_t n, float *values) {
  if (!ms_supports(variant)) return "variant";
  if (n % 16 || function < 0 || function > 2) return "n, function";
  variant_of(variant)->map(function, n, values);
  return nullptr;
}
}
