// SPDX-License-Identifier: Apache-2.0
// Configuration of a run: files laid over each other, then --set, checked row by row against options.def.
#ifndef FD_BASE_CONFIG_H
#define FD_BASE_CONFIG_H

#include <stdio.h>

#include "base/options.h"
#include "base/status.h"

typedef struct fd_config fd_config;

/** Every key at its default. */
fd_status fd_config_create(fd_config **out);
void fd_config_destroy(fd_config **config);

/** Lay a libconfig file over what is there. `extends = "other.cfg"` (relative to the file that says it) is read first.
 *  The first fault is reported with file, line, key, value and what was wanted; `config` is then unusable. FD_ERR_CONFIG. */
fd_status fd_config_read(fd_config *config, const char *path);
/** The same from a text (a checkpoint's attribute); `name` stands for the file in messages. */
fd_status fd_config_read_text(fd_config *config, const char *text, const char *name);
/** "key=value" as on the command line: text needs no quotes, an empty value is null. `flag` names it in messages ("--set"). */
fd_status fd_config_set(fd_config *config, const char *flag, const char *assignment);
/** After the last file and --set: what single rows cannot say, and values of noise_scheduler that were left open. */
fd_status fd_config_finish(fd_config *config);

/** The values; owned by the config. */
const struct fd_options *fd_config_options(const fd_config *config);
/** True if a file or --set gave this key. */
bool fd_config_is_set(const fd_config *config, const char *key);
/** Where that was: "file:line" or "--set"; "default" if nowhere. */
const char *fd_config_where(const fd_config *config, const char *key);

/** The whole configuration as a libconfig file that reads back to the same values to the bit, keys that were set but
 *  that this run does not read listed in comments. The caller frees it. NULL if memory is out. */
char *fd_config_text(const fd_config *config);
/** The same into a file (used.cfg). FD_ERR_IO. */
fd_status fd_config_write(const fd_config *config, const char *path);
/** One line in the log per key that was set but is not read, with the reason. */
void fd_config_log_unused(const fd_config *config);

/** The option table for --help; groups: names separated by blanks, NULL for all. */
void fd_config_print_help(FILE *to, const char *groups);
/** doc/options.md. */
void fd_config_print_markdown(FILE *to);

#endif
