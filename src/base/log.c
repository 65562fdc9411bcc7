// SPDX-License-Identifier: Apache-2.0
// Lines of the log. Invariant: the progress line is wiped before any other line, and shown again by its owner.
#include "base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_rank;
static FILE *log_file;
static bool progress_shown;

fd_status fd_log_init(int rank, const char *file) {
  FILE *f = NULL;
  if (file && rank == 0) {
    f = fopen(file, "a");
    if (!f) return FD_FAIL(FD_ERR_IO, "%s: cannot be opened for writing: %s", file, strerror(errno));
  }
  pthread_mutex_lock(&lock);
  if (log_file) fclose(log_file);
  log_file = f;
  log_rank = rank;
  pthread_mutex_unlock(&lock);
  return FD_OK;
}

void fd_log_close(void) {
  pthread_mutex_lock(&lock);
  if (progress_shown) fputc('\n', stderr), progress_shown = false;
  if (log_file) fclose(log_file);
  log_file = NULL;
  pthread_mutex_unlock(&lock);
}

static void say(const char *kind, const char *format, va_list args) {
  char line[8192];
  int n = 0;
  if (*kind && log_rank != 0) n = snprintf(line, sizeof line, "rank %d: ", log_rank);
  n += snprintf(line + n, sizeof line - (size_t)n, "%s", kind);
  int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
  if (m > 0) n += m;
  if (n > (int)sizeof line - 2) n = (int)sizeof line - 2;
  line[n++] = '\n';
  pthread_mutex_lock(&lock);
  if (progress_shown) fputs("\r\033[K", stderr), progress_shown = false;
  fwrite(line, 1, (size_t)n, stderr);
  fflush(stderr);
  if (log_file) fwrite(line, 1, (size_t)n, log_file), fflush(log_file);
  pthread_mutex_unlock(&lock);
}

#define SAY(kind)          \
  va_list args;            \
  va_start(args, format);  \
  say(kind, format, args); \
  va_end(args)

void fd_log_info(const char *format, ...) {
  if (log_rank != 0) return;
  SAY("");
}

void fd_log_warn(const char *format, ...) { SAY("warning: "); }

void fd_log_error(const char *format, ...) { SAY("error: "); }

/* The launcher's standard error is a terminal: mpirun gives its ranks a pipe and passes on what they write. */
static bool launcher_has_terminal(void) {
  char path[64], target[64];
  if (!getenv("OMPI_COMM_WORLD_SIZE")) return false;
  snprintf(path, sizeof path, "/proc/%d/fd/2", (int)getppid());
  const ssize_t n = readlink(path, target, sizeof target - 1);
  if (n < 0) return false;
  target[n] = '\0';
  return !strncmp(target, "/dev/pts/", 9) || !strncmp(target, "/dev/tty", 8);
}

bool fd_log_has_terminal(void) {
  static int known = -1;
  if (log_rank != 0) return false;
  if (known < 0) known = isatty(STDERR_FILENO) || launcher_has_terminal();
  return known;
}

void fd_log_progress(const char *format, ...) {
  if (!fd_log_has_terminal()) return;
  char line[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  pthread_mutex_lock(&lock);
  if (*line)
    fprintf(stderr, "\r\033[K%s", line), progress_shown = true;
  else if (progress_shown)
    fputc('\n', stderr), progress_shown = false;
  fflush(stderr);
  pthread_mutex_unlock(&lock);
}
