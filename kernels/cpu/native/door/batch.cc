#include "batch.h"

#include "memory.h"

namespace ms {

// Keys and values of a segment, packed.
static long packed_nbytes(const Engine &e) { return 2L * kSegment * e.head_dim * (long)sizeof(uint16_t); }

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

// False where there is no memory.
static bool count_wanted(Engine &e) {
  const MsBatch &b = e.batch;
  if (!grow(e.wanted_before, e.wanted_capacity, (size_t)b.num_rows + 1)) return false;
  e.is_narrow = b.num_logits < b.num_rows;
  for (int i = 1; i < b.num_logits; i++)
    if (b.logit_rows[i] <= b.logit_rows[i - 1]) e.is_narrow = 0;  // rows move down in their order
  memset(e.wanted_before, 0, sizeof(int) * ((size_t)b.num_rows + 1));
  for (int i = 0; i < b.num_logits; i++) e.wanted_before[b.logit_rows[i] + 1] = 1;
  for (int i = 0; i < b.num_rows; i++) e.wanted_before[i + 1] += e.wanted_before[i];
  return true;
}

// Rows of a chunk in tiles of lanes; of a single row each segment is a unit, and its parts are merged. By products of
// pairs, segments that several units of a span need are packed once, before, as far as there is room.
bool divide(Engine &e) {
  const MsBatch &b = e.batch;
  const MsConfig &c = e.config;
  const bool is_pairs = c.elem == MS_BF16_PAIRS;
  const int group = c.num_heads / c.num_kv_heads, rows_of_unit = (is_pairs ? kWideLanes : kLanes) / group;
  const long max_packs = is_pairs ? kMaxPackedNbytes / packed_nbytes(e) : 0;
  const auto segments_of = [&](int s) { return round_up(b.span_contexts[s], kSegment) / kSegment; };
  const auto packs_of = [&](int s) { return b.span_rows[s] > rows_of_unit ? segments_of(s) * c.num_kv_heads : 0; };
  size_t units = 0, merges = 0, packs = 0;
  for (int s = 0; s < b.num_spans; s++) {
    const long segments = segments_of(s);
    units += (size_t)c.num_kv_heads * (size_t)(b.span_rows[s] == 1 ? segments : round_up(b.span_rows[s], rows_of_unit) / rows_of_unit);
    merges += b.span_rows[s] == 1 && segments > 1 ? (size_t)c.num_kv_heads : 0;
    if ((long)packs + packs_of(s) <= max_packs) packs += (size_t)packs_of(s);
  }
  if (!grow(e.units, e.units_capacity, units) || !grow(e.merges, e.merges_capacity, merges)) return false;
  if (!grow(e.packs, e.packs_capacity, packs)) return false;
  if (packs && !grow(e.segments, e.segments_capacity, packs * (size_t)packed_nbytes(e) / 2)) return false;
  if (!grow(e.span_firsts, e.spans_capacity, (size_t)b.num_spans)) return false;
  if (!count_wanted(e)) return false;
  e.num_packs = e.num_units = e.num_merges = 0;
  long row = 0, part = 0;
  for (int s = 0; s < b.num_spans; row += b.span_rows[s], s++) {
    e.span_firsts[s] = row;
    const int rows = b.span_rows[s], segments = (int)segments_of(s);
    const auto is_wanted = [&](int first, int count) { return e.wanted_before[row + first + count] > e.wanted_before[row + first]; };
    if (rows > 1 || segments == 1) {
      const long packed = packs_of(s) && e.num_packs + packs_of(s) <= max_packs ? e.num_packs : -1;
      for (int h = 0; packed >= 0 && h < c.num_kv_heads; h++)
        for (int i = 0; i < segments; i++, e.num_packs++) e.packs[e.num_packs] = {s, 0, rows, h, is_wanted(0, rows), i, 0, 0, e.num_packs};
      // The last rows see most: who takes one of their units last would be waited for.
      for (int first = (rows - 1) / rows_of_unit * rows_of_unit; first >= 0; first -= rows_of_unit)
        for (int h = 0; h < c.num_kv_heads; h++) {
          const int count = rows - first < rows_of_unit ? rows - first : rows_of_unit;
          const long of_head = packed < 0 ? -1 : packed + (long)h * segments;
          e.units[e.num_units++] = {s, first, count, h, is_wanted(first, count), -1, 0, 0, of_head};
        }
      continue;
    }
    for (int h = 0; h < c.num_kv_heads; h++) {
      e.merges[e.num_merges++] = {s, 0, 1, h, is_wanted(0, 1), 0, segments, part, -1};
      for (int i = 0; i < segments; i++, part += group) e.units[e.num_units++] = {s, 0, 1, h, is_wanted(0, 1), i, 0, part, -1};
    }
  }
  return grow(e.parts, e.parts_capacity, (size_t)(part * (e.head_dim + 16)));
}

}  // namespace ms
