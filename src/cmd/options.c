// SPDX-License-Identifier: Apache-2.0
// `fdhpc options` prints doc/options.md, `fdhpc used CONFIG` what a run with CONFIG would use. Neither is in the help.
#include <stdlib.h>

#include "cmd/cmd.h"

static fd_status run_options(struct fd_run *run) {
  if (fd_comm_rank(run->comm) == 0) fd_config_print_markdown(stdout);
  return FD_OK;
}

static fd_status run_used(struct fd_run *run) {
  if (fd_comm_rank(run->comm) != 0) return FD_OK;
  char *text = fd_config_text(run->config);
  if (!text) return FD_FAIL(FD_ERR_NOMEM, "no memory for the configuration");
  fputs(text, stdout);
  free(text);
  return FD_OK;
}

const struct fd_command fd_cmd_options = {
    .name = "options",
    .args = "",
    .groups = "",
    .run = run_options,
};

const struct fd_command fd_cmd_used = {
    .name = "used",
    .args = "CONFIG",
    .takes_config = true,
    .groups = "",
    .run = run_used,
};
