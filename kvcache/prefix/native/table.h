// A flat hash table of blocks: 16 bytes of a block's hash -> the set of engines that hold it, a bit for each.
//
//     slot     hash (two words), owners (`width` words); a slot without owners is free
//     place    the hash is uniform: its first word, scaled to the table's length, is where to look first
//
// Linear probing, so a look-up reads one or two cache lines. Scaling keeps the order of hashes, so a table that grows
// is read and written from front to back, and can grow by half: 36 to 48 bytes a block for up to 64 engines. A removed
// block's followers move up: nothing is left behind. Who knows prompts cannot choose places cheaply: each block whose
// place agrees with a given one in 20 bits costs 2^20 hashes, and a prefill.
//
// Owns its memory, which Python counts (PyMem). Must not know engines, events or generations.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <utility>

struct Hash {
  uint64_t first, second;
};

class Table {
 public:
  explicit Table(int64_t width) : width_(width) {}
  ~Table() { PyMem_Free(slots_); }
  Table(const Table &) = delete;
  Table &operator=(const Table &) = delete;

  int64_t size() const { return size_; }
  int64_t nbytes() const { return length_ * stride() * (int64_t)sizeof(uint64_t); }

  // Owners of the block, null if nobody has it.
  uint64_t *find(Hash hash) const {
    if (!size_) return nullptr;
    uint64_t *slot = at(probe(hash));
    return is_free(slot) ? nullptr : slot + 2;
  }

  void prefetch(Hash hash) const {
    if (length_) __builtin_prefetch(at(place(hash)));
  }

  // Room for so many more, so that `put` finds some. False: no memory; the table is as it was.
  bool reserve(int64_t more) { return size_ + more <= most(length_) || resize(size_ + more + (size_ + more) / 2); }

  // Owners of the block, none if it is new: then the caller must set one at least.
  uint64_t *put(Hash hash) {
    uint64_t *slot = at(probe(hash));
    if (is_free(slot)) {
      slot[0] = hash.first, slot[1] = hash.second;
      ++size_;
    }
    return slot + 2;
  }

  // Of a block that `find` has found, before anything else is asked.
  void remove(uint64_t *owners) {
    int64_t hole = (owners - 2 - slots_) / stride();
    for (int64_t next = after(hole);; next = after(next)) {
      uint64_t *slot = at(next);
      if (is_free(slot)) break;
      // It may move up unless its first place lies behind the hole.
      int64_t first = place({slot[0], slot[1]});
      bool is_behind = hole <= next ? hole < first && first <= next : hole < first || first <= next;
      if (is_behind) continue;
      memcpy(at(hole), slot, (size_t)stride() * sizeof *slot);
      hole = next;
    }
    memset(at(hole), 0, (size_t)stride() * sizeof(uint64_t));
    --size_;
  }

  // One owner less in all blocks; gives the room of those that have none left back. False: no memory, all is forgotten.
  bool forget(int64_t word, uint64_t others) {
    int64_t kept = 0;
    for (int64_t i = 0; i < length_; ++i) {
      uint64_t *slot = at(i);
      slot[2 + word] &= others;
      kept += !is_free(slot);
    }
    if (resize(kept)) return true;
    clear();  // slots that are free now have broken the chains of probes
    return false;
  }

  void clear() {
    Table none(width_);
    swap(none);
  }

  // As tight as it may be: no more blocks come. False: no memory; it is as it was.
  bool fit() { return resize(size_); }

  // After removals: an almost empty table gives its room back.
  bool shrink() { return size_ * 4 >= most(length_) || resize(size_ + size_ / 2); }

  // `other`, of a larger width and without blocks, gets all that are here. False: no memory.
  bool widened(Table &other) const { return copy(most(length_), other); }

  void swap(Table &other) {
    std::swap(slots_, other.slots_);
    std::swap(length_, other.length_);
    std::swap(size_, other.size_);
    std::swap(width_, other.width_);
  }

  template <typename Function>
  void each(Function function) const {
    for (int64_t i = 0; i < length_; ++i)
      if (uint64_t *slot = at(i); !is_free(slot)) function(Hash{slot[0], slot[1]}, slot + 2);
  }

 private:
  static int64_t most(int64_t length) { return length / 4 * 3; }

  int64_t stride() const { return 2 + width_; }
  uint64_t *at(int64_t i) const { return slots_ + i * stride(); }
  int64_t after(int64_t i) const { return i + 1 == length_ ? 0 : i + 1; }
  int64_t place(Hash hash) const { return (int64_t)((unsigned __int128)hash.first * (uint64_t)length_ >> 64); }

  bool is_free(const uint64_t *slot) const {
    for (int64_t word = 2; word < stride(); ++word)
      if (slot[word]) return false;
    return true;
  }

  // Where the block is, or would be. There is a free slot.
  int64_t probe(Hash hash) const {
    int64_t i = place(hash);
    for (;; i = after(i)) {
      const uint64_t *slot = at(i);
      if ((slot[0] == hash.first && slot[1] == hash.second) || is_free(slot)) return i;
    }
  }

  // For so many blocks, of which it has no more. False: no memory; the table is as it was.
  bool resize(int64_t blocks) {
    Table made(width_);
    if (!copy(blocks, made)) return false;
    swap(made);
    return true;
  }

  bool copy(int64_t blocks, Table &made) const {
    if (!blocks) return true;
    const int64_t length = (blocks + 2) / 3 * 4;
    made.slots_ = (uint64_t *)PyMem_Calloc((size_t)length, (size_t)made.stride() * sizeof(uint64_t));
    if (!made.slots_) return false;
    made.length_ = length;
    each([&](Hash hash, const uint64_t *owners) {
      memcpy(made.put(hash), owners, (size_t)width_ * sizeof *owners);
    });
    return true;
  }

  uint64_t *slots_ = nullptr;
  int64_t length_ = 0, size_ = 0, width_;
};
