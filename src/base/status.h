// SPDX-License-Identifier: Apache-2.0
// Status codes, the error message behind them, and the one way to leave a function.
#ifndef FD_BASE_STATUS_H
#define FD_BASE_STATUS_H

/** Every function that can fail returns one of these; the message is kept per thread (fd_status_message).
 *  doc/formats.md lists the exit code of each (fd_status_exit_code). */
typedef enum fd_status {
  FD_OK = 0,
  FD_ERR_FAILED,      /* a check did not pass (verify, judge): exit 1 */
  FD_ERR_CONFIG,      /* command line or configuration: exit 2 */
  FD_ERR_IO,          /* a file is missing, unreadable or unwritable, disk full: exit 3 */
  FD_ERR_FORMAT,      /* a file is there but is not what it should be: exit 4 */
  FD_ERR_DATA,        /* too many bad samples, or none: exit 5 */
  FD_ERR_NUMERIC,     /* loss or gradient not finite too often: exit 6 */
  FD_ERR_NOMEM,       /* memory: exit 7 */
  FD_ERR_UNSUPPORTED, /* asked for what this build does not have: exit 8 */
  FD_ERR_COMM,        /* MPI or NCCL: exit 9 */
  FD_ERR_ARG,         /* a contract was broken by the caller, a fault of the program: exit 70 */
  FD_STATUS_COUNT
} fd_status;

/** Record a message and return `st`. Overwrites the thread's earlier message. */
fd_status fd_fail(fd_status st, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
#define FD_FAIL(st, ...) fd_fail((st), __FILE__, __LINE__, __VA_ARGS__)

/** Put "context: " before the message of a failure that comes from below. Returns `st`. */
fd_status fd_fail_in(fd_status st, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** The calling thread's last message, without file and line; "" if none. Valid until the next failure. */
const char *fd_status_message(void);
/** "src/io/x.c:12" of that failure. */
const char *fd_status_where(void);
const char *fd_status_name(fd_status st);
int fd_status_exit_code(fd_status st);

/** Evaluate; on failure remember the status in `st` and go to the function's own label `done`. */
#define FD_TRY(call)               \
  do {                             \
    st = (call);                   \
    if (st != FD_OK) goto done;    \
  } while (0)

#endif
