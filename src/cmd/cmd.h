// SPDX-License-Identifier: Apache-2.0
// Commands: one file src/cmd/<name>.c each, with one `const struct fd_command fd_cmd_<name>` and one row in src/cmd/cmd.c.
#ifndef FD_CMD_CMD_H
#define FD_CMD_CMD_H

#include "base/config.h"
#include "comm/comm.h"

/** A flag. "--x=V" and "--x V" are the same; names may be written with - or _ between words. */
struct fd_flag {
  const char *name; /* "--tag"; a second name after a blank: "--save_dir -o" */
  const char *arg;  /* what follows, for the help: "STEP"; NULL: a switch, also as --no-NAME */
  const char *keys; /* configuration keys that it sets, separated by blanks ("gen.H gen.W"); NULL: the command asks for it */
  const char *help;
};

struct fd_run {
  const struct fd_command *command;
  fd_comm *comm;               /* all ranks */
  fd_config *config;           /* never NULL: defaults, then CONFIG if the command takes one, then flags and --set */
  const struct fd_options *opt;
  const char *config_path;     /* NULL if the command takes no CONFIG */
  int n_args;                  /* words that are no flags, CONFIG not among them */
  const char **args;
  struct fd_run_flags *flags;
};

struct fd_command {
  const char *name;
  const char *args;  /* for the usage line, flags left out: "CONFIG", "DIR..." */
  const char *help;  /* one line */
  bool takes_config; /* the first word is a configuration file */
  int least_args, most_args; /* words besides CONFIG; most_args -1: any number */
  const struct fd_flag *flags; /* ends with a row whose name is NULL; NULL: none but --set and --help */
  const char *groups;          /* option groups shown by --help; "": none, NULL: all */
  const char *more;            /* further help, or NULL */
  /** Collective: every rank calls it and returns the same status (fd_agree); rank 0 prints the message. */
  fd_status (*run)(struct fd_run *run);
};

/** Value of a flag without keys: the text given, "1" or "0" for a switch; NULL if it was not given. The last one wins. */
const char *fd_run_flag(const struct fd_run *run, const char *name);
bool fd_run_switch(const struct fd_run *run, const char *name, bool dflt);
/** Its number, or dflt if it was not given. FD_ERR_CONFIG if it is none or outside lo..hi. */
fd_status fd_run_flag_int(const struct fd_run *run, const char *name, int64_t dflt, int64_t lo, int64_t hi, int64_t *out);
fd_status fd_run_flag_real(const struct fd_run *run, const char *name, double dflt, double lo, double hi, double *out);

/** Text of --version. */
void fd_version_print(FILE *to);

/** The program: finds the command, starts MPI, reads the configuration, runs, prints the message. Returns the exit code. */
int fd_main(int argc, char **argv);

/* ---- one line per command, in the order of the help -------------------------------------------------------------- */
extern const struct fd_command fd_cmd_train;
extern const struct fd_command fd_cmd_sample;
extern const struct fd_command fd_cmd_demo;
extern const struct fd_command fd_cmd_pack;
extern const struct fd_command fd_cmd_vae;
extern const struct fd_command fd_cmd_verify;
extern const struct fd_command fd_cmd_plan;
extern const struct fd_command fd_cmd_bench;
extern const struct fd_command fd_cmd_options;
extern const struct fd_command fd_cmd_used;

#endif
