// What a step works on: the packed model, the pool, a batch, and room for what lies between. Plain data, the same
// for every variant; door/ makes and checks it, step/ computes with it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"
#include "team/team.h"

namespace ms {

constexpr int kSegment = 256;  // positions of a segment of attention: part of the numerics class
constexpr int kLanes = 32;     // queries that are worked on together
constexpr int kWideLanes = 96;  // by products of pairs

constexpr long kMaxPackedNbytes = 64L << 20;  // of a layer's segments that several units of a step share

constexpr int kMaxDotRows = 8;  // rows of a product of pairs that are worked on together

constexpr int kRowBlock = 64;  // rows that share a unit of a product
constexpr int kFewRows = 8;    // so many are normed by each thread for itself: one phase less

// Of a step, at most: embedding; a layer's norm, heads, callback, packing, attention, merges, output, norm, gates, down; the
// rows of the last layer that go on; the last norm and the logits.
inline int phases_of(int num_layers) { return 10 * num_layers + 4; }

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Of a thread's tiles: queries, weights, values, keys (tiles/attention.h). head_dim padded.
inline long tile_elements(long head_dim) { return kLanes * head_dim + (long)kLanes * kSegment + 2L * kSegment * head_dim; }

// The same of products of pairs: queries, weights, keys, values (pairs/attention.h), rows with a gap of 32.
inline long pair_elements(long head_dim) {
  return kWideLanes * (head_dim + 32) + (long)kMaxDotRows * (kSegment + 32) + 2L * kSegment * head_dim;
}

// Weights of a product, packed (pack.h).
struct Matrix {
  void *packed;
  float *scales;  // of its columns; null: packed is of the model's elem
};

struct Layer {
  Matrix qkv, out, gate_up, down;
  float *attention_norm, *mlp_norm, *q_norm, *k_norm, *qkv_bias, *out_bias;
  void *kv;
  int use_rope, window;
};

// One thread's own.
struct Scratch {
  float *keys, *values;      // [kSegment][head_dim padded]: a segment, zeros behind the context
  float *queries;            // [head_dim padded][kLanes]
  float *scores;             // [kSegment][kLanes]
  float *out, *sums;         // [kLanes][head_dim padded] of this segment, and of all so far
  float *head;               // [kRowBlock][head_dim padded]
  void *normed;              // [kFewRows][hidden] inputs of a product
  float *zeros;              // [head_dim padded], never written
  uint16_t *tiles;           // a segment as tiles/attention.h or pairs/attention.h packs it
};

// A share of a layer's attention: some rows of a span, the query heads of one KV head, one segment or all.
// Of a unit with one segment the partial results are kept: [lane][part_stride] values, maximum, sum, 1 if it saw any.
struct Unit {
  int span, first_row, num_rows;  // rows of the span
  int kv_head;
  int is_wanted;     // one of its rows is: of the last layer nothing else is computed
  int segment;       // -1: all
  int num_segments;  // of a merge: how many units follow each other
  long part;         // of its first lane
  long packed;       // place of its first segment in e.segments; -1: it packs its own
};

struct Engine {
  MsConfig config;
  // Padded: k of a product in blocks of 32, n in groups of 32.
  long hidden, heads_width, qkv_width, intermediate, vocab, head_dim;
  long head_width;  // head_dim in whole registers: columns of a head in qkv, and of its queries
  Layer *layers;
  Matrix head;
  void *embedding;  // null: tied, rows are read from the packed head
  float *norm, *cos, *sin;
  void *weights;  // the caller's; what is packed lies in it
  size_t weights_nbytes;
  int is_packed;
  MsBatch batch;
  MsOnLayer on_layer;
  int64_t told_ns;  // when on_layer came last; of a step that is not layerwise
  int ended;
  int is_narrow;   // the last layer goes on with the rows alone whose logits are wanted
  float *x;        // [rows][hidden] the residual
  void *normed;    // [rows][hidden]         inputs of products, as the variant reads them
  void *attended;  // [rows][heads_width]
  void *middle;    // [rows][intermediate]
  void *queries;   // [rows][num_heads][head_width]
  float *parts;
  size_t parts_capacity;
  Unit *packs, *units, *merges;
  int num_packs, num_units, num_merges;
  size_t packs_capacity, units_capacity, merges_capacity;
  uint16_t *segments;  // [place][keys, values][kSegment][head_dim], as pairs/attention.h packs them
  size_t segments_capacity;
  long *span_firsts;  // [spans] first row
  int *wanted_before;  // [rows + 1] rows before this one whose logits are wanted
  size_t spans_capacity, wanted_capacity;
  Scratch *scratch;
  Team *team;
  void **arena;
  int num_arena;
};

int64_t clock_ns();  // monotonic
constexpr int64_t kSilenceNs = 100000000;  // between two signs of life

// Functions of a variant; null where the compiler could not make it.
struct Variant {
  void (*step)(Engine *, int thread);
  void (*product)(int elem, long m, long n, long k, const float *a, void *inputs, const Matrix &b, float *c);
  void (*map)(int function, long n, float *values);
};

extern const Variant portable_variant, avx2_variant, avx512_variant, avx512bf16_variant, amx_variant;

}  // namespace ms
