// One step of the model by all threads of a team: phases of units. Included inside a variant's
// own namespace, behind attention.h. Owns the order of things; what is computed is in numerics.h.
#pragma once

// Tiles of a unit of a product: some units a thread, so that who is free takes more.
MS_INLINE int tiles_of_unit(const Engine &e, long tiles) {
  long each = tiles / (e.config.threads * 8);
  each = each < 2 ? 2 : each > 16 ? 16 : each;
  return (int)(each & ~1L);
}

// Rows in blocks, columns in units: `run(first row, rows, first tile, last tile)` for each.
template <class F>
MS_INLINE void share(Engine &e, int &phase, long rows, long tiles, F run) {
  const int each = tiles_of_unit(e, tiles);
  const int columns = (int)((tiles + each - 1) / each), blocks = (int)((rows + kRowBlock - 1) / kRowBlock);
  const int units = columns * blocks;
  for (int u; (u = e.team->next_unit(phase, units)) < units;) {
    const long row = (long)(u / columns) * kRowBlock;
    const int tile = u % columns * each;
    run(row, (int)(rows - row < kRowBlock ? rows - row : kRowBlock), tile, (int)(tile + each < tiles ? tile + each : tiles));
  }
  e.team->end(phase, units);
}

template <class E>
MS_INLINE void norm_row(const Engine &e, const float *x, const float *weight, typename Inputs<E>::T *to, long row) {
  V r = splat(norm_factor(x, (int)e.hidden, e.config.hidden, e.config.eps));
  for (long i = 0; i < e.hidden; i += 16) Inputs<E>::put_rounding(to, e.hidden, row, i, mul(mul(load(x + i), r), load(weight + i)));
}

// The first rows of x, normed; a few of them by each thread for itself.
template <class E>
static const typename Inputs<E>::T *norm_rows(Engine &e, Scratch &w, int &phase, long rows, const float *weight) {
  typedef typename Inputs<E>::T T;
  if (rows <= kFewRows) {
    for (long m = 0; m < rows; m++) norm_row<E>(e, e.x + m * e.hidden, weight, (T *)w.normed, m);
    return (const T *)w.normed;
  }
  const int units = (int)((rows + 15) / 16);
  for (int u; (u = e.team->next_unit(phase, units)) < units;)
    for (long m = u * 16; m < rows && m < u * 16 + 16; m++) norm_row<E>(e, e.x + m * e.hidden, weight, (T *)e.normed, m);
  e.team->end(phase, units);
  return (const T *)e.normed;
}

MS_INLINE void rotate(float *x, const float *cos, const float *sin, int dim) {
  const int half = dim / 2;
  if (half % 16 == 0) {
    for (int i = 0; i < half; i += 16) {
      V a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(x + i, fnma(b, s, mul(a, c)));
      store(x + half + i, fma(a, s, mul(b, c)));
    }
    return;
  }
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = __builtin_fmaf(-b, sin[i], a * cos[i]);
    x[half + i] = __builtin_fmaf(a, sin[i], b * cos[i]);
  }
}

// A row of one head, as the product left it: bias, norm, RoPE, and where it goes.
template <class E>
MS_INLINE void place_head(Engine &e, const Layer &layer, long row, int head, float *x) {
  const MsConfig &c = e.config;
  const int dim = c.head_dim, kv = head - c.num_heads;
  const long width = e.head_width;
  const bool is_query = kv < 0, is_value = kv >= c.num_kv_heads;
  if (layer.qkv_bias)
    for (int d = 0; d < dim; d += 16) store(x + d, add(load(x + d), load(layer.qkv_bias + head * width + d)));
  const float *norm = is_value ? nullptr : is_query ? layer.q_norm : layer.k_norm;
  if (norm) {
    V r = splat(norm_factor(x, (int)width, dim, c.eps));
    for (int d = 0; d < dim; d += 16) store(x + d, mul(mul(load(x + d), r), load(norm + d)));
  }
  if (layer.use_rope && !is_value) {
    const long at = (long)e.batch.positions[row] * (dim / 2);
    rotate(x, e.cos + at, e.sin + at, dim);
  }
  if (is_query) {
    for (int d = 0; d < dim; d += 16) Queries<E>::put(Queries<E>::of(e, row, head) + d, load(x + d));
    return;
  }
  const int64_t slot = e.batch.slots[row];
  if (slot < 0) return;
  const long at = slot / c.block_size * 2 * c.block_size + slot % c.block_size + (is_value ? c.block_size : 0);
  typename E::Store *to = (typename E::Store *)layer.kv + (at * c.num_kv_heads + kv % c.num_kv_heads) * dim;
  for (int d = 0; d < dim; d += 16) put_some<E>(to + d, E::round(clamped<E>(load(x + d))), dim - d);
}

template <class E>
static void heads(Engine &e, const Layer &layer, Scratch &w, int &phase, const typename Inputs<E>::T *normed, bool is_narrow) {
  const MsConfig &c = e.config;
  const int num_heads = c.num_heads + 2 * c.num_kv_heads, tiles = (int)(e.head_width / 16);
  const long rows = e.batch.num_rows, blocks = (rows + kRowBlock - 1) / kRowBlock;
  const Weights<E> weights(layer.qkv, e.hidden);
  const int units = num_heads * (int)blocks;
  for (int u; (u = e.team->next_unit(phase, units)) < units;) {
    const int head = u % num_heads;
    const long row = (long)(u / num_heads) * kRowBlock;
    const int count = (int)(rows - row < kRowBlock ? rows - row : kRowBlock);
    if (is_narrow && head < c.num_heads && e.wanted_before[row + count] == e.wanted_before[row]) continue;
    Put put = {w.head - head * e.head_width, e.head_dim};
    multiply_weights(Inputs<E>::rows(normed, e.hidden, row), e.hidden, count, weights, head * tiles, (head + 1) * tiles, put);
    for (int m = 0; m < count; m++) place_head<E>(e, layer, row + m, head, w.head + m * e.head_dim);
  }
  e.team->end(phase, units);
}

template <class E>
static void attention(Engine &e, const Layer &layer, Scratch &w, int &phase, bool all) {
  const int packs = e.num_packs, units = e.num_units, merges = e.num_merges;
  if (packs) {
    for (int u; (u = e.team->next_unit(phase, packs)) < packs;)
      if (all || e.packs[u].is_wanted) pack_unit<E>(e, layer, w, e.packs[u]);
    e.team->end(phase, packs);
  }
  for (int u; (u = e.team->next_unit(phase, units)) < units;)
    if (all || e.units[u].is_wanted) attend<E>(e, layer, w, e.units[u]);
  e.team->end(phase, units);
  if (!merges) return;
  for (int u; (u = e.team->next_unit(phase, merges)) < merges;)
    if (all || e.merges[u].is_wanted) merge_units<E>(e, e.merges[u]);
  e.team->end(phase, merges);
}

// Rows whose logits are wanted become the first ones, of x and of what was attended. They ascend: none is overwritten
// before it has moved.
template <class E>
static void narrow(Engine &e, int &phase) {
  typedef typename Inputs<E>::T T;
  if (e.team->next_unit(phase, 1) == 0)
    for (int i = 0; i < e.batch.num_logits; i++) {
      const long from = e.batch.logit_rows[i];
      if (from == i) continue;
      __builtin_memcpy(e.x + i * e.hidden, e.x + from * e.hidden, sizeof(float) * (size_t)e.hidden);
      Inputs<E>::move((T *)e.attended, e.heads_width, from, i);
    }
  e.team->next_unit(phase, 1);
  e.team->end(phase, 1);
}

// x += A W.
template <class E>
static void residual(Engine &e, int &phase, long all, const void *inputs, long width, const Matrix &matrix, const float *bias) {
  const Weights<E> weights(matrix, width);
  const typename Inputs<E>::T *a = (const typename Inputs<E>::T *)inputs;
  share(e, phase, all, e.hidden / 16, [&](long row, int rows, int first, int last) {
    Continue sum = {e.x + row * e.hidden, e.hidden};
    multiply_weights(Inputs<E>::rows(a, width, row), width, rows, weights, first, last, sum);
    if (bias)
      for (int m = 0; m < rows; m++)
        for (int i = first * 16; i < last * 16; i += 16) {
          float *x = e.x + (row + m) * e.hidden + i;
          store(x, add(load(x), load(bias + i)));
        }
  });
}

// Gates stand in even tiles, what they let through in the odd ones behind them.
template <class E>
struct Gated {
  static constexpr bool kFromZero = true, kInPlace = false;
  typename Inputs<E>::T *to;
  long stride;
  alignas(64) float gates[kRowBlock][16];
  MS_INLINE V begin(int, int) { return zeros(); }
  MS_INLINE void end(int m, int tile, V sum) {
    if (tile & 1) both(m, tile, load(gates[m]), sum);
    else store(gates[m], sum);
  }
  MS_INLINE void both(int m, int tile, V gate, V sum) { Inputs<E>::put_rounding(to, stride, m, tile / 2 * 16, mul(silu(gate), sum)); }
};

template <class E>
static void mlp(Engine &e, const Layer &layer, Scratch &w, int &phase, long all) {
  const typename Inputs<E>::T *normed = norm_rows<E>(e, w, phase, all, layer.mlp_norm);
  const Weights<E> weights(layer.gate_up, e.hidden);
  share(e, phase, all, e.intermediate / 8, [&](long row, int rows, int first, int last) {
    Gated<E> gated;
    gated.to = Inputs<E>::rows((typename Inputs<E>::T *)e.middle, e.intermediate, row);
    gated.stride = e.intermediate;
    multiply_weights(Inputs<E>::rows(normed, e.hidden, row), e.hidden, rows, weights, first, last, gated);
  });
  residual<E>(e, phase, all, e.middle, e.intermediate, layer.down, nullptr);
}

template <class E>
static void embed(Engine &e, int &phase) {
  typedef typename E::Store Store;
  const long rows = e.batch.num_rows;
  const int units = (int)((rows + 15) / 16);
  for (int u; (u = e.team->next_unit(phase, units)) < units;)
    for (long m = u * 16; m < rows && m < u * 16 + 16; m++) {
      float *x = e.x + m * e.hidden;
      const long token = e.batch.tokens[m];
      if (e.embedding) {
        const Store *from = (const Store *)e.embedding + token * e.config.hidden;
        for (int i = 0; i < e.config.hidden; i++) x[i] = E::get1(from + i);
      } else {
        const Store *group = (const Store *)e.head.packed + token / 32 * (e.hidden / 32) * kGroup;
        for (int i = 0; i < e.config.hidden; i++) x[i] = E::get1(group + i / 2 * 2 * kPair + E::at(i, (int)(token % 32)));
      }
      for (long i = e.config.hidden; i < e.hidden; i++) x[i] = 0.0f;
    }
  e.team->end(phase, units);
}

template <class E>
static void logits(Engine &e, int &phase) {
  const MsBatch &b = e.batch;
  typename Inputs<E>::T *normed = (typename Inputs<E>::T *)e.normed;
  const int wanted = b.num_logits;
  for (int u; (u = e.team->next_unit(phase, wanted)) < wanted;)
    norm_row<E>(e, e.x + (long)(e.is_narrow ? u : b.logit_rows[u]) * e.hidden, e.norm, normed, u);
  e.team->end(phase, wanted);
  const Weights<E> weights(e.head, e.hidden);
  share(e, phase, b.num_logits, e.vocab / 16, [&](long row, int rows, int first, int last) {
    Put put = {b.logits + row * e.vocab, e.vocab};
    multiply_weights(Inputs<E>::rows(normed, e.hidden, row), e.hidden, rows, weights, first, last, put);
  });
}

// outside: the float mode of the caller's, in which on_layer runs.
template <class E, class Mode>
static void step_of(Engine &e, int thread, Mode outside) {
  Scratch &w = e.scratch[thread];
  int phase = 0;
  embed<E>(e, phase);
  for (int i = 0; i < e.config.num_layers; i++) {
    const Layer &layer = e.layers[i];
    // Of the last layer, behind its KV, nobody reads a row whose logits are not wanted.
    const bool is_narrow = e.is_narrow && i + 1 == e.config.num_layers;
    const long rows = is_narrow ? e.batch.num_logits : e.batch.num_rows;
    heads<E>(e, layer, w, phase, norm_rows<E>(e, w, phase, e.batch.num_rows, layer.attention_norm), is_narrow);
    const auto tell = [&] {
      leave_float_mode(outside);
      const int ends = e.on_layer(i);
      enter_float_mode();
      return ends;
    };
    if (e.on_layer && e.batch.is_layerwise) {
      e.team->alone(phase, thread, [&] { e.ended = tell(); });
      if (e.ended) return;
    } else if (e.on_layer && thread == 0 && clock_ns() - e.told_ns > kSilenceNs) {  // the others go on meanwhile
      tell();
      e.told_ns = clock_ns();
    }
    if (rows == 0) return;
    attention<E>(e, layer, w, phase, !is_narrow);
    if (is_narrow) narrow<E>(e, phase);
    residual<E>(e, phase, rows, e.attended, e.heads_width, layer.out, layer.out_bias);
    mlp<E>(e, layer, w, phase, rows);
  }
  if (e.batch.num_logits) logits<E>(e, phase);
}

static void step(Engine *e, int thread) {
  auto was = enter_float_mode();
#if defined(MS_PAIRS)
  if (e->config.elem == MS_BF16_PAIRS) step_of<Pairs>(*e, thread, was);
#endif
#if !defined(MS_PAIRS_ALONE)
  if (e->config.elem == MS_BF16) step_of<Half>(*e, thread, was);
  if (e->config.elem == MS_F32) step_of<F32>(*e, thread, was);
#endif
  release_tiles();
  leave_float_mode(was);
}

// --- for tests: the pieces alone --------------------------------------------------------------------

template <class E>
static void product_of(long m, long n, long k, const float *a, void *room, const Matrix &b, float *c) {
  typename Inputs<E>::T *inputs = (typename Inputs<E>::T *)room;
  for (long row = 0; row < m; row++)
    for (long i = 0; i < k; i += 16) Inputs<E>::put(inputs, k, row, i, load(a + row * k + i));
  const Weights<E> weights(b, k);
  for (long row = 0; row < m; row += kRowBlock) {
    Continue sum = {c + row * n, n};
    const long rows = m - row < kRowBlock ? m - row : kRowBlock;
    multiply_weights(Inputs<E>::rows((const typename Inputs<E>::T *)inputs, k, row), k, (int)rows, weights, 0, (int)(n / 16), sum);
  }
}

static void product(int elem, long m, long n, long k, const float *a, void *inputs, const Matrix &b, float *c) {
  auto was = enter_float_mode();
#if defined(MS_PAIRS)
  if (elem == MS_BF16_PAIRS) product_of<Pairs>(m, n, k, a, inputs, b, c);
#endif
#if !defined(MS_PAIRS_ALONE)
  if (elem == MS_BF16) product_of<Half>(m, n, k, a, inputs, b, c);
  if (elem == MS_F32) product_of<F32>(m, n, k, a, inputs, b, c);
#endif
  release_tiles();
  leave_float_mode(was);
}

static void map(int function, long n, float *values) {
  auto was = enter_float_mode();
  for (long i = 0; i < n; i += 16) {
    V v = load(values + i);
    store(values + i, function == 0 ? exp2v(v) : function == 1 ? round_bf16(v) : silu(v));
  }
  leave_float_mode(was);
}
