// The threads of an engine: a phase of a step is a number of units, whoever is free takes the next one, and a phase
// is over when its units are done, not when all threads have come: one that its core has left holds up the unit that
// it had, and the end of the job, and no phase between. It finds the phases that went on without it finished, and skips
// them. One that wakes when the job is over does not enter it: a late thread would read of the next job.
// Owns threads, units and phases; knows nothing of models.
//
//   a word of a phase    round << 32 | count      (so that nobody has to clear it)
#pragma once
#include <atomic>
#include <cstdint>
#include <pthread.h>

namespace ms {

typedef void (*Job)(void *context, int thread);

class Team {
 public:
  // Its own threads are threads - 1: who calls run() is the first. A job has fewer than max_phases phases.
  Team(int threads, int max_phases);
  ~Team();
  bool started() const { return phases_ && started_ == threads_ - 1; }
  int threads() const { return threads_; }
  // By all threads that are awake in time; returns when no thread is in the job any more.
  void run(Job job, void *context);
  // Within a job, in the same order by all threads: next_unit() until it gives `count`, and then end().
  int next_unit(int phase, int count);
  void end(int &phase, int count);
  // A phase with one unit, which only the caller of run() may do.
  template <class F>
  void alone(int &phase, int thread, F unit) {
    if (thread == 0) {
      unit();
      complete(phase, 1);
    }
    end(phase, 1);
  }

 private:
  struct alignas(64) Phase {
    std::atomic<uint64_t> given, done;
  };
  struct Seat {
    Team *team;
    int thread;
  };
  static void *main(void *);
  static void sleep(std::atomic<int> &word, int seen);
  static void wake(std::atomic<int> &word);
  void complete(int phase, int count);
  bool is_over(int phase, int count) const;

  const int threads_;
  int started_ = 0;
  pthread_t ids_[64];
  Seat seats_[64];
  Job job_ = nullptr;
  void *context_ = nullptr;
  std::atomic<bool> ends_;
  Phase *phases_ = nullptr;
  alignas(64) std::atomic<int> round_;     // of jobs
  alignas(64) std::atomic<int> open_;      // the round that may be entered; 0: none
  alignas(64) std::atomic<int> inside_;    // threads in it, but for the caller's
  alignas(64) std::atomic<int> finished_;  // phases, ever
  alignas(64) std::atomic<int> sleepers_;
};

}  // namespace ms
