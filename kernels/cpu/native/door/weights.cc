// The C interface: weights come in, and are packed. What is packed is a function of the weights, their elem and the
// layout (pack.h) alone.
#include "memory.h"

#include "../pack.h"

using ms::copied;
using ms::elem_size;
using ms::floats;
using ms::take;

extern "C" {

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
}
