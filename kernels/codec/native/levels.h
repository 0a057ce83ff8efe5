// Rows to levels and back, with or without rotation: kvcache/codec/{transform,quantiser,planes}.py say what is
// computed, in this very order of sums. Included once for each kind of CPU, without guard.

namespace ms {
namespace MS_ISA {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(64)));
constexpr int kLanes = 16;

MS_TARGET static inline void load(const uint8_t *from, float *to, int64_t count, int32_t dtype) {
  if (dtype == kFloat32) {
    memcpy(to, from, (size_t)count * 4);
  } else if (dtype == kBfloat16) {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t word;
      memcpy(&word, from + 2 * i, 2);
      to[i] = float_of((uint32_t)word << 16);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t word;
      memcpy(&word, from + 2 * i, 2);
      to[i] = from_half(word);
    }
  }
}

MS_TARGET static inline void store(const float *from, uint8_t *to, int64_t count, int32_t dtype) {
  if (dtype == kFloat32) {
    memcpy(to, from, (size_t)count * 4);
  } else if (dtype == kBfloat16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(from[i]);
      const uint16_t word = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      memcpy(to + 2 * i, &word, 2);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float below = from[i] > 65504.0f ? 65504.0f : from[i];
      const uint16_t word = to_half(below < -65504.0f ? -65504.0f : below);
      memcpy(to + 2 * i, &word, 2);
    }
  }
}

// All are numbers that float16 reaches.
MS_TARGET static inline bool is_within(const float *numbers, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(numbers[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most <= 0x477fe000u;
}

// Neighbours at a distance of 1, 2, 4 or 8 of sixteen: their sum and their difference, in their places.
MS_TARGET static inline void butterfly(Vector *all, int distance) {
  Places other;
  Vector sign, turned;
  for (int i = 0; i < kLanes; ++i) other[i] = i ^ distance, sign[i] = i & distance ? -1.0f : 1.0f;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) turned[i] = (*all)[i ^ distance];
#else
  turned = __builtin_shuffle(*all, other);
#endif
  *all = turned + *all * sign;
}

// A part of a head, of a power of two, times Hadamard's matrix over the root of its size.
MS_TARGET static inline void walsh_part(float *numbers, int size) {
  int step = 1;
  if (size >= kLanes) {
    for (int at = 0; at < size; at += kLanes) {
      Vector all = *(Vector *)(numbers + at);
      butterfly(&all, 1);
      butterfly(&all, 2);
      butterfly(&all, 4);
      butterfly(&all, 8);
      *(Vector *)(numbers + at) = all;
    }
    step = kLanes;
  }
  for (; step < size; step *= 2)
    for (int begin = 0; begin < size; begin += 2 * step)
      for (int i = begin; i < begin + step; ++i) {
        const float one = numbers[i], other = numbers[i + step];
        numbers[i] = one + other;
        numbers[i + step] = one - other;
      }
  const float scale = (float)(1.0 / __builtin_sqrt((double)size));
  for (int i = 0; i < size; ++i) numbers[i] *= scale;
}

MS_TARGET static inline void walsh(float *numbers, int dim) {
  int begin = 0;
  for (int size = 1 << 30; size; size >>= 1)
    if (dim & size) walsh_part(numbers + begin, size), begin += size;
}

MS_TARGET static inline void rotate(float *numbers, const float *signs, int dim) {
  for (int i = 0; i < dim; ++i) numbers[i] *= signs[i];
  walsh(numbers, dim);
}

MS_TARGET static inline void rotate_back(float *numbers, const float *signs, int dim) {
  walsh(numbers, dim);
  for (int i = 0; i < dim; ++i) numbers[i] *= signs[i];
}

struct Grid {
  float least, inverse;
};

// Least rounded down and scale rounded up into the payload, and what quantises by them.
MS_TARGET static inline bool grid_of(float least, float greatest, int levels, uint8_t *kept_least, uint8_t *kept_scale,
                                     Grid *grid) {
  const uint16_t down = half_towards(least + 0.0f, -1);  // + 0: there are two zeros
  grid->least = from_half(down);
  const uint16_t up = half_towards((greatest + 0.0f - grid->least) / (float)(levels - 1), 1);
  memcpy(kept_least, &down, 2);
  memcpy(kept_scale, &up, 2);
  const float scale = from_half(up);
  grid->inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  return is_number(down) && is_number(up);
}

// Keys: a grid for each channel, over all tokens. numbers: room for [tokens][dim].
MS_TARGET static bool quantise_keys(const Job &job, uint8_t *grids, uint8_t *symbols, float *numbers) {
  const int dim = job.head_dim, item = job.dtype == kFloat32 ? 4 : 2;
  const int64_t tokens = job.num_tokens, channels = (int64_t)job.num_heads * dim;
  float *least = numbers + tokens * dim, *greatest = least + dim;
  for (int head = 0; head < job.num_heads; ++head) {
    const int levels = job.levels[0][head];
    for (int64_t t = 0; t < tokens; ++t) {
      float *row = numbers + t * dim;
      load(job.rows[0] + t * job.strides[0] + (int64_t)head * dim * item, row, dim, job.dtype);
      if (!is_within(row, dim)) return false;
      if (job.signs) rotate(row, job.signs + (int64_t)head * dim, dim);
      if (t == 0) memcpy(least, row, (size_t)dim * 4), memcpy(greatest, row, (size_t)dim * 4);
      for (int i = 0; i < dim; ++i) {
        least[i] = row[i] < least[i] ? row[i] : least[i];
        greatest[i] = row[i] > greatest[i] ? row[i] : greatest[i];
      }
    }
    uint8_t *kept = grids + (int64_t)head * dim * 2;
    for (int i = 0; i < dim; ++i) {
      Grid grid;
      if (!grid_of(least[i], greatest[i], levels, kept + 2 * i, kept + 2 * (channels + i), &grid)) return false;
      least[i] = grid.least, greatest[i] = grid.inverse;
    }
    for (int64_t t = 0; t < tokens; ++t, symbols += dim) {
      const float *row = numbers + t * dim;
      for (int i = 0; i < dim; ++i) {
        const int32_t step = (int32_t)((row[i] - least[i]) * greatest[i] + 0.5f);
        symbols[i] = (uint8_t)(step < levels - 1 ? step : levels - 1);
      }
    }
  }
  return true;
}

// Values: a grid for each token, over the heads of the same levels; those of the most levels first.
// numbers: room for [heads][dim]. Returns the groups, or 0.
MS_TARGET static int quantise_values(const Job &job, uint8_t *grids, uint8_t *symbols, float *numbers) {
  const int dim = job.head_dim, heads = job.num_heads;
  const int64_t tokens = job.num_tokens, tile = tokens * dim;
  const Group of(job.levels[1], heads);
  for (int64_t t = 0; t < tokens; ++t) {
    load(job.rows[1] + t * job.strides[1], numbers, (int64_t)heads * dim, job.dtype);
    if (!is_within(numbers, (int64_t)heads * dim)) return 0;
    if (job.signs)
      for (int head = 0; head < heads; ++head) rotate(numbers + head * dim, job.signs + (int64_t)head * dim, dim);
    for (int group = 0; group < of.count; ++group) {
      float least[kLanes], greatest[kLanes];
      for (int i = 0; i < kLanes; ++i) least[i] = __builtin_inff(), greatest[i] = -__builtin_inff();
      for (int head = 0; head < heads; ++head) {
        if (job.levels[1][head] != of.levels[group]) continue;
        const float *row = numbers + head * dim;
        int at = 0;
        for (; at + kLanes <= dim; at += kLanes)
          for (int i = 0; i < kLanes; ++i) {
            least[i] = row[at + i] < least[i] ? row[at + i] : least[i];
            greatest[i] = row[at + i] > greatest[i] ? row[at + i] : greatest[i];
          }
        for (int i = 0; at + i < dim; ++i) {
          least[i] = row[at + i] < least[i] ? row[at + i] : least[i];
          greatest[i] = row[at + i] > greatest[i] ? row[at + i] : greatest[i];
        }
      }
      for (int i = 1; i < kLanes; ++i) {
        least[0] = least[i] < least[0] ? least[i] : least[0];
        greatest[0] = greatest[i] > greatest[0] ? greatest[i] : greatest[0];
      }
      const int levels = of.levels[group];
      uint8_t *kept = grids + (2 * group * tokens + t) * 2;
      Grid grid;
      if (!grid_of(least[0], greatest[0], levels, kept, kept + 2 * tokens, &grid)) return 0;
      for (int head = 0; head < heads; ++head) {
        if (job.levels[1][head] != levels) continue;
        const float *row = numbers + head * dim;
        uint8_t *to = symbols + head * tile + t * dim;
        for (int i = 0; i < dim; ++i) {
          const int32_t step = (int32_t)((row[i] - grid.least) * grid.inverse + 0.5f);
          to[i] = (uint8_t)(step < levels - 1 ? step : levels - 1);
        }
      }
    }
  }
  return of.count;
}

// symbols: [heads][tokens][dim]. half: 0 for K, 1 for V. numbers: room for three rows of a head.
MS_TARGET static Fault restore(const Job &job, int half, const uint8_t *grids, const uint8_t *symbols, float *numbers) {
  const int dim = job.head_dim, item = job.dtype == kFloat32 ? 4 : 2;
  const int64_t tokens = job.num_tokens, channels = (int64_t)job.num_heads * dim;
  const Group of(job.levels[1], job.num_heads);
  float *least = numbers + dim, *scale = least + dim;
  for (int head = 0; head < job.num_heads; ++head) {
    const int levels = job.levels[half][head];
    int most = 0;
    for (int64_t i = 0; i < tokens * dim; ++i) most = symbols[i] > most ? symbols[i] : most;
    if (most >= levels) return kSymbols;
    if (half == 0)
      for (int i = 0; i < dim; ++i) {
        least[i] = from_half(half_at(grids, (int64_t)head * dim + i));
        scale[i] = from_half(half_at(grids, channels + (int64_t)head * dim + i));
      }
    const int64_t group = half ? 2 * tokens * (levels != of.levels[0]) : 0;
    for (int64_t t = 0; t < tokens; ++t, symbols += dim) {
      if (half == 0) {
        for (int i = 0; i < dim; ++i) numbers[i] = (float)symbols[i] * scale[i] + least[i];
      } else {
        const float a = from_half(half_at(grids, group + tokens + t)), b = from_half(half_at(grids, group + t));
        for (int i = 0; i < dim; ++i) numbers[i] = (float)symbols[i] * a + b;
      }
      if (job.signs) rotate_back(numbers, job.signs + (int64_t)head * dim, dim);
      store(numbers, job.rows[half] + t * job.strides[half] + (int64_t)head * dim * item, dim, job.dtype);
    }
  }
  return (Fault)0;
}

}  // namespace MS_ISA
}  // namespace ms
