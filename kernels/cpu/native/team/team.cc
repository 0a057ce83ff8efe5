#include "team.h"

#include <climits>
#include <cstdlib>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define MS_PAUSE() _mm_pause()
#else
#define MS_PAUSE() ((void)0)
#endif

namespace ms {

namespace {
// Some 10 to 40 us: a phase of a small step is shorter, and what is longer is worth a system call.
constexpr int kSpins = 1000;

// Of this thread, in the job that it is in.
thread_local int my_round = 0;
thread_local bool has_unit = false;

uint64_t word(int round, uint32_t count) { return (uint64_t)(uint32_t)round << 32 | count; }
int round_of(uint64_t w) { return (int)(uint32_t)(w >> 32); }

// Adds one to a word of my round: what it was before.
int add(std::atomic<uint64_t> &w) {
  uint64_t seen = w.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t next = round_of(seen) == my_round ? seen + 1 : word(my_round, 1);
    if (w.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) return (int)(uint32_t)next - 1;
  }
}
}  // namespace

Team::Team(int threads, int max_phases) : threads_(threads) {
  round_ = open_ = inside_ = finished_ = sleepers_ = 0;
  ends_ = false;
  void *memory = nullptr;
  if (posix_memalign(&memory, alignof(Phase), sizeof(Phase) * (size_t)max_phases)) return;
  phases_ = (Phase *)memory;
  for (int i = 0; i < max_phases; i++) phases_[i].given = phases_[i].done = 0;
  for (int t = 1; t < threads_; t++) {
    seats_[t] = {this, t};
    if (pthread_create(&ids_[t], nullptr, main, &seats_[t])) break;
    started_++;
  }
}

Team::~Team() {
  ends_ = true;
  round_.fetch_add(1);
  wake(round_);
  for (int t = 1; t <= started_; t++) pthread_join(ids_[t], nullptr);
  free(phases_);
}

void Team::sleep(std::atomic<int> &word, int seen) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<int *>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  (void)word, (void)seen;
  sched_yield();
#endif
}

void Team::wake(std::atomic<int> &word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<int *>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

int Team::next_unit(int phase, int count) {
  if (has_unit) complete(phase, count);
  const int unit = add(phases_[phase].given);
  has_unit = unit < count;
  return has_unit ? unit : count;
}

void Team::complete(int phase, int count) {
  has_unit = false;
  if (add(phases_[phase].done) + 1 != count || threads_ == 1) return;
  finished_.fetch_add(1);
  if (sleepers_.load()) wake(finished_);
}

bool Team::is_over(int phase, int count) const {
  const uint64_t done = phases_[phase].done.load(std::memory_order_acquire);
  return round_of(done) == my_round && (int)(uint32_t)done >= count;
}

void Team::end(int &phase, int count) {
  const int mine = phase++;
  if (count == 0) return;
  for (int i = 0; i < kSpins; i++) {
    if (is_over(mine, count)) return;
    MS_PAUSE();
  }
  for (;;) {
    sleepers_.fetch_add(1);
    const int seen = finished_.load();
    const bool is_done = is_over(mine, count);
    if (!is_done) sleep(finished_, seen);
    sleepers_.fetch_sub(1);
    if (is_done) return;
  }
}

void Team::run(Job job, void *context) {
  job_ = job;
  context_ = context;
  has_unit = false;
  my_round = round_.load(std::memory_order_relaxed) + 1;
  open_.store(my_round);
  round_.store(my_round);
  if (threads_ > 1) wake(round_);
  job(context, 0);
  // Who comes in counts itself and then looks whether it may; this closes and then looks whether somebody is in.
  open_.store(0);
  for (int i = 0; i < kSpins && inside_.load(); i++) MS_PAUSE();
  for (int in; (in = inside_.load());) sleep(inside_, in);
}

void *Team::main(void *argument) {
  const Seat seat = *static_cast<Seat *>(argument);
  Team &team = *seat.team;
  my_round = 0;
  while (!team.ends_.load()) {
    for (int i = 0; i < kSpins && team.round_.load(std::memory_order_acquire) == my_round; i++) MS_PAUSE();
    while (team.round_.load(std::memory_order_acquire) == my_round) sleep(team.round_, my_round);
    if (team.ends_.load()) break;
    team.inside_.fetch_add(1);
    my_round = team.open_.load();
    has_unit = false;
    if (my_round) team.job_(team.context_, seat.thread);
    else my_round = team.round_.load();
    team.inside_.fetch_sub(1);
    wake(team.inside_);
  }
  return nullptr;
}

}  // namespace ms
