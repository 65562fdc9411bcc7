// SPDX-License-Identifier: Apache-2.0
// `fdhpc options`: the option table as doc/options.md, and a configuration as used.cfg would have it. Not in the help.
#include <stdlib.h>
#include <string.h>

#include "cmd/cmd.h"

static fd_status run_options(struct fd_run *run) {
  if (fd_comm_rank(run->comm) != 0) return FD_OK;
  if (run->n_args == 0) {
    fd_config_print_markdown(stdout);
    return FD_OK;
  }
  /* every key of a file, checked and filled in: what a run would use */
  fd_status st = FD_OK;
  char *text = NULL;
  FD_TRY(fd_config_read(run->config, run->args[0]));
  FD_TRY(fd_config_finish(run->config));
  text = fd_config_text(run->config);
  if (!text) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration"));
  fputs(text, stdout);
done:
  free(text);
  return st;
}

const struct fd_command fd_cmd_options = {
    .name = "options",
    .args = "[CONFIG]",
    .most_args = 1,
    .groups = "",
    .run = run_options,
};
