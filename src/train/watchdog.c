// SPDX-License-Identifier: Apache-2.0
// The watchdog. Invariant: it takes no lock that the step could hold, and writes to stderr by itself: whatever hangs, it speaks.
#include "train/watchdog.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BEAT_NS INT64_C(200000000)

/* One rank's place, in memory that the node shares. Text may be seen half-changed: it is for a message only. */
struct place {
  _Atomic int64_t step, since_ns, started_ns;
  _Atomic int64_t beat_ns; /* its watchdog was alive: not so for a process that is stopped or gone */
  atomic_int waiting;      /* for other ranks, as of that moment */
  int rank;
  char phase[32];
};

struct shared {
  atomic_int reported; /* one table per node is enough */
  char pad[60];
  struct place place[];
};

struct fd_watchdog {
  fd_comm *comm; /* borrowed */
  fd_shared *memory;
  struct shared *shared;
  struct place *mine;
  double seconds;
  pthread_t thread;
  bool running;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  bool stop;
  void (*expired)(void *user, const char *report);
  void *user;
};

/* CLOCK_MONOTONIC is the same for all processes of a node */
static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The higher, the more likely the others wait for it. */
static int suspicion(const struct place *p, int64_t now) {
  if (now - p->beat_ns > 5 * BEAT_NS) return 2;
  return p->waiting ? 0 : 1;
}

static void report(const fd_watchdog *w, char *text, size_t bytes) {
  const int64_t now = now_ns();
  const struct place *place = w->shared->place;
  const int n = w->comm ? w->comm->node_size : 1;
  int worst = 0;
  const char *host = w->comm ? w->comm->host : "this machine";
  for (int i = 1; i < n; i++) {
    const int a = suspicion(&place[i], now), b = suspicion(&place[worst], now);
    if (a > b || (a == b && place[i].since_ns < place[worst].since_ns)) worst = i;
  }
  size_t at = (size_t)snprintf(text, bytes,
                               "fdhpc: watchdog: a step is not finished after %.3g s (trainer.watchdog_minutes), so the job ends. "
                               "The ranks of %s:\n",
                               w->seconds, host);
  for (int i = 0; i < n && at < bytes; i++) {
    static const char *const how[] = {"waits for others", "does not wait for others", "does not answer"};
    const struct place *p = &place[i];
    at += (size_t)snprintf(text + at, bytes - at, "fdhpc: watchdog: rank %d on %s: step %lld, phase %.31s for %.1f s: %s%s\n", p->rank, host,
                           (long long)p->step, p->phase, (double)(now - p->since_ns) * 1e-9, how[suspicion(p, now)],
                           n > 1 && i == worst ? " (look here first)" : "");
  }
}

static void expire(fd_watchdog *w) {
  static char text[1 << 16];
  if (atomic_exchange(&w->shared->reported, 1) == 0) {
    report(w, text, sizeof text);
    ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
    (void)ignored;
    if (w->expired) {
      w->expired(w->user, text);
      return;
    }
  } else if (w->expired) {
    return;
  }
  sleep(2); /* other nodes' tables come at about the same time; the abort would cut them off */
  fd_comm_abort(w->comm, fd_status_exit_code(FD_ERR_COMM));
}

static void *watch(void *arg) {
  fd_watchdog *w = arg;
  pthread_mutex_lock(&w->lock);
  while (!w->stop) {
    const int64_t now = now_ns(), deadline = w->mine->started_ns + (int64_t)(w->seconds * 1e9);
    w->mine->waiting = fd_comm_is_waiting(w->comm);
    w->mine->beat_ns = now;
    if (now >= deadline) {
      expire(w);
      break;
    }
    const int64_t next = deadline < now + BEAT_NS ? deadline : now + BEAT_NS;
    struct timespec t = {.tv_sec = next / 1000000000, .tv_nsec = next % 1000000000};
    pthread_cond_timedwait(&w->wake, &w->lock, &t);
  }
  pthread_mutex_unlock(&w->lock);
  return NULL;
}

fd_status fd_watchdog_create(fd_comm *comm, double seconds, fd_watchdog **out) {
  fd_status st = FD_OK;
  fd_watchdog *w = NULL;
  if (!(seconds > 0)) {
    *out = NULL;
    return FD_OK;
  }
  int n = comm ? comm->node_size : 1, me = comm ? comm->node_rank : 0;
  w = calloc(1, sizeof *w);
  FD_TRY(fd_agree(comm, w ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no memory for a watchdog")));
  w->comm = comm;
  w->seconds = seconds;
  FD_TRY(fd_shared_create(comm, sizeof *w->shared + (size_t)n * sizeof(struct place), &w->memory));
  w->shared = w->memory->data;
  w->mine = &w->shared->place[me];
  w->mine->rank = fd_comm_rank(comm);
  fd_watchdog_phase(w, "start");
  fd_watchdog_step(w, -1);
  w->mine->beat_ns = now_ns();
  FD_TRY(fd_comm_node_barrier(comm));
  pthread_condattr_t a;
  pthread_condattr_init(&a);
  pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
  pthread_cond_init(&w->wake, &a);
  pthread_condattr_destroy(&a);
  pthread_mutex_init(&w->lock, NULL);
  w->running = pthread_create(&w->thread, NULL, watch, w) == 0;
  FD_TRY(fd_agree(comm, w->running ? FD_OK : FD_FAIL(FD_ERR_NOMEM, "no thread for the watchdog")));
  *out = w;
  w = NULL;
done:
  fd_watchdog_destroy(&w);
  return st;
}

void fd_watchdog_destroy(fd_watchdog **out) {
  fd_watchdog *w = *out;
  if (!w) return;
  if (w->running) {
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
  }
  fd_shared_destroy(&w->memory);
  free(w);
  *out = NULL;
}

void fd_watchdog_step(fd_watchdog *w, int64_t step) {
  if (!w) return;
  int64_t t = now_ns();
  w->mine->step = step;
  w->mine->since_ns = t;
  w->mine->started_ns = t;
}

void fd_watchdog_phase(fd_watchdog *w, const char *phase) {
  if (!w) return;
  snprintf(w->mine->phase, sizeof w->mine->phase, "%s", phase);
  w->mine->since_ns = now_ns();
}

void fd_watchdog_on_expiry(fd_watchdog *w, void (*f)(void *user, const char *report), void *user) {
  if (!w) return;
  w->expired = f;
  w->user = user;
}
