// Bodies of payloads, whole: kvcache/codec/codec.py says in which order things stand. Included once for each kind of
// CPU, without guard.

namespace ms {
namespace MS_ISA {

// K's symbols or V's behind what is in the body already. symbols: [groups][count]. Returns bytes, or kNoPayload.
MS_TARGET static int64_t put_symbols(int coder, const uint8_t *symbols, int groups, int64_t count, const int32_t *levels,
                                     uint32_t *shares, uint8_t *to, int64_t room) {
  if (coder == kNone) {
    if (groups * count > room) return kNoPayload;
    memcpy(to, symbols, (size_t)(groups * count));
    return groups * count;
  }
  int64_t at = 0;
  if (coder == kPack) {
    for (int group = 0; group < groups; ++group) {
      const int64_t nbytes = pack(symbols + group * count, count, levels[group], to + at, room - at);
      if (nbytes < 0) return kNoPayload;
      at += nbytes;
    }
    return at;
  }
  if (room < 4) return kNoPayload;
  at = encode_stream(symbols, groups, count, levels, shares, to + 4, room - 4);
  if (at < 0) return kNoPayload;
  const uint32_t nbytes = (uint32_t)at;
  memcpy(to, &nbytes, 4);
  return at + 4;
}

MS_TARGET static int64_t take_symbols(int coder, const uint8_t *from, int64_t left, int groups, int64_t count,
                                      const int32_t *levels, uint32_t *slots, uint8_t *symbols) {
  if (coder == kNone) {
    if (groups * count > left) return kShort;
    memcpy(symbols, from, (size_t)(groups * count));
    return groups * count;
  }
  int64_t at = 0;
  if (coder == kPack) {
    for (int group = 0; group < groups; ++group) {
      const int64_t nbytes = unpack(from + at, left - at, count, levels[group], symbols + group * count);
      if (nbytes < 0) return nbytes;
      at += nbytes;
    }
    return at;
  }
  if (left < 4) return kShort;
  uint32_t nbytes;
  memcpy(&nbytes, from, 4);
  if ((int64_t)nbytes > left - 4) return kShort;
  const int64_t fault = decode_stream(from + 4, nbytes, groups, count, levels, slots, symbols);
  return fault < 0 ? fault : (int64_t)nbytes + 4;
}

MS_TARGET static int64_t encode(const Job &job, uint8_t *memory) {
  const int64_t count = job.num_tokens * job.head_dim, elements = count * job.num_heads;
  const int64_t key_grids = 4 * (int64_t)job.num_heads * job.head_dim;
  const int64_t value_grids = 4 * job.num_tokens * Group(job.levels[1], job.num_heads).count;
  int64_t at = key_grids + value_grids;
  if (at > job.room) return kNoPayload;
  float *numbers = (float *)memory;
  uint32_t *shares = (uint32_t *)(numbers + encode_numbers(job));
  uint8_t *own = (uint8_t *)(shares + 256 * (int64_t)job.num_heads);
  for (int half = 0; half < 2; ++half) {
    uint8_t *symbols = job.coder == kElsewhere ? job.symbols + half * elements : own;
    if (half == 0 ? !quantise_keys(job, job.body, symbols, numbers)
                  : !quantise_values(job, job.body + key_grids, symbols, numbers))
      return kNoPayload;
    if (job.coder == kElsewhere) continue;
    const int64_t nbytes =
        put_symbols(job.coder, symbols, job.num_heads, count, job.levels[half], shares, job.body + at, job.room - at);
    if (nbytes < 0) return kNoPayload;
    at += nbytes;
  }
  return at;
}

MS_TARGET static int64_t decode(const Job &job, uint8_t *memory) {
  const int64_t count = job.num_tokens * job.head_dim, elements = count * job.num_heads;
  const int64_t key_grids = 4 * (int64_t)job.num_heads * job.head_dim;
  const int64_t value_grids = 4 * job.num_tokens * Group(job.levels[1], job.num_heads).count;
  int64_t at = key_grids + value_grids;
  if (at > job.room) return kShort;
  for (int64_t i = 0; i < at / 2; ++i)
    if (!is_number(half_at(job.body, i))) return i < key_grids / 2 ? kKeyScales : kValueScales;
  float *numbers = (float *)memory;
  uint32_t *slots = (uint32_t *)(numbers + 3 * (int64_t)job.head_dim);
  uint8_t *own = (uint8_t *)(slots + kTotal);
  for (int half = 0; half < 2; ++half) {
    uint8_t *symbols = job.coder == kElsewhere ? job.symbols + half * elements : own;
    if (job.coder != kElsewhere) {
      const int64_t nbytes = take_symbols(job.coder, job.body + at, job.room - at, job.num_heads, count,
                                          job.levels[half], slots, symbols);
      if (nbytes < 0) return nbytes;
      at += nbytes;
    }
    if (const Fault fault = restore(job, half, job.body + (half ? key_grids : 0), symbols, numbers)) return fault;
  }
  return at;
}

// Exact: first planes coded, the others behind them as they are.
MS_TARGET static int64_t encode_planes(const Job &job, uint8_t *memory) {
  const int item = job.dtype == kFloat32 ? 4 : 2;
  uint32_t *shares = (uint32_t *)memory;
  uint8_t *first = job.coder == kElsewhere ? job.symbols : memory + 256 * sizeof(uint32_t);
  const int64_t elements[2] = {job.num_tokens * job.widths[0], job.num_tokens * job.widths[1]};
  const int64_t rest = (item - 1) * (elements[0] + elements[1]);
  if (rest > job.room) return kNoPayload;
  uint8_t *to = job.body + job.room - rest;  // until it is known where they go
  for (int half = 0; half < 2; ++half) {
    for (int64_t t = 0; t < job.num_tokens; ++t)
      split(job.rows[half] + t * job.strides[half], job.widths[half], item, first + t * job.widths[half],
            to + t * job.widths[half], elements[half]);
    first += elements[half];
    to += (item - 1) * elements[half];
  }
  first -= elements[0] + elements[1];
  int64_t at = 0;
  const int32_t all = 256;
  for (int half = 0; half < 2 && job.coder != kElsewhere; first += elements[half++]) {
    if (!elements[half]) continue;
    const int64_t nbytes =
        put_symbols(kRans, first, 1, elements[half], &all, shares, job.body + at, job.room - rest - at);
    if (nbytes < 0) return kNoPayload;
    at += nbytes;
  }
  memmove(job.body + at, job.body + job.room - rest, (size_t)rest);
  return at + rest;
}

MS_TARGET static int64_t decode_planes(const Job &job, uint8_t *memory) {
  const int item = job.dtype == kFloat32 ? 4 : 2;
  uint32_t *slots = (uint32_t *)memory;
  uint8_t *first = job.coder == kElsewhere ? job.symbols : memory + kTotal * sizeof(uint32_t);
  const int64_t elements[2] = {job.num_tokens * job.widths[0], job.num_tokens * job.widths[1]};
  const int64_t rest = (item - 1) * (elements[0] + elements[1]);
  int64_t at = 0;
  const int32_t all = 256;
  uint8_t *to = first;
  for (int half = 0; half < 2 && job.coder != kElsewhere; to += elements[half++]) {
    if (!elements[half]) continue;
    const int64_t nbytes = take_symbols(kRans, job.body + at, job.room - at, 1, elements[half], &all, slots, to);
    if (nbytes < 0) return nbytes;
    at += nbytes;
  }
  if (rest > job.room - at) return kShort;
  const uint8_t *from = job.body + at;
  for (int half = 0; half < 2; ++half) {
    for (int64_t t = 0; t < job.num_tokens; ++t)
      join(first + t * job.widths[half], from + t * job.widths[half], elements[half], job.widths[half], item,
           job.rows[half] + t * job.strides[half]);
    first += elements[half];
    from += (item - 1) * elements[half];
  }
  return at + rest;
}

}  // namespace MS_ISA
}  // namespace ms
