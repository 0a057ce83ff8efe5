// Attention of the class. Included inside a variant's own namespace, behind product.h.
//
// Segments of kSegment absolute positions. In one: s = K Q^T by the product over head_dim; m = max(s) * c with
// c = scale * log2(e); p = 2^(s * c - m), +0 where a position is not seen; l = the sum of p before rounding, in 16
// sums by position mod 16 ascending, then pairs 8, 4, 2, 1 apart; o = the product of rounded p and V, + 0.
// Segments are merged in ascending order, the first is copied, and one of which a row sees nothing is left out:
//   M = max(m, m'), a = 2^(m - M), b = 2^(m' - M), o = o a + (o' b), l alike. At the end o * (1 / l).
//
//   lanes: query heads of a KV head, row by row     scores [position][lane]     out [lane][head_dim]
#pragma once

// Queries of a row and head, rounded.
template <class E>
struct Queries {
  typedef float T;
  static MS_INLINE T *of(const Engine &e, long row, int head) { return (T *)e.queries + (row * e.config.num_heads + head) * e.head_width; }
  static MS_INLINE void put(T *to, V value) { store(to, E::round(value)); }
};

struct Lanes {
  int count, vectors;
  alignas(64) int32_t low[kLanes], high[kLanes];  // positions [low, high) are seen
};

// The rows of one KV head at positions [first, first + count), block by block: `see(i, key, value)`.
template <class E, class F>
MS_INLINE void each_row(const Engine &e, const Layer &layer, int span, int kv_head, int first, int count, F see) {
  const MsConfig &c = e.config;
  const long stride = (long)c.num_kv_heads * c.head_dim, half = c.block_size * stride;
  const int32_t *blocks = e.batch.tables + (long)span * e.batch.table_width + first / c.block_size;
  int row = first % c.block_size;
  for (int i = 0; i < count; row = 0) {
    const typename E::Store *key = (const typename E::Store *)layer.kv + *blocks++ * 2 * half + row * stride + (long)kv_head * c.head_dim;
    for (; row < c.block_size && i < count; row++, i++, key += stride) see(i, key, key + half);
  }
}

// Keys and values of a segment; zeros behind the context: whatever stands there, 0 * NaN would be NaN.
template <class E>
MS_INLINE void unpack(const Engine &e, const Layer &layer, Scratch &w, int span, int kv_head, int first, int count) {
  typedef typename E::Store Store;
  const long stride = e.head_dim;
  const int dim = e.config.head_dim, padded = (int)round_up(count, 32);
  each_row<E>(e, layer, span, kv_head, first, count, [&](int i, const Store *key, const Store *value) {
    for (int d = 0; d < dim; d += 16) {
      store(w.keys + i * stride + d, get_some<E>(key + d, dim - d));
      store(w.values + i * stride + d, get_some<E>(value + d, dim - d));
    }
  });
  for (int i = count; i < padded; i++)
    for (int d = 0; d < dim; d += 16) store(w.values + i * stride + d, zeros());
}

// Scores -> weights, in place; maximum (times c) and sum of each lane.
template <class E>
MS_INLINE void weigh(float *scores, const Lanes &lanes, int z, int first, int count, float c, float *maximum, float *sum) {
  const Ints low = ints(lanes.low + 16 * z), high = ints(lanes.high + 16 * z);
  float *column = scores + 16 * z;
  int all_low = lanes.low[16 * z], all_high = lanes.high[16 * z];
  for (int i = 1; i < 16; i++) {
    int l = lanes.low[16 * z + i], h = lanes.high[16 * z + i];
    all_low = l > all_low ? l : all_low;
    all_high = h < all_high ? h : all_high;
  }
  const V lowest = splat(-__builtin_inff());
  V m = lowest;
  for (int i = 0; i < count; i++) {
    V s = load(column + i * kLanes);
    int at = first + i;
    if (at < all_low || at >= all_high) s = select(both(greater(high, splat_int(at)), greater(splat_int(at + 1), low)), s, lowest);
    m = max(m, s);
  }
  m = mul(m, splat(c));
  V sums[16];
  for (int j = 0; j < 16; j++) sums[j] = zeros();
  const int padded = (int)round_up(count, 32);
  for (int i = 0; i < padded; i += 16)
    for (int j = 0; j < 16; j++) {
      int at = first + i + j;
      V p = zeros();
      if (i + j < count) {
        p = exp2v(sub(mul(load(column + (i + j) * kLanes), splat(c)), m));
        if (at < all_low || at >= all_high) p = select(both(greater(high, splat_int(at)), greater(splat_int(at + 1), low)), p, zeros());
      }
      sums[j] = add(sums[j], p);
      store(column + (i + j) * kLanes, E::round(p));
    }
  for (int h = 8; h; h >>= 1)
    for (int j = 0; j < h; j++) sums[j] = add(sums[j], sums[j + h]);
  store(maximum + 16 * z, m);
  store(sum + 16 * z, sums[0]);
}

// o, m, l (+)= those of a later segment.
MS_INLINE void merge(float *o, float &m, float &l, const float *next, float next_m, float next_l, int dim) {
  float top = m > next_m ? m : next_m;
  alignas(64) float both_[16] = {m - top, next_m - top};
  store(both_, exp2v(load(both_)));
  V a = splat(both_[0]), b = splat(both_[1]);
  for (int d = 0; d < dim; d += 16) store(o + d, fma(load(o + d), a, mul(load(next + d), b)));
  l = __builtin_fmaf(l, both_[0], next_l * both_[1]);
  m = top;
}

template <class E>
MS_INLINE void finish(Engine &e, const float *o, float l, long row, int head) {
  const int dim = e.config.head_dim;
  typedef Inputs<E> To;
  V r = splat(1.0f / l);
  for (int d = 0; d < dim; d += 16) To::put((typename To::T *)e.attended, e.heads_width, row, (long)head * dim + d, E::round(mul(load(o + d), r)), dim - d);
}

// Of each lane of a unit, all segments so far; their values stand in w.sums.
struct Sums {
  float top[kWideLanes], total[kWideLanes];
  bool has[kWideLanes] = {};
  MS_INLINE void take(float *values, long stride, int lane, const float *o, float maximum, float sum, int dim) {
    float *so_far = values + lane * stride;
    if (has[lane]) return merge(so_far, top[lane], total[lane], o, maximum, sum, dim);
    for (int d = 0; d < dim; d += 16) store(so_far + d, load(o + d));
    top[lane] = maximum;
    total[lane] = sum;
    has[lane] = true;
  }
  // The same of up to eight lanes at once from `lane` on, of those that see() something; and + 0, as turn_zeros has it.
  template <class F>
  MS_INLINE void take_some(float *values, long stride, int lane, int count, const float *o, const float *maximum, const float *sum, int dim, F see) {
    alignas(64) float factors[16] = {};
    float highest[8];
    for (int i = 0; i < count; i++) {
      if (!has[lane + i] || !see(lane + i)) continue;
      highest[i] = top[lane + i] > maximum[i] ? top[lane + i] : maximum[i];
      factors[i] = top[lane + i] - highest[i];
      factors[8 + i] = maximum[i] - highest[i];
    }
    store(factors, exp2v(load(factors)));
    for (int i = 0; i < count; i++, o += stride) {
      if (!see(lane + i)) continue;
      float *so_far = values + (lane + i) * stride;
      if (has[lane + i]) {
        const V a = splat(factors[i]), b = splat(factors[8 + i]);
        for (int d = 0; d < dim; d += 16) store(so_far + d, fma(load(so_far + d), a, mul(add(load(o + d), zeros()), b)));
        total[lane + i] = __builtin_fmaf(total[lane + i], factors[i], sum[i] * factors[8 + i]);
        top[lane + i] = highest[i];
        continue;
      }
      for (int d = 0; d < dim; d += 16) store(so_far + d, add(load(o + d), zeros()));
      top[lane + i] = maximum[i];
      total[lane + i] = sum[i];
      has[lane + i] = true;
    }
  }
};

// A unit is done: its rows, or its part of one.
template <class E>
MS_INLINE void leave(Engine &e, const Scratch &w, const Unit &u, int lanes, int group, const Sums &sums) {
  const long stride = e.head_dim;
  for (int i = 0; i < lanes; i++) {
    const float *o = w.sums + i * stride;
    if (u.segment < 0) {
      finish<E>(e, o, sums.total[i], e.span_firsts[u.span] + u.first_row + i / group, u.kv_head * group + i % group);
      continue;
    }
    float *part = e.parts + (u.part + i) * (stride + 16);
    part[stride + 2] = sums.has[i];
    if (!sums.has[i]) continue;
    for (int d = 0; d < e.config.head_dim; d += 16) store(part + d, load(o + d));
    part[stride] = sums.top[i];
    part[stride + 1] = sums.total[i];
  }
}

// A block of masked positions turns a -0 into +0, so all are turned.
MS_INLINE void turn_zeros(float *o, int rows, long stride, int dim) {
  for (int i = 0; i < rows; i++)
    for (int d = 0; d < dim; d += 16) store(o + i * stride + d, add(load(o + i * stride + d), zeros()));
}

// Lanes of a unit, and their queries as [head_dim][lane].
template <class E>
MS_INLINE void gather(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, int group, Lanes &lanes) {
  const MsConfig &c = e.config;
  const long row0 = e.span_firsts[u.span] + u.first_row;
  const int position0 = e.batch.span_contexts[u.span] - e.batch.span_rows[u.span] + u.first_row;
  lanes.count = u.num_rows * group;
  lanes.vectors = lanes.count > 16 ? 2 : 1;
  for (int i = 0; i < 16 * lanes.vectors; i++) {
    const bool used = i < lanes.count;
    const int r = used ? i / group : u.num_rows - 1;  // an idle lane sees what the last one does: fewer masks
    lanes.high[i] = position0 + r + 1;
    lanes.low[i] = layer.window && lanes.high[i] > layer.window ? lanes.high[i] - layer.window : 0;
    const float *q = Queries<E>::of(e, row0 + r, u.kv_head * group + i % group);
    for (int d = 0; d < c.head_dim; d++) w.queries[d * kLanes + i] = used ? q[d] : 0.0f;
  }
}

// One segment: w.out, and maximum and sum of each lane.
template <class E>
MS_INLINE void segment(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, const Lanes &lanes, int first, int count, float *maximum, float *sum) {
  const long stride = e.head_dim;
  const int padded = (int)round_up(count, 32), tiles = (int)(e.head_width / 16);
  unpack<E>(e, layer, w, u.span, u.kv_head, first, count);
  Put scores = {w.scores, kLanes};
  multiply<1>(w.keys, stride, count, InRows{w.queries, kLanes}, (int)(stride / 32), 0, lanes.vectors, scores);
  for (int z = 0; z < lanes.vectors; z++) weigh<E>(w.scores, lanes, z, first, count, e.config.scale * kLog2e, maximum, sum);
  Put out = {w.out, stride};
  multiply<kLanes>(w.scores, 1, lanes.count, InRows{w.values, stride}, padded / 32, 0, tiles, out);
  turn_zeros(w.out, lanes.count, stride, e.config.head_dim);
}

#if defined(MS_TRANSPOSES)
#include "row_attention.h"
#endif

template <class E>
static void attend(Engine &e, const Layer &layer, Scratch &w, const Unit &u) {
  const int group = e.config.num_heads / e.config.num_kv_heads, dim = e.config.head_dim;
  const long stride = e.head_dim;
  Lanes lanes;
  gather<E>(e, layer, w, u, group, lanes);
#if defined(MS_TRANSPOSES)
  const bool is_row = u.num_rows == 1 && dim % 32 == 0;
#endif
  const int end = lanes.high[lanes.count - 1], low = lanes.low[0];
  alignas(64) float maximum[kLanes], sum[kLanes];
  Sums sums;
  const int begin = u.segment < 0 ? low / kSegment : u.segment;
  const int last = u.segment < 0 ? (end - 1) / kSegment : u.segment;
  for (int s = begin; s <= last; s++) {
    const int first = s * kSegment, count = end - first < kSegment ? end - first : kSegment;
    if (first + count <= low) continue;
#if defined(MS_TRANSPOSES)
    if (is_row) row_segment<E>(e, layer, w, u, group, low, first, count, maximum, sum);
    else
#endif
      segment<E>(e, layer, w, u, lanes, first, count, maximum, sum);
    for (int i = 0; i < lanes.count; i++) {
      if (lanes.high[i] <= first || lanes.low[i] >= first + count) continue;
      sums.take(w.sums, stride, i, w.out + i * stride, maximum[i], sum[i], dim);
    }
  }
  leave<E>(e, w, u, lanes.count, group, sums);
}

// A segment that several units need; here they all unpack it.
template <class E>
static void pack_unit(Engine &, const Layer &, Scratch &, const Unit &) {}

// The units of one row and one KV head, in ascending order of their segments.
template <class E>
static void merge_units(Engine &e, const Unit &u) {
  const int group = e.config.num_heads / e.config.num_kv_heads;
  const long stride = e.head_dim + 16;
  for (int g = 0; g < group; g++) {
    float *o = nullptr;
    for (int s = 0; s < u.num_segments; s++) {
      float *part = e.parts + (u.part + (long)s * group + g) * stride, *told = part + e.head_dim;
      if (told[2] == 0.0f) continue;
      if (o) merge(o, o[e.head_dim], o[e.head_dim + 1], part, told[0], told[1], e.config.head_dim);
      else o = part;
    }
    finish<E>(e, o, o[e.head_dim + 1], e.span_firsts[u.span] + u.first_row, u.kv_head * group + g);
  }
}
