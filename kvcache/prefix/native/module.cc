// The prefix index's blocks as a Python extension: kvcache/prefix/blocks.py says what each method means, and
// python_blocks.py does the same. One call a look-up and one an event, whatever their length.
//
// Owns the two generations and the walk along a prompt. By Python's stable ABI: one object for every version from 3.11.
#include <new>

#include "sha256.h"
#include "table.h"

namespace {

constexpr int64_t kHashBytes = 16;
constexpr int64_t kTogether = 64;  // names of an event whose slots are on their way at a time
constexpr int64_t kCertain = 2;    // a match of so many blocks likely goes on: the next one is hashed while memory comes

const sha256::Compress kCompress = sha256::best();

// A u32, or an error.
bool token_of(PyObject *item, uint32_t *token) {
  unsigned long long value = PyLong_AsUnsignedLongLong(item);
  if (value == (unsigned long long)-1 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return false;
    PyErr_Clear();
    PyObject *index = PyNumber_Index(item);
    if (!index) return false;
    value = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) return false;
  }
  if (value > UINT32_MAX) {
    PyErr_SetString(PyExc_OverflowError, "a token id is outside 32 bits");
    return false;
  }
  *token = (uint32_t)value;
  return true;
}

// Hashes of a prompt's blocks, one after the other.
class Chain {
 public:
  Chain(PyObject *tokens, int64_t block_size) : tokens_(tokens), size_(block_size) {}
  ~Chain() { PyMem_Free(message_); }
  Chain(const Chain &) = delete;

  bool begin(PyObject *before) {
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(before, &bytes, &length)) return false;
    if (length != kHashBytes) {
      PyErr_SetString(PyExc_ValueError, "a hash has 16 bytes");
      return false;
    }
    if (length_of_message() > kSmall) {
      message_ = (uint8_t *)PyMem_Malloc((size_t)sha256::padded(length_of_message()));
      if (!message_) return PyErr_NoMemory(), false;
      at_ = message_;
    }
    memcpy(at_, bytes, kHashBytes);
    return true;
  }

  // Of block `i`, the one behind the last.
  bool next(int64_t i, Hash *hash) {
    uint8_t *to = at_ + kHashBytes;
    for (int64_t j = i * size_; j < (i + 1) * size_; ++j, to += 4) {
      PyObject *item = PyList_GetItem(tokens_, j);
      uint32_t token;
      if (!item || !token_of(item, &token)) return false;
      for (int byte = 0; byte < 4; ++byte) to[byte] = (uint8_t)(token >> 8 * byte);
    }
    sha256::digest16(kCompress, at_, length_of_message(), at_);
    memcpy(hash, at_, sizeof *hash);
    return true;
  }

 private:
  static constexpr int64_t kSmall = kHashBytes + 4 * 64;
  int64_t length_of_message() const { return kHashBytes + 4 * size_; }

  PyObject *tokens_;
  int64_t size_;
  uint8_t small_[kSmall + 2 * sha256::kBlock];
  uint8_t *message_ = nullptr, *at_ = small_;
};

// The hash that Python has as 16 bytes. False without an error: something else.
bool hash_of(PyObject *name, Hash *hash) {
  char *bytes;
  Py_ssize_t length;
  if (PyBytes_AsStringAndSize(name, &bytes, &length)) {
    PyErr_Clear();
    return false;
  }
  if (length != kHashBytes) return false;
  memcpy(hash, bytes, sizeof *hash);
  return true;
}

// Hashes that Python has.
class Known {
 public:
  explicit Known(PyObject *hashes) : hashes_(hashes) {}
  bool next(int64_t i, Hash *hash) {
    PyObject *item = PyList_GetItem(hashes_, i);
    if (!item) return false;
    if (hash_of(item, hash)) return true;
    PyErr_SetString(PyExc_ValueError, "a hash has 16 bytes");
    return false;
  }

 private:
  PyObject *hashes_;
};

struct Blocks {
  PyObject_HEAD
  int64_t block_size, width;
  PyObject *names;  // engine ids by number, None where there is no engine
  uint64_t *owners;  // of the walk
  bool has_moved;
  Table young, old;
};

Blocks *blocks(PyObject *self) { return (Blocks *)self; }

bool number_of(PyObject *item, int64_t *number) {
  *number = PyLong_AsLongLong(item);
  return *number != -1 || !PyErr_Occurred();
}

// The number of an engine that has joined.
bool engine_of(Blocks *self, PyObject *item, int64_t *engine) {
  if (!number_of(item, engine)) return false;
  if (*engine >= 0 && *engine < self->width * 64) return true;
  PyErr_SetString(PyExc_IndexError, "no such engine");
  return false;
}

bool is_called_with(Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", given, wanted);
  return false;
}

// Owners of a block, which is young from now on. Null: nobody has it, or an error is set.
uint64_t *used(Blocks *self, Hash hash) {
  if (uint64_t *owners = self->young.find(hash)) return owners;
  uint64_t *before = self->old.find(hash);
  if (!before) return nullptr;
  if (!self->young.reserve(1)) return (uint64_t *)PyErr_NoMemory();
  uint64_t *owners = self->young.put(hash);
  memcpy(owners, before, (size_t)self->width * sizeof *owners);
  self->old.remove(before);
  self->has_moved = true;
  return owners;
}

// Engines of one word's bits: so many tokens each.
bool note(Blocks *self, PyObject *matched, int64_t word, uint64_t bits, PyObject *num_tokens) {
  for (; bits; bits &= bits - 1) {
    PyObject *name = PyList_GetItem(self->names, word * 64 + __builtin_ctzll(bits));
    if (!name || PyDict_SetItem(matched, name, num_tokens)) return false;
  }
  return true;
}

// Without those of `holders`, if there are any; null: all.
bool note_all(Blocks *self, PyObject *matched, const uint64_t *holders, int64_t num_blocks) {
  if (!num_blocks) return true;
  PyObject *num_tokens = PyLong_FromLongLong(num_blocks * self->block_size);
  if (!num_tokens) return false;
  bool is_well = true;
  for (int64_t word = 0; word < self->width && is_well; ++word)
    is_well = note(self, matched, word, self->owners[word] & (holders ? ~holders[word] : ~0ull), num_tokens);
  Py_DECREF(num_tokens);
  return is_well;
}

template <typename Hashes>
bool walk_into(Blocks *self, PyObject *matched, Hashes &hashes, int64_t num_blocks) {
  Hash hash, next;
  int64_t i = 0;
  memset(self->owners, 0xff, (size_t)self->width * sizeof *self->owners);
  if (num_blocks && !hashes.next(0, &next)) return false;
  for (; i < num_blocks; ++i) {
    hash = next;
    const bool is_ahead = i >= kCertain && i + 1 < num_blocks;
    if (is_ahead) {
      self->young.prefetch(hash);
      if (!hashes.next(i + 1, &next)) return false;
    }
    const uint64_t *holders = used(self, hash);
    if (!holders) {
      if (PyErr_Occurred()) return false;
      break;
    }
    uint64_t common = 0, lost = 0;
    for (int64_t word = 0; word < self->width; ++word) {
      common |= self->owners[word] & holders[word];
      lost |= self->owners[word] & ~holders[word];
    }
    if (!common) break;
    if (lost) {
      if (!note_all(self, matched, holders, i)) return false;
      for (int64_t word = 0; word < self->width; ++word) self->owners[word] &= holders[word];
    }
    if (!is_ahead && i + 1 < num_blocks && !hashes.next(i + 1, &next)) return false;
  }
  return note_all(self, matched, nullptr, i);
}

template <typename Hashes>
PyObject *walk(Blocks *self, Hashes &hashes, int64_t num_blocks) {
  PyObject *matched = PyDict_New();
  if (matched && !walk_into(self, matched, hashes, num_blocks)) Py_CLEAR(matched);
  return matched;
}

PyObject *lookup(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  if (!is_called_with(count, 2)) return nullptr;
  Blocks *self = blocks(object);
  Py_ssize_t num_tokens = PyList_Size(arguments[1]);
  if (num_tokens < 0) return nullptr;
  Chain chain(arguments[1], self->block_size);
  return chain.begin(arguments[0]) ? walk(self, chain, num_tokens / self->block_size) : nullptr;
}

PyObject *lookup_hashes(PyObject *object, PyObject *hashes) {
  Py_ssize_t num_blocks = PyList_Size(hashes);
  if (num_blocks < 0) return nullptr;
  Known known(hashes);
  return walk(blocks(object), known, num_blocks);
}

PyObject *store(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  Blocks *self = blocks(object);
  int64_t engine;
  if (!is_called_with(count, 2) || !engine_of(self, arguments[0], &engine)) return nullptr;
  const Py_ssize_t num_names = PyList_Size(arguments[1]);
  if (num_names < 0) return nullptr;
  const uint64_t bit = 1ull << engine % 64;
  int64_t num_malformed = 0;
  Hash hashes[kTogether];
  for (Py_ssize_t done = 0; done < num_names;) {
    int64_t num_hashes = 0;
    for (; done < num_names && num_hashes < kTogether; ++done) {
      PyObject *name = PyList_GetItem(arguments[1], done);
      if (!name) return nullptr;
      if (hash_of(name, hashes + num_hashes))
        ++num_hashes;
      else
        ++num_malformed;
    }
    if (!self->young.reserve(num_hashes)) return PyErr_NoMemory();
    const bool has_old = self->old.size();
    for (int64_t i = 0; i < num_hashes; ++i) {
      self->young.prefetch(hashes[i]);
      if (has_old) self->old.prefetch(hashes[i]);
    }
    for (int64_t i = 0; i < num_hashes; ++i) {
      uint64_t *owners = self->young.put(hashes[i]);
      if (has_old) {
        if (uint64_t *before = self->old.find(hashes[i])) {
          memcpy(owners, before, (size_t)self->width * sizeof *owners);
          self->old.remove(before);
        }
      }
      owners[engine / 64] |= bit;
    }
  }
  return PyLong_FromLongLong(num_malformed);
}

bool remove_from(Table &table, int64_t width, int64_t engine, Hash hash) {
  uint64_t *owners = table.find(hash);
  if (!owners) return false;
  owners[engine / 64] &= ~(1ull << engine % 64);
  for (int64_t word = 0; word < width; ++word)
    if (owners[word]) return true;
  table.remove(owners);
  return true;
}

PyObject *remove(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  Blocks *self = blocks(object);
  int64_t engine;
  if (!is_called_with(count, 2) || !engine_of(self, arguments[0], &engine)) return nullptr;
  const Py_ssize_t num_names = PyList_Size(arguments[1]);
  if (num_names < 0) return nullptr;
  for (Py_ssize_t i = 0; i < num_names; ++i) {
    PyObject *name = PyList_GetItem(arguments[1], i);
    Hash hash;
    if (!name) return nullptr;
    if (hash_of(name, &hash) && !remove_from(self->young, self->width, engine, hash))
      remove_from(self->old, self->width, engine, hash);
  }
  if (!self->young.shrink() || !self->old.shrink()) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *forget(PyObject *object, PyObject *item) {
  Blocks *self = blocks(object);
  int64_t engine;
  if (!engine_of(self, item, &engine)) return nullptr;
  const uint64_t others = ~(1ull << engine % 64);
  const bool is_well = self->young.forget(engine / 64, others);
  if (!self->old.forget(engine / 64, others) || !is_well) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *join(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  Blocks *self = blocks(object);
  int64_t engine;
  if (!is_called_with(count, 2) || !number_of(arguments[0], &engine)) return nullptr;
  if (engine < 0) return PyErr_Format(PyExc_IndexError, "no such engine");
  const int64_t width = engine / 64 + 1;
  if (width > self->width) {
    uint64_t *owners = (uint64_t *)PyMem_Realloc(self->owners, (size_t)width * sizeof *owners);
    if (!owners) return PyErr_NoMemory();
    self->owners = owners;
    Table young(width), old(width);
    if (!self->young.widened(young) || !self->old.widened(old)) return PyErr_NoMemory();
    self->young.swap(young);
    self->old.swap(old);
    self->width = width;
  }
  while (PyList_Size(self->names) <= engine)
    if (PyList_Append(self->names, Py_None)) return nullptr;
  Py_INCREF(arguments[1]);
  if (PyList_SetItem(self->names, engine, arguments[1])) return nullptr;
  Py_RETURN_NONE;
}

PyObject *age(PyObject *object, PyObject *) {
  Blocks *self = blocks(object);
  const int64_t num_forgotten = self->old.size();
  self->old.clear();
  self->old.swap(self->young);
  if (!self->old.fit()) return PyErr_NoMemory();
  return PyLong_FromLongLong(num_forgotten);
}

PyObject *take_moved(PyObject *object, PyObject *) {
  const bool has_moved = blocks(object)->has_moved;
  blocks(object)->has_moved = false;
  return PyBool_FromLong(has_moved);
}

PyObject *holds(PyObject *object, PyObject *name) {
  Hash hash;
  if (!hash_of(name, &hash)) Py_RETURN_FALSE;
  return PyBool_FromLong(blocks(object)->young.find(hash) || blocks(object)->old.find(hash));
}

// A list of (hash, numbers of its engines) of one generation.
PyObject *held(const Table &table, int64_t width) {
  PyObject *told = PyList_New(0);
  table.each([&](Hash hash, const uint64_t *owners) {
    PyObject *numbers = told ? PyList_New(0) : nullptr;
    for (int64_t word = 0; word < width; ++word) {
      for (uint64_t bits = owners[word]; numbers && bits; bits &= bits - 1) {
        PyObject *number = PyLong_FromLongLong(word * 64 + __builtin_ctzll(bits));
        if (!number || PyList_Append(numbers, number)) Py_CLEAR(numbers);
        Py_XDECREF(number);
      }
    }
    PyObject *pair = numbers ? Py_BuildValue("y#N", (const char *)&hash, (Py_ssize_t)kHashBytes, numbers) : nullptr;
    if (!pair || PyList_Append(told, pair)) Py_CLEAR(told);
    Py_XDECREF(pair);
  });
  return told;
}

PyObject *generations(PyObject *object, PyObject *) {
  Blocks *self = blocks(object);
  PyObject *young = held(self->young, self->width), *old = held(self->old, self->width);
  if (young && old) return Py_BuildValue("NN", young, old);
  Py_XDECREF(young);
  Py_XDECREF(old);
  return nullptr;
}

PyObject *num_blocks(PyObject *object, void *) {
  return PyLong_FromLongLong(blocks(object)->young.size() + blocks(object)->old.size());
}
PyObject *num_young(PyObject *object, void *) { return PyLong_FromLongLong(blocks(object)->young.size()); }
PyObject *nbytes(PyObject *object, void *) {
  return PyLong_FromLongLong(blocks(object)->young.nbytes() + blocks(object)->old.nbytes());
}
PyObject *growth_nbytes(PyObject *object, void *) { return PyLong_FromLongLong(blocks(object)->young.nbytes()); }

PyObject *make(PyTypeObject *type, PyObject *arguments, PyObject *) {
  long long block_size;
  if (!PyArg_ParseTuple(arguments, "L", &block_size)) return nullptr;
  if (block_size < 1 || block_size > 1 << 24) return PyErr_Format(PyExc_ValueError, "a block has 1 to 2^24 tokens");
  PyObject *object = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (!object) return nullptr;
  Blocks *self = blocks(object);
  self->block_size = block_size;
  self->width = 1;
  new (&self->young) Table(1);
  new (&self->old) Table(1);
  self->names = PyList_New(0);
  self->owners = (uint64_t *)PyMem_Malloc(sizeof *self->owners);
  if (!self->names || !self->owners) {
    Py_DECREF(object);
    return PyErr_NoMemory();
  }
  return object;
}

void unmake(PyObject *object) {
  Blocks *self = blocks(object);
  PyTypeObject *type = Py_TYPE(object);
  self->young.~Table();
  self->old.~Table();
  PyMem_Free(self->owners);
  Py_XDECREF(self->names);
  ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

PyObject *chain(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  int64_t block_size, first;
  if (!is_called_with(count, 4) || !number_of(arguments[2], &block_size) || !number_of(arguments[3], &first)) return nullptr;
  Py_ssize_t num_tokens = PyList_Size(arguments[1]);
  if (num_tokens < 0) return nullptr;
  if (block_size < 1 || block_size > 1 << 24 || first < 0)
    return PyErr_Format(PyExc_ValueError, "blocks of %lld tokens from %lld on", (long long)block_size, (long long)first);
  Chain hashes(arguments[1], block_size);
  PyObject *told = hashes.begin(arguments[0]) ? PyList_New(0) : nullptr;
  for (int64_t i = first; told && i < num_tokens / block_size; ++i) {
    Hash hash;
    PyObject *name = hashes.next(i, &hash) ? PyBytes_FromStringAndSize((const char *)&hash, kHashBytes) : nullptr;
    if (!name || PyList_Append(told, name)) Py_CLEAR(told);
    Py_XDECREF(name);
  }
  return told;
}

// For tests: the formula beside the processor's instructions.
PyObject *digest(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  char *bytes;
  Py_ssize_t length;
  if (!is_called_with(count, 2) || PyBytes_AsStringAndSize(arguments[0], &bytes, &length)) return nullptr;
  uint8_t *message = (uint8_t *)PyMem_Malloc((size_t)sha256::padded(length));
  if (!message) return PyErr_NoMemory();
  memcpy(message, bytes, (size_t)length);
  uint8_t told[kHashBytes];
  sha256::digest16(PyObject_IsTrue(arguments[1]) ? kCompress : sha256::compress_portable, message, length, told);
  PyMem_Free(message);
  return PyBytes_FromStringAndSize((const char *)told, kHashBytes);
}

template <typename Function>
PyCFunction plain(Function *function) {
  return (PyCFunction)(void (*)())function;
}

PyMethodDef kMethods[] = {
    {"join", plain(join), METH_FASTCALL, nullptr},
    {"store", plain(store), METH_FASTCALL, nullptr},
    {"remove", plain(remove), METH_FASTCALL, nullptr},
    {"forget", plain(forget), METH_O, nullptr},
    {"lookup", plain(lookup), METH_FASTCALL, nullptr},
    {"lookup_hashes", plain(lookup_hashes), METH_O, nullptr},
    {"age", plain(age), METH_NOARGS, nullptr},
    {"take_moved", plain(take_moved), METH_NOARGS, nullptr},
    {"holds", plain(holds), METH_O, nullptr},
    {"generations", plain(generations), METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef kProperties[] = {
    {"num_blocks", num_blocks, nullptr, nullptr, nullptr},
    {"num_young", num_young, nullptr, nullptr, nullptr},
    {"nbytes", nbytes, nullptr, nullptr, nullptr},
    {"growth_nbytes", growth_nbytes, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot kSlots[] = {
    {Py_tp_new, (void *)make},
    {Py_tp_dealloc, (void *)unmake},
    {Py_tp_methods, kMethods},
    {Py_tp_getset, kProperties},
    {0, nullptr},
};
PyType_Spec kType = {"microserve_prefix.NativeBlocks", sizeof(Blocks), 0, Py_TPFLAGS_DEFAULT, kSlots};
PyMethodDef kFunctions[] = {
    {"chain", plain(chain), METH_FASTCALL, nullptr},
    {"digest", plain(digest), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "microserve_prefix", nullptr, -1, kFunctions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_microserve_prefix() {
  PyObject *module = PyModule_Create(&kModule), *type = module ? PyType_FromSpec(&kType) : nullptr;
  if (type && !PyModule_AddObjectRef(module, "NativeBlocks", type)) {
    Py_DECREF(type);
    return module;
  }
  Py_XDECREF(type);
  Py_XDECREF(module);
  return nullptr;
}
