// The C interface: weights come in, are packed one behind the other into memory of the caller's, or are found there
// as they were packed before. What is packed is a function of the weights, the config's elem and weights, and the layout (pack.h) alone.
#include "memory.h"

#include "../pack.h"

namespace {

using ms::Engine;
using ms::elem_size;

// The next `nbytes` of the weights' memory. A page each: nothing depends on what stands beside it.
void *place(Engine &e, size_t nbytes) {
  char *at = (char *)e.weights + e.weights_nbytes;
  e.weights_nbytes += (nbytes + 4095) / 4096 * 4096;
  return at;
}

ms::Matrix place_matrix(Engine &e, long columns, long width) {
  const bool is_int8 = e.config.weights == MS_INT8;
  ms::Matrix matrix = {place(e, (is_int8 ? 1 : elem_size(e)) * (size_t)(columns * width)), nullptr};
  if (is_int8) matrix.scales = (float *)place(e, sizeof(float) * (size_t)columns);
  return matrix;
}

float *placed(Engine &e, const float *from, long count, long padded) {
  if (!from) return nullptr;
  float *to = (float *)place(e, sizeof(float) * (size_t)padded);
  if (!e.is_packed) memcpy(to, from, sizeof(float) * (size_t)count);
  return to;
}

}  // namespace

extern "C" {

int32_t ms_layout_version() { return ms::kLayoutVersion; }

void ms_place_weights(MsEngine *e, void *memory, int32_t is_packed) {
  e->weights = memory;
  e->weights_nbytes = 0;
  e->is_packed = is_packed;
}

int64_t ms_weights_nbytes(const MsEngine *e) { return (int64_t)e->weights_nbytes; }

const char *ms_set_layer(MsEngine *e, int32_t index, const MsLayer *from) {
  const MsConfig &c = e->config;
  if (index < 0 || index >= c.num_layers) return "index";
  if (!e->weights && !e->is_packed) return "ms_place_weights";
  ms::Layer &to = e->layers[index];
  const size_t size = elem_size(*e);
  const long heads = (long)c.num_heads * c.head_dim;
  const long hidden = e->hidden / 32, wide = e->heads_width / 32, middle = e->intermediate / 32;
  to.qkv = place_matrix(*e, e->qkv_width, e->hidden);
  to.out = place_matrix(*e, e->hidden, e->heads_width);
  to.gate_up = place_matrix(*e, 2 * e->intermediate, e->hidden);
  to.down = place_matrix(*e, e->hidden, e->intermediate);
  to.attention_norm = placed(*e, from->attention_norm, c.hidden, e->hidden);
  to.mlp_norm = placed(*e, from->mlp_norm, c.hidden, e->hidden);
  to.q_norm = placed(*e, from->q_norm, c.head_dim, e->head_width);
  to.k_norm = placed(*e, from->k_norm, c.head_dim, e->head_width);
  to.out_bias = placed(*e, from->o_bias, c.hidden, e->hidden);
  to.qkv_bias = from->q_bias ? (float *)place(*e, sizeof(float) * (size_t)e->qkv_width) : nullptr;
  to.kv = from->kv;
  to.use_rope = from->use_rope;
  to.window = from->window;
  if (e->is_packed) return nullptr;
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
  return nullptr;
}

const char *ms_set_model(MsEngine *e, const MsModel *from) {
  const MsConfig &c = e->config;
  if (!e->weights && !e->is_packed) return "ms_place_weights";
  if (from->num_positions < c.max_context) return "num_positions";
  const size_t size = elem_size(*e), nbytes = size * (size_t)((long)c.vocab * c.hidden);
  const long table = (long)from->num_positions * (c.head_dim / 2);
  e->head = place_matrix(*e, e->vocab, e->hidden);
  // A tied one stands by itself beside an int8 head: what is looked up is not rounded to it.
  e->embedding = from->head || c.weights == MS_INT8 ? place(*e, nbytes) : nullptr;
  e->norm = placed(*e, from->norm, c.hidden, e->hidden);
  e->cos = placed(*e, from->cos, table, table + 16);
  e->sin = placed(*e, from->sin, table, table + 16);
  if (e->is_packed) return nullptr;
  ms::pack(c.elem, from->head ? from->head : from->embedding, e->head, c.vocab, c.hidden, e->hidden / 32, 0, 1);
  if (e->embedding) memcpy(e->embedding, from->embedding, nbytes);
  return nullptr;
}
}
