// The threads of an engine: a phase of a step is a number of units, and whoever is free takes the next one, so a
// thread that its core has left holds up one unit and no more. Waiting spins briefly and then sleeps.
// Owns threads, units and barriers; knows nothing of models.
#pragma once
#include <atomic>
#include <pthread.h>

namespace ms {

typedef void (*Job)(void *context, int thread);

class Team {
 public:
  explicit Team(int threads);  // its own threads are threads - 1: who calls run() is the first
  ~Team();
  bool started() const { return started_ == threads_ - 1; }
  int threads() const { return threads_; }
  void run(Job job, void *context);  // by all; returns when all have
  // Within a job, the same calls in the same order by all threads: a phase is next_unit() until all are given,
  // and then barrier().
  int next_unit(int phase) {
    if (threads_ == 1) return solo_[phase & 1]++;
    return units_[phase & 1].fetch_add(1, std::memory_order_relaxed);
  }
  void barrier(int &phase);

 private:
  static void *main(void *);
  struct Seat { Team *team; int thread; };
  static void wait(std::atomic<int> &word, int seen);
  static void wake(std::atomic<int> &word);

  const int threads_;
  int started_ = 0;
  pthread_t ids_[64];
  Seat seats_[64];
  Job job_ = nullptr;
  void *context_ = nullptr;
  bool ends_ = false;
  int solo_[2] = {0, 0};
  alignas(64) std::atomic<int> units_[2];  // of this phase and of the next
  alignas(64) std::atomic<int> arrived_;
  alignas(64) std::atomic<int> generation_;  // of barriers
  alignas(64) std::atomic<int> round_;       // of jobs
  alignas(64) std::atomic<int> done_;        // threads that have left this one, but for the caller's
};

}  // namespace ms
