// SPDX-License-Identifier: Apache-2.0
// Stopping on request and by the watchdog. Ranks wait for what must happen, nothing is timed: a fault makes the test hang or fail.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "train/stop.h"
#include "train/watchdog.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static char told[256]; /* a file that exists when the watchdog has spoken */

struct seen {
  pthread_mutex_t lock;
  pthread_cond_t cond;
  char report[4096];
};

static void keep(void *user, const char *report) {
  struct seen *s = user;
  pthread_mutex_lock(&s->lock);
  snprintf(s->report, sizeof s->report, "%s", report);
  if (told[0]) {
    FILE *f = fopen(told, "w");
    if (f) fclose(f);
  }
  pthread_cond_signal(&s->cond);
  pthread_mutex_unlock(&s->lock);
}

static void test_watchdog(fd_comm *comm) {
  static struct seen seen = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};
  fd_watchdog *w = NULL;
  CHECK(fd_watchdog_create(comm, 0, &w) == FD_OK && w == NULL);
  fd_watchdog_step(w, 1); /* nothing to do, and nothing breaks */
  fd_watchdog_phase(w, "forward");
  fd_watchdog_destroy(&w);

  CHECK(fd_watchdog_create(comm, 3600, &w) == FD_OK && w); /* ends at once, not after an hour */
  fd_watchdog_on_expiry(w, keep, &seen);
  fd_watchdog_step(w, 5);
  CHECK(fd_comm_barrier(comm) == FD_OK);
  fd_watchdog_destroy(&w);
  CHECK(w == NULL && seen.report[0] == 0);

  snprintf(told, sizeof told, "/tmp/fdhpc-told-%d", (int)getpid());
  CHECK(fd_comm_bcast(comm, told, sizeof told, 0) == FD_OK);
  /* the highest rank stands still in a later phase than the others, who wait for it; rank 0 alone watches with a short patience */
  int last = comm->size - 1;
  CHECK(fd_watchdog_create(comm, comm->rank == 0 ? 1.5 : 3600, &w) == FD_OK);
  fd_watchdog_on_expiry(w, keep, &seen);
  fd_watchdog_step(w, 41);
  if (comm->rank != last) fd_watchdog_phase(w, "optimizer");
  CHECK(fd_comm_barrier(comm) == FD_OK);
  if (comm->rank == last) fd_watchdog_phase(w, "optimizer");
  int done = 0;
  if (comm->rank == last) { /* until the report is there: a file tells it, as this rank may not take part in anything */
    while (comm->rank != 0 && access(told, F_OK) != 0) usleep(10000);
  }
  if (comm->rank == 0 && last > 0) { /* stays in a sum as a step would; its watchdog speaks meanwhile and keep() makes the file */
    CHECK(fd_comm_bcast(comm, &done, sizeof done, last) == FD_OK);
  } else if (comm->rank == 0) {
    pthread_mutex_lock(&seen.lock);
    while (!seen.report[0]) pthread_cond_wait(&seen.cond, &seen.lock);
    pthread_mutex_unlock(&seen.lock);
  } else {
    CHECK(fd_comm_bcast(comm, &done, sizeof done, last) == FD_OK);
  }
  if (comm->rank == 0) {
    char want[128];
    const char *line, *mark = strstr(seen.report, "look here first");
    snprintf(want, sizeof want, "rank %d on %s: step 41, phase optimizer for", last, comm->host);
    line = strstr(seen.report, want);
    CHECK(line != NULL && strstr(line, "does not wait for others") != NULL);
    if (comm->size > 1) {
      CHECK(strstr(seen.report, "rank 0 on") && strstr(strstr(seen.report, "rank 0 on"), "s: waits for others"));
      CHECK(line && mark && mark > line && !memchr(line, '\n', (size_t)(mark - line)));
    }
    CHECK(strstr(seen.report, "trainer.watchdog_minutes") != NULL);
    unlink(told);
  }
  CHECK(fd_comm_barrier(comm) == FD_OK);
  fd_watchdog_destroy(&w);
}

static void test_signal(fd_comm *comm) {
  int number = -1;
  fd_stop_install();
  CHECK(fd_stop_requested(comm, &number) == FD_OK && number == 0);
  if (comm->rank == comm->size - 1) raise(SIGUSR1); /* one rank has it, all hear of it */
  CHECK(fd_stop_requested(comm, &number) == FD_OK && number == SIGUSR1);
  CHECK(fd_stop_requested(comm, &number) == FD_OK && number == SIGUSR1); /* it stays */
  struct sigaction a;
  CHECK(sigaction(SIGXFSZ, NULL, &a) == 0 && a.sa_handler == SIG_IGN);
  raise(SIGTERM);
  CHECK(fd_stop_requested(comm, &number) == FD_OK && number == SIGTERM);
  CHECK(sigaction(SIGTERM, NULL, &a) == 0 && a.sa_handler == SIG_DFL);
}

int main(void) {
  fd_comm *comm = NULL;
  if (fd_comm_create(&comm) != FD_OK) return fprintf(stderr, "%s\n", fd_status_message()), 1;
  test_watchdog(comm);
  test_signal(comm);
  int64_t any = failed;
  CHECK(fd_comm_allreduce_i64(comm, &any, 1, FD_COMM_MAX) == FD_OK);
  fd_comm_destroy(&comm);
  return failed || any;
}
