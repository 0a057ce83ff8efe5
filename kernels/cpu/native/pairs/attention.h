// Attention of the class of pairs: segments, masks, maxima, sums and merges are those of step/attention.h, the two
// products of a segment are of pairs. Included inside a variant's own namespace, behind both.
//
//   S = Q K^T   lanes are rows, positions are columns; keys turned once a segment, for all lanes of a unit
//   O = P V     values in pairs of positions, zeros behind the context
#pragma once

template <>
struct Queries<Pairs> {
  typedef uint16_t T;
  static MS_INLINE T *of(const Engine &e, long row, int head) { return (T *)e.queries + (row * e.config.num_heads + head) * e.head_width; }
  static MS_INLINE void put(T *to, V value) { put_bf16(to, value); }
};

// A thread's w.tiles, see pair_elements() in model.h. Rows have a gap, as inputs of products have it.
struct PairRoom {
  static constexpr long kWide = kSegment + Inputs<Pairs>::kGap;
  uint16_t *queries;  // [kWideLanes][head_dim + gap]
  uint16_t *weights;  // [kDotRows][kWide]
  uint16_t *keys;     // [kSegment / 32][head_dim / 2][32 positions][2]
  uint16_t *values;   // [head_dim / 32][kSegment / 2][32 dims][2]
  long dim;           // padded
  MS_INLINE PairRoom(const Engine &e, const Scratch &w) : dim(e.head_dim) {
    queries = w.tiles;
    weights = queries + kWideLanes * (dim + Inputs<Pairs>::kGap);
    keys = weights + kMaxDotRows * kWide;
    values = keys + kSegment * dim;
  }
  MS_INLINE void go_to(const Engine &e, long place) {
    keys = e.segments + place * 2 * kSegment * dim;
    values = keys + kSegment * dim;
  }
};
static_assert(kDotRows <= kMaxDotRows && kMaxDotRows <= 8, "weights have room, and Sums::take_some");

// Keys and values of positions [first, first + count), packed.
MS_INLINE void pack_segment(const Engine &e, const Layer &layer, const Scratch &w, const Unit &u, const PairRoom &room, int first, int count) {
  const long dim = e.config.head_dim;
  const bool in_place = dim % 32 == 0;
  const uint16_t *keys[kSegment], *values[kSegment];
  uint16_t *copies = (uint16_t *)w.keys, *more = (uint16_t *)w.values;  // zeros behind head_dim, for good
  // Rows of one head lie apart: nothing but this fetches them ahead.
  each_row<Pairs>(e, layer, u.span, u.kv_head, first, count, [&](int i, const uint16_t *key, const uint16_t *value) {
    keys[i] = in_place ? key : copies + i * room.dim;
    values[i] = in_place ? value : more + i * room.dim;
    if (!in_place) {
      __builtin_memcpy(copies + i * room.dim, key, (size_t)dim * 2);
      __builtin_memcpy(more + i * room.dim, value, (size_t)dim * 2);
      return;
    }
    for (long at = 0; at < dim; at += 32) {
      prefetch_far(key + at);
      prefetch_far(value + at);
    }
  });
  for (int i = count; i < round_up(count, 32); i++) {
    keys[i] = keys[0];  // masked
    values[i] = (const uint16_t *)w.zeros;
  }
  for (int i = 0; i < count; i += 16)
    for (long word = 0; word < room.dim / 2; word += 16)
      transpose_words(keys + i, word, room.keys + i / 32 * 32 * room.dim + word * 2 * kPair + i % 32 * 2, 2 * kPair);
  for (int i = 0; i < round_up(count, 32); i += 2)
    for (long d = 0; d < room.dim; d += 32) interleave(values[i] + d, values[i + 1] + d, room.values + d * kSegment + i * 32);
}

// Scores -> rounded weights of positions [from, to), of which [low, high) are seen and the others weigh +0.
MS_INLINE void weigh_lane(const float *scores, uint16_t *weights, int low, int high, int from, int to, float c, float &maximum, float &sum) {
  alignas(64) static const int32_t order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Ints lanes = ints(order);
  const auto seen = [&](int i) { return both(greater(splat_int(high - i), lanes), greater(lanes, splat_int(low - i - 1))); };
  V m = splat(-__builtin_inff());
  for (int i = from; i < high; i += 16) {
    V s = load(scores + i);
    if (i < low || i + 16 > high) s = select(seen(i), s, splat(-__builtin_inff()));
    m = max(m, s);
  }
  const float top = tree_max(m) * c;
  const V factor = splat(c), less = splat(top);
  V total = zeros();
  int i = from;
  for (; i < high; i += 16) {
    V p = exp2v(sub(mul(load(scores + i), factor), less));
    if (i < low || i + 16 > high) p = select(seen(i), p, zeros());
    total = add(total, p);
    put_bf16(weights + i, p);
  }
  for (; i < to; i += 16) put_bf16(weights + i, zeros());
  maximum = top;
  sum = tree_sum(total);
}

// Of a span, whatever of it the units see: what is behind a unit's rows is finite, and masked.
template <>
void pack_unit<Pairs>(Engine &e, const Layer &layer, Scratch &w, const Unit &u) {
  const int context = e.batch.span_contexts[u.span], first = u.segment * kSegment, seen = context - u.num_rows + 1;
  if (layer.window && first + kSegment <= seen - layer.window) return;
  PairRoom room(e, w);
  room.go_to(e, u.packed);
  pack_segment(e, layer, w, u, room, first, context - first < kSegment ? context - first : kSegment);
}

template <>
void attend<Pairs>(Engine &e, const Layer &layer, Scratch &w, const Unit &u) {
  const MsConfig &c = e.config;
  const int group = c.num_heads / c.num_kv_heads, dim = c.head_dim, lanes = u.num_rows * group;
  PairRoom room(e, w);
  const long row0 = e.span_firsts[u.span] + u.first_row, wide = room.dim + Inputs<Pairs>::kGap;
  const int position0 = e.batch.span_contexts[u.span] - e.batch.span_rows[u.span] + u.first_row;
  for (int i = 0; i < lanes; i++) {
    const uint16_t *q = Queries<Pairs>::of(e, row0 + i / group, u.kv_head * group + i % group);
    __builtin_memcpy(room.queries + i * wide, q, (size_t)dim * 2);
  }
  const auto high = [&](int lane) { return position0 + lane / group + 1; };
  const auto low = [&](int lane) { return layer.window && high(lane) > layer.window ? high(lane) - layer.window : 0; };
  Sums sums;
  const int end = high(lanes - 1);
  const int begin = u.segment < 0 ? low(0) / kSegment : u.segment, last = u.segment < 0 ? (end - 1) / kSegment : u.segment;
  for (int s = begin; s <= last; s++) {
    const int first = s * kSegment, count = end - first < kSegment ? end - first : kSegment;
    if (first + count <= low(0)) continue;
    if (u.packed < 0) pack_segment(e, layer, w, u, room, first, count);
    else room.go_to(e, u.packed + s);
    for (int lane = 0, share; lane < lanes; lane += share) {
      share = next_share(lanes - lane);
      // Positions that any of these sees, of this segment; from a whole group of columns on, to one.
      const int lowest = low(lane) - first, highest = high(lane + share - 1) - first;
      if (highest <= 0 || lowest >= count) continue;
      const int from = lowest > 0 ? lowest & ~31 : 0, seen = highest < count ? highest : count, to = (int)round_up(seen, 32);
      Put scores = {w.scores, kSegment};
      multiply_pairs(room.queries + lane * wide, wide, share, room.keys, 32 * room.dim, (int)(room.dim / 2), from / 16, to / 16, scores);
      float maximum[kMaxDotRows], sum[kMaxDotRows];
      for (int i = 0; i < share; i++) {
        const int l = low(lane + i) - first, h = high(lane + i) - first;
        weigh_lane(w.scores + i * kSegment, room.weights + i * PairRoom::kWide, l, h < count ? h : count, from, to, c.scale * kLog2e, maximum[i], sum[i]);
      }
      Put out = {w.out, room.dim};
      multiply_pairs(room.weights + from, PairRoom::kWide, share, room.values + from * 32, kSegment * 32, (seen - from + 1) / 2, 0, (int)(e.head_width / 16), out);
      sums.take_some(w.sums, room.dim, lane, share, w.out, maximum, sum, dim, [&](int i) { return high(i) > first && low(i) < first + count; });
    }
  }
  leave<Pairs>(e, w, u, lanes, group, sums);
}
