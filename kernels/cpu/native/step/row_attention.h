// Attention of a single row over one segment, for variants that can transpose: positions in the lanes, keys and
// values read where they stand. The same bits as attention.h, whose lanes are queries: with a handful of query
// heads most of those would be idle. Included inside a variant's own namespace, behind attention.h.
#pragma once

// Keys of 16 positions, 32 of head_dim from `block * 32` on -> two k at a time.
template <class E>
struct Columns;
template <>
struct Columns<Bf16> {
  V words[16];
  MS_INLINE void read(const char *const *rows, int block) { transpose(rows, block * 64, words); }
  MS_INLINE void pair(int p, V &first, V &second) const { split_pairs(words[p], first, second); }
};
template <>
struct Columns<F32> {
  V words[32];
  MS_INLINE void read(const char *const *rows, int block) {
    transpose(rows, block * 128, words);
    transpose(rows, block * 128 + 64, words + 16);
  }
  MS_INLINE void pair(int p, V &first, V &second) const {
    first = words[2 * p];
    second = words[2 * p + 1];
  }
};

// scores[g][position] of G query heads; `count` rounded up to 16 rows can be read.
template <class E, int G>
MS_ALONE void score_rows(const float *queries, long width, const char *const *keys, int count, int blocks, float (*scores)[kSegment]) {
  for (int i = 0; i < count; i += 16) {
    V sums[G];
    for (int g = 0; g < G; g++) sums[g] = zeros();
    for (int block = 0; block < blocks; block++) {
      Columns<E> columns;
      columns.read(keys + i, block);
      V even[G], odd[G];
      for (int g = 0; g < G; g++) even[g] = odd[g] = zeros();
      const float *q = queries + block * 32;
      for (int p = 0; p < 16; p++) {
        V first, second;
        columns.pair(p, first, second);
        for (int g = 0; g < G; g++) {
          even[g] = fma(first, splat(q[g * width + 2 * p]), even[g]);
          odd[g] = fma(second, splat(q[g * width + 2 * p + 1]), odd[g]);
        }
      }
      for (int g = 0; g < G; g++) sums[g] = add(sums[g], add(even[g], odd[g]));
    }
    for (int g = 0; g < G; g++) store(scores[g] + i, sums[g]);
  }
}

// Scores -> weights in place, positions [low, count) are seen; those up to `padded` weigh +0.
template <class E>
MS_INLINE void weigh_row(float *scores, int low, int count, int padded, float c, float &maximum, float &sum) {
  alignas(64) static const int32_t order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Ints lanes = ints(order);
  V m = splat(-__builtin_inff());
  for (int i = 0; i < count; i += 16) {
    V s = load(scores + i);
    if (i < low || i + 16 > count)
      s = select(both(greater(splat_int(count - i), lanes), greater(lanes, splat_int(low - i - 1))), s, splat(-__builtin_inff()));
    m = max(m, s);
  }
  alignas(64) float all[16];
  store(all, m);
  float top = all[0];
  for (int i = 1; i < 16; i++) top = all[i] > top ? all[i] : top;
  top = top * c;
  V total = zeros();
  for (int i = 0; i < padded; i += 16) {
    V p = zeros();
    if (i < count) {
      p = exp2v(sub(mul(load(scores + i), splat(c)), splat(top)));
      if (i < low || i + 16 > count)
        p = select(both(greater(splat_int(count - i), lanes), greater(lanes, splat_int(low - i - 1))), p, zeros());
    }
    total = add(total, p);
    store(scores + i, E::round(p));
  }
  maximum = top;
  sum = tree_sum(total);
}

// out[g] = the product of weights[g] and the values of `padded` positions, by T tiles of head_dim.
template <class E, int G, int T>
MS_ALONE void weigh_values(const float (*weights)[kSegment], const typename E::Store *const *values, int padded, int tile, float *out, long stride) {
  V sums[G][T];
  for (int g = 0; g < G; g++)
    for (int t = 0; t < T; t++) sums[g][t] = zeros();
  for (int i = 0; i < padded; i += 32) {
    V even[G][T], odd[G][T];
    for (int g = 0; g < G; g++)
      for (int t = 0; t < T; t++) even[g][t] = odd[g][t] = zeros();
    for (int k = i; k < i + 32; k += 2)
      for (int t = 0; t < T; t++) {
        V first = E::get(values[k] + (tile + t) * 16), second = E::get(values[k + 1] + (tile + t) * 16);
        for (int g = 0; g < G; g++) {
          even[g][t] = fma(splat(weights[g][k]), first, even[g][t]);
          odd[g][t] = fma(splat(weights[g][k + 1]), second, odd[g][t]);
        }
      }
    for (int g = 0; g < G; g++)
      for (int t = 0; t < T; t++) sums[g][t] = add(sums[g][t], add(even[g][t], odd[g][t]));
  }
  for (int g = 0; g < G; g++)
    for (int t = 0; t < T; t++) store(out + g * stride + (tile + t) * 16, add(sums[g][t], zeros()));
}

template <class E, int G>
MS_INLINE void row_heads(const Engine &e, Scratch &w, const float *queries, const char *const *keys, const typename E::Store *const *values, int low, int count, int first_lane, float *maximum, float *sum) {
  float(*scores)[kSegment] = (float(*)[kSegment])w.scores;
  const int padded = (int)round_up(count, 32), tiles = (int)(e.head_width / 16);
  score_rows<E, G>(queries, e.head_width, keys, count, e.config.head_dim / 32, scores);
  for (int g = 0; g < G; g++)
    weigh_row<E>(scores[g], low, count, padded, e.config.scale * kLog2e, maximum[first_lane + g], sum[first_lane + g]);
  float *out = w.out + first_lane * e.head_dim;
  for (int tile = 0; tile < tiles; tile += 2) weigh_values<E, G, 2>(scores, values, padded, tile, out, e.head_dim);
}

// One segment of a unit with one row: w.out, and maximum and sum of each lane. head_dim is a multiple of 32.
template <class E>
static void row_segment(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, int group, int low, int first, int count, float *maximum, float *sum) {
  typedef typename E::Store Store;
  const MsConfig &c = e.config;
  const int padded = (int)round_up(count, 32);
  const char *keys[kSegment];
  const Store *values[kSegment];
  // Rows of one head lie apart: nothing but this fetches them ahead.
  each_row<E>(e, layer, u.span, u.kv_head, first, count, [&](int i, const Store *key, const Store *value) {
    keys[i] = (const char *)key;
    values[i] = value;
    for (size_t at = 0; at < c.head_dim * sizeof(Store); at += 64) {
      prefetch_far(keys[i] + at);
      prefetch_far((const char *)value + at);
    }
  });
  for (int i = count; i < padded; i++) {
    keys[i] = keys[0];
    values[i] = (const Store *)w.zeros;
  }
  const float *queries = Queries<E>::of(e, e.span_firsts[u.span] + u.first_row, u.kv_head * group);
  const int from = low > first ? low - first : 0;
  for (int g = 0; g < group;) {
    const float *q = queries + g * e.head_width;
    if (group - g >= 4) row_heads<E, 4>(e, w, q, keys, values, from, count, g, maximum, sum), g += 4;
    else if (group - g == 3) row_heads<E, 3>(e, w, q, keys, values, from, count, g, maximum, sum), g += 3;
    else if (group - g == 2) row_heads<E, 2>(e, w, q, keys, values, from, count, g, maximum, sum), g += 2;
    else row_heads<E, 1>(e, w, q, keys, values, from, count, g, maximum, sum), g += 1;
  }
}
