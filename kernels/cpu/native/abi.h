// The C interface of the native step: what Python hands over (kernels/cpu/library.py mirrors every struct).
// Owns the layout of these structs and nothing else. All pointers are borrowed for the time said beside them.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Of weights, activations and KV, and which product multiplies them (step/numerics.h): bf16 by blocks or by pairs.
enum MsElem : int32_t { MS_BF16 = 0, MS_F32 = 1, MS_BF16_PAIRS = 2, MS_NUM_ELEMS = 3 };
// How the matrices of layers and the head stand: as elem says, or in int8 with a scale for each of their rows (pack.h).
enum MsWeights : int32_t { MS_AS_ELEM = 0, MS_INT8 = 1, MS_NUM_WEIGHTS = 2 };
enum MsVariant : int32_t { MS_PORTABLE = 0, MS_AVX2 = 1, MS_AVX512 = 2, MS_AVX512BF16 = 3, MS_AMX = 4, MS_NUM_VARIANTS = 5 };

// Shape of a model and bounds of a step. Everything is counted in elements, but for eps and scale.
struct MsConfig {
  int32_t variant, elem, weights, threads;
  int32_t num_layers, num_heads, num_kv_heads, head_dim, hidden, intermediate, vocab;
  int32_t block_size, num_blocks;
  int32_t max_rows;     // tokens of a step
  int32_t max_context;  // positions of a sequence; length of the RoPE tables
  int32_t max_logits;   // rows of a step whose logits are wanted
  float eps, scale;  // of every norm; of the scores
};

// Weights of a layer as the checkpoint has them, to be packed as the config says: [out][in], in its elem; norms and biases in fp32.
// Read while ms_set_layer runs, if they are not packed yet; else they are not read, and only tell by not being null
// that they are there. A bias, and q_norm and k_norm, may be null.
struct MsLayer {
  const void *q, *k, *v, *o, *gate, *up, *down;
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
  const float *q_bias, *k_bias, *v_bias, *o_bias;
  void *kv;          // this layer of the pool: [num_blocks][2][block_size][num_kv_heads][head_dim]; for good
  int32_t use_rope;  // 0: the layer knows no positions
  int32_t window;    // positions that a token sees, itself included; 0: all
};

// What is not a layer's: embedding [vocab][hidden], head the same or null for a tied one; norm fp32; cos, sin
// [num_positions][head_dim / 2]. As of a layer: read while ms_set_model runs, or only told to be there.
struct MsModel {
  const void *embedding, *head;
  const float *norm, *cos, *sin;
  int32_t num_positions;  // at least max_context
};

// One step: rows of all spans, packed one span after the other.
struct MsBatch {
  int32_t num_rows, num_spans, num_logits, table_width;
  int32_t is_layerwise;  // on_layer comes when a layer's KV stands; else now and then, as a sign of life
  const int32_t *tokens, *positions;  // [num_rows]
  const int64_t *slots;               // [num_rows] block * block_size + row of its KV, -1: not written
  const int32_t *span_rows;           // [num_spans] rows of the span
  const int32_t *span_contexts;       // [num_spans] positions up to its last row
  const int32_t *tables;              // [num_spans][table_width] blocks
  const int32_t *logit_rows;          // [num_logits] ascending
  float *logits;                      // [num_logits][ms_logits_width()], written
};

typedef int32_t (*MsOnLayer)(int32_t layer);  // not 0: the step ends there, if it is layerwise

struct MsEngine;
int32_t ms_abi_version();
int32_t ms_supports(int32_t variant, int32_t elem);          // 1: compiled in, computes it, and this CPU can run it
MsEngine *ms_create(const MsConfig *config);                 // null: no memory or threads
// Where the weights of all layers, in their order, and of the model lie: zeroed memory at a page's begin that they are
// packed into, or where they stand packed (is_packed); borrowed for good. Null with is_packed: nothing is touched, and
// ms_weights_nbytes tells how much there would be.
void ms_place_weights(MsEngine *, void *memory, int32_t is_packed);
int64_t ms_weights_nbytes(const MsEngine *);                 // so far
int32_t ms_layout_version();                                 // of packed weights
const char *ms_set_layer(MsEngine *, int32_t, const MsLayer *);  // null, or what is wrong
const char *ms_set_model(MsEngine *, const MsModel *);           // behind the layers
int64_t ms_logits_width(const MsEngine *);
const char *ms_step(MsEngine *, const MsBatch *, MsOnLayer on_layer);  // null: done, or ended by on_layer
void ms_destroy(MsEngine *);
// For tests: one product C[m][n] += A[m][k] B[n][k]^T by the variant's own kernel, one thread; B as a checkpoint has it.
const char *ms_product(int32_t variant, int32_t elem, int32_t weights, int32_t m, int32_t n, int32_t k, const float *a, const void *b, float *c);
// For tests: values[i] = f(values[i]), f: 0 exp2, 1 round to bf16, 2 silu; n a multiple of 16.
const char *ms_map(int32_t variant, int32_t function, int32_t n, float *values);
}
#pragma GCC visibility pop
