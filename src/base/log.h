// SPDX-License-Identifier: Apache-2.0
// What the program says: to the terminal (stderr) and, once opened, to the run folder's log.txt.
// Invariant: a line is written with one call, so that lines of several ranks do not mix.
#ifndef FD_BASE_LOG_H
#define FD_BASE_LOG_H

#include <stdbool.h>

#include "base/status.h"

/** Rank of this process in all that follows (0 before), and the log file to append to (rank 0 only; NULL: none).
 *  May be called again: another path closes the file before it. */
fd_status fd_log_init(int rank, const char *file);
/** Close the file. */
void fd_log_close(void);

/** Rank 0 only. A newline is added. Any thread. */
void fd_log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
/** Every rank, with "warning: " and, on other ranks than 0, "rank R: " before it. */
void fd_log_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fd_log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** A line that replaces itself, for a terminal: written only if stderr is one (or mpirun's is), rank 0, never to the file. "" ends it. */
void fd_log_progress(const char *format, ...) __attribute__((format(printf, 1, 2)));
/** True if fd_log_progress shows anything. */
bool fd_log_has_terminal(void);

#endif
