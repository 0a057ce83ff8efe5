// Attention of the class on tiles: a segment's two products. Included inside a variant's own namespace, behind
// step/attention.h (segments, masks, maxima, sums and merges are there), step/row_attention.h and product.h.
//
//   S^T = K Q^T   keys are read where they stand in the pool, 16 rows a tile; queries as B
//   O   = P V     weights as A; values as B: position after position in pairs, zeros behind the context
//
// Heads whose dimension is no multiple of 32 take the way of AVX512, to the same bits.
#pragma once

MS_INLINE bool has_tiles(const Engine &e) { return e.config.head_dim % 32 == 0; }

// A thread's w.tiles, see tile_elements() in model.h.
struct TileRoom {
  uint16_t *queries, *weights, *values, *keys;
  MS_INLINE TileRoom(const Engine &e, const Scratch &w) {
    queries = w.tiles;
    weights = queries + kLanes * e.head_dim;
    values = weights + kLanes * kSegment;
    keys = values + kSegment * e.head_dim;
  }
};

// Sixteen pairs of what round_bf16 gave: first in the lower half of each word.
MS_INLINE __m512i paired(V first, V second) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16), _mm512_castps_si512(second.v));
}

// A segment of one KV head: keys as A (blocks of whole tiles are read in place, of others each row is copied), and
// where its values are.
struct Keys {
  const uint16_t *tiles[kSegment / 16];
  long bytes;
  const uint16_t *values[kSegment];
  MS_INLINE const uint16_t *at(int row, int block) const { return tiles[row / 16] + block * 32; }
};
MS_INLINE void place(const Engine &e, const Layer &layer, const Scratch &w, const Unit &u, int first, int count, Keys &keys) {
  const long dim = e.config.head_dim, line = 32;
  const bool in_place = e.config.block_size % 16 == 0;
  uint16_t *room = TileRoom(e, w).keys;
  keys.bytes = 2 * (in_place ? e.config.num_kv_heads * dim : dim);
  // Rows of one head lie apart: nothing but this fetches them ahead.
  each_row<Bf16>(e, layer, u.span, u.kv_head, first, count, [&](int i, const uint16_t *key, const uint16_t *value) {
    if (!in_place) __builtin_memcpy(room + i * dim, key, (size_t)dim * 2);
    if (i % 16 == 0) keys.tiles[i / 16] = in_place ? key : room + i * dim;
    keys.values[i] = value;
    for (long at = 0; at < dim; at += line) {
      prefetch_far(key + at);
      prefetch_far(value + at);
    }
  });
  for (int i = count; i < round_up(count, 32); i++) keys.values[i] = (const uint16_t *)w.zeros;
}

// Values as B: [dim / 32][padded / 2][32 dims][2 positions].
MS_INLINE void pack_values(const Keys &keys, int dim, int padded, uint16_t *to) {
  for (int i = 0; i < padded; i += 2)
    for (int d = 0; d < dim; d += 16) {
      const __m512i pair = paired(load_bf16(keys.values[i] + d), load_bf16(keys.values[i + 1] + d));
      _mm512_store_si512(to + (long)(d / 32) * padded * 32 + i * 32 + d % 32 * 2, pair);
    }
}

// Weights [position][lane] as A: [lane / 16][padded / 32][16 lanes][32 positions].
MS_INLINE void pack_weights(const float *weights, int vectors, int padded, uint16_t *to) {
  for (int z = 0; z < vectors; z++)
    for (int i = 0; i < padded; i += 32, to += 512) {
      __m512i words[16];
      V lanes[16];
      for (int p = 0; p < 16; p++) {
        const float *row = weights + (i + 2 * p) * kLanes + 16 * z;
        words[p] = paired(load(row), load(row + kLanes));
      }
      transpose(words, lanes);
      for (int j = 0; j < 16; j++) _mm512_store_si512(to + j * 32, _mm512_castps_si512(lanes[j].v));
    }
}

// o = P V of `lanes` lanes, whose weights are packed.
MS_INLINE void weigh_tiles(const Engine &e, Scratch &w, const Keys &keys, int lanes, int padded) {
  const TileRoom room(e, w);
  const int dim = e.config.head_dim;
  pack_values(keys, dim, padded, room.values);
  Put out = {w.out, dim};
  multiply_tiles(InTiles{room.weights, padded}, lanes, FromCache{{room.values, padded / 32}}, 0, dim / 16, out);
  turn_zeros(w.out, lanes, dim, dim);
}

// Queries as B: [dim / 2][32 lanes][2 dims].
template <>
MS_INLINE void gather<Bf16Tiles>(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, int group, Lanes &lanes) {
  gather<Bf16>(e, layer, w, u, group, lanes);
  if (!has_tiles(e)) return;
  uint16_t *to = TileRoom(e, w).queries;
  for (int d = 0; d < e.config.head_dim; d += 2)
    for (int z = 0; z < lanes.vectors; z++) {
      const float *row = w.queries + d * kLanes + 16 * z;
      _mm512_store_si512(to + d * kLanes + 32 * z, paired(load(row), load(row + kLanes)));
    }
}

template <>
void segment<Bf16Tiles>(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, const Lanes &lanes, int first, int count, float *maximum, float *sum) {
  if (!has_tiles(e)) return segment<Bf16>(e, layer, w, u, lanes, first, count, maximum, sum);
  const TileRoom room(e, w);
  const int dim = e.config.head_dim, padded = (int)round_up(count, 32);
  Keys keys;
  place(e, layer, w, u, first, count, keys);
  Put scores = {w.scores, kLanes};
  multiply_tiles(keys, count, FromCache{{room.queries, dim / 32}}, 0, lanes.vectors, scores);
  for (int z = 0; z < lanes.vectors; z++) weigh<Bf16>(w.scores, lanes, z, first, count, e.config.scale * kLog2e, maximum, sum);
  pack_weights(w.scores, lanes.vectors, padded, room.weights);
  weigh_tiles(e, w, keys, lanes.count, padded);
}

// Of a single row most lanes are idle: its scores are turned, and weighed with positions in the lanes.
template <>
void row_segment<Bf16Tiles>(const Engine &e, const Layer &layer, Scratch &w, const Unit &u, int group, int low, int first, int count, float *maximum, float *sum) {
  const TileRoom room(e, w);
  const int dim = e.config.head_dim, padded = (int)round_up(count, 32), vectors = group > 16 ? 2 : 1;
  Keys keys;
  place(e, layer, w, u, first, count, keys);
  float *turned = w.keys;  // [position][lane]; what stands behind the context is masked
  Put scores = {turned, kLanes};
  multiply_tiles(keys, count, FromCache{{room.queries, dim / 32}}, 0, vectors, scores);
  for (int i = 0; i < count; i += 16)
    for (int z = 0; z < vectors; z++) {
      __m512i rows[16];
      V lanes[16];
      for (int j = 0; j < 16; j++) rows[j] = _mm512_loadu_si512(turned + (i + j) * kLanes + 16 * z);
      transpose(rows, lanes);
      for (int g = 16 * z; g < group && g < 16 * z + 16; g++) store(w.scores + g * kSegment + i, lanes[g - 16 * z]);
    }
  for (int g = 0; g < group; g++) {
    float *row = w.scores + g * kSegment;
    weigh_row<Bf16>(row, low > first ? low - first : 0, count, padded, e.config.scale * kLog2e, maximum[g], sum[g]);
    for (int i = 0; i < padded; i += 16) Inputs<Bf16Tiles>::put(room.weights, padded, g, i, load(row + i));
  }
  weigh_tiles(e, w, keys, group, padded);
}
