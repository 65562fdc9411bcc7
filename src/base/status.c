// SPDX-License-Identifier: Apache-2.0
// The last failure of each thread. Invariant: a message is complete (what, where, found, wanted) before it is stored.
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define MESSAGE_BYTES 4096

static _Thread_local char message[MESSAGE_BYTES];
static _Thread_local char where[256];

static const struct {
  const char *name;
  int exit_code;
} statuses[FD_STATUS_COUNT] = {
    [FD_OK] = {"ok", 0},
    [FD_ERR_FAILED] = {"check failed", 1},
    [FD_ERR_CONFIG] = {"configuration", 2},
    [FD_ERR_IO] = {"input/output", 3},
    [FD_ERR_FORMAT] = {"file format", 4},
    [FD_ERR_DATA] = {"data", 5},
    [FD_ERR_NUMERIC] = {"numeric", 6},
    [FD_ERR_NOMEM] = {"memory", 7},
    [FD_ERR_UNSUPPORTED] = {"unsupported", 8},
    [FD_ERR_COMM] = {"communication", 9},
    [FD_ERR_ARG] = {"internal", 70},
};

fd_status fd_fail(fd_status st, const char *file, int line, const char *format, ...) {
  char text[MESSAGE_BYTES]; /* an argument may be the old message */
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  memcpy(message, text, sizeof message);
  snprintf(where, sizeof where, "%s:%d", file, line);
  return st;
}

fd_status fd_fail_in(fd_status st, const char *format, ...) {
  char text[MESSAGE_BYTES];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (n < 0) n = 0;
  if (n < (int)sizeof text) snprintf(text + n, sizeof text - (size_t)n, ": %s", message);
  memcpy(message, text, sizeof message);
  return st;
}

const char *fd_status_message(void) { return message; }
const char *fd_status_where(void) { return where; }

const char *fd_status_name(fd_status st) {
  return (unsigned)st < FD_STATUS_COUNT ? statuses[st].name : "unknown";
}

int fd_status_exit_code(fd_status st) { return (unsigned)st < FD_STATUS_COUNT ? statuses[st].exit_code : 70; }
