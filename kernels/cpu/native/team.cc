#include "team.h"

#include <climits>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define MS_PAUSE() _mm_pause()
#else
#define MS_PAUSE() ((void)0)
#endif

namespace ms {

// About 20 us: a phase of a small step is shorter, and what is longer is worth a system call.
constexpr int kSpins = 600;
constexpr int kYields = 4;

Team::Team(int threads) : threads_(threads) {
  units_[0] = units_[1] = arrived_ = generation_ = round_ = done_ = 0;
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
}

void Team::wait(std::atomic<int> &word, int seen) {
  for (int i = 0; i < kSpins; i++) {
    if (word.load(std::memory_order_acquire) != seen) return;
    MS_PAUSE();
  }
  for (int i = 0; i < kYields; i++) {
    if (word.load(std::memory_order_acquire) != seen) return;
    sched_yield();
  }
  while (word.load(std::memory_order_acquire) == seen) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<int *>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
  }
}

void Team::wake(std::atomic<int> &word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<int *>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

void Team::barrier(int &phase) {
  // Nobody takes units of the phase before any more, so its counter is the next phase's: the last to come clears it.
  int done = phase++;
  if (threads_ == 1) {
    solo_[done & 1] = 0;
    return;
  }
  int seen = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    units_[done & 1].store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_acq_rel);
    wake(generation_);
  } else {
    wait(generation_, seen);
  }
}

void Team::run(Job job, void *context) {
  job_ = job;
  context_ = context;
  solo_[0] = solo_[1] = 0;
  units_[0] = units_[1] = 0;
  if (threads_ == 1) return job(context, 0);
  done_.store(0, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_acq_rel);
  wake(round_);
  job(context, 0);
  // A thread that is late out of the last barrier still reads the batch, and the next job would be changing it.
  for (int done; (done = done_.load(std::memory_order_acquire)) != threads_ - 1;) wait(done_, done);
}

void *Team::main(void *argument) {
  Seat seat = *static_cast<Seat *>(argument);
  int seen = 0;
  for (;;) {
    wait(seat.team->round_, seen);
    seen++;
    if (seat.team->ends_) return nullptr;
    seat.team->job_(seat.team->context_, seat.thread);
    seat.team->done_.fetch_add(1, std::memory_order_acq_rel);
    wake(seat.team->done_);
  }
}

}  // namespace ms
