// SPDX-License-Identifier: Apache-2.0
// The table of commands, the command line, and what happens before and after a command.
// Invariant: what all ranks find wrong alike is said once, by rank 0.
#include "cmd/cmd.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/threads.h"

/* One row per command, in the order of the help. */
static const struct fd_command *const commands[] = {
    &fd_cmd_train,
    &fd_cmd_sample,
    &fd_cmd_demo,
    &fd_cmd_pack,
    &fd_cmd_vae,
    &fd_cmd_verify,
    &fd_cmd_plan,
    &fd_cmd_bench,
    &fd_cmd_options,
    &fd_cmd_used,
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static const struct fd_flag common_flags[] = {
    {"--set", "KEY=VALUE", NULL, "set a configuration key; may be given many times"},
    {"--help -h", NULL, NULL, "say what the command does, and the keys it reads"},
    {NULL, NULL, NULL, NULL},
};

struct fd_run_flags {
  int n;
  struct {
    const struct fd_flag *flag;
    const char *value;
  } at[256];
};

/* ---- the command line ---------------------------------------------------------------------------------------------- */

static const struct fd_command *find_command(const char *name) {
  for (int i = 0; i < N_COMMANDS; i++)
    if (!strcmp(commands[i]->name, name)) return commands[i];
  return NULL;
}

/* --num-steps and --num_steps are the same */
static bool same_name(const char *a, const char *b, size_t nb) {
  size_t na = strlen(a);
  if (na != nb) return false;
  for (size_t i = 0; i < na; i++) {
    char x = a[i], y = b[i];
    if (i >= 2 && x == '-') x = '_';
    if (i >= 2 && y == '-') y = '_';
    if (x != y) return false;
  }
  return true;
}

static bool flag_has_name(const struct fd_flag *flag, const char *name) {
  for (const char *p = flag->name; *p;) {
    size_t n = strcspn(p, " ");
    if (same_name(name, p, n)) return true;
    p += n;
    p += strspn(p, " ");
  }
  return false;
}

static const struct fd_flag *find_flag(const struct fd_command *command, const char *name) {
  for (const struct fd_flag *f = command->flags; f && f->name; f++)
    if (flag_has_name(f, name)) return f;
  for (const struct fd_flag *f = common_flags; f->name; f++)
    if (flag_has_name(f, name)) return f;
  return NULL;
}

static fd_status unknown_flag(const struct fd_command *command, const char *name) {
  const char *best = NULL;
  size_t best_length = 0;
  int best_cost = 1 + (int)strlen(name) / 3;
  const struct fd_flag *lists[] = {command->flags, common_flags};
  for (int l = 0; l < 2; l++)
    for (const struct fd_flag *f = lists[l]; f && f->name; f++) {
      char first[64];
      snprintf(first, sizeof first, "%.*s", (int)strcspn(f->name, " "), f->name);
      int cost = fd_edit_distance(name, first);
      if (cost <= best_cost) best = f->name, best_length = strlen(first), best_cost = cost;
    }
  if (best)
    return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: unknown flag %s; did you mean %.*s?", command->name, name, (int)best_length, best);
  return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: unknown flag %s; fdhpc %s --help lists them", command->name, name, command->name);
}

struct line {
  const struct fd_command *command;
  struct fd_run_flags flags;
  int n_words;
  const char **words; /* [argc] */
  bool help;
};

static fd_status parse_line(int argc, char **argv, struct line *out) {
  const struct fd_command *command = out->command;
  bool flags_end = false;
  for (int i = 0; i < argc; i++) {
    const char *word = argv[i];
    if (flags_end || word[0] != '-' || !word[1]) {
      out->words[out->n_words++] = word;
      continue;
    }
    if (!strcmp(word, "--")) {
      flags_end = true;
      continue;
    }
    const char *equals = strchr(word, '='), *value = NULL;
    char name[128];
    snprintf(name, sizeof name, "%.*s", (int)(equals ? equals - word : (long)strlen(word)), word);
    const struct fd_flag *flag = find_flag(command, name);
    if (!flag && !strncmp(name, "--no", 4) && (name[4] == '-' || name[4] == '_')) {
      char positive[128];
      snprintf(positive, sizeof positive, "--%s", name + 5);
      flag = find_flag(command, positive);
      if (flag && flag->arg) flag = NULL;
      if (flag) value = "0";
    }
    if (!flag) return unknown_flag(command, name);
    if (flag->arg) {
      if (equals)
        value = equals + 1;
      else if (i + 1 < argc)
        value = argv[++i];
      else
        return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: %s needs %s after it", command->name, name, flag->arg);
    } else {
      if (equals) return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: %s takes no value", command->name, name);
      if (!value) value = "1";
    }
    if (flag == &common_flags[1]) {
      out->help = true;
      continue;
    }
    if (out->flags.n == (int)(sizeof out->flags.at / sizeof out->flags.at[0]))
      return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: more than %d flags", command->name, out->flags.n);
    out->flags.at[out->flags.n].flag = flag;
    out->flags.at[out->flags.n++].value = value;
  }
  if (out->help) return FD_OK;
  int args = out->n_words - command->takes_config;
  if (command->takes_config && out->n_words == 0)
    return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: no configuration given; usage: fdhpc %s %s", command->name, command->name, command->args);
  if (args < command->least_args || (command->most_args >= 0 && args > command->most_args))
    return FD_FAIL(FD_ERR_CONFIG, "fdhpc %s: %s; usage: fdhpc %s %s", command->name,
                   args < command->least_args ? "too few words" : "too many words", command->name, command->args);
  return FD_OK;
}

const char *fd_run_flag(const struct fd_run *run, const char *name) {
  const char *value = NULL;
  for (int i = 0; i < run->flags->n; i++)
    if (flag_has_name(run->flags->at[i].flag, name)) value = run->flags->at[i].value;
  return value;
}

bool fd_run_switch(const struct fd_run *run, const char *name, bool dflt) {
  const char *value = fd_run_flag(run, name);
  return value ? *value == '1' : dflt;
}

fd_status fd_run_flag_int(const struct fd_run *run, const char *name, int64_t dflt, int64_t lo, int64_t hi, int64_t *out) {
  const char *text = fd_run_flag(run, name);
  char *end = NULL;
  if (!text) {
    *out = dflt;
    return FD_OK;
  }
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (errno || end == text || *end || value < lo || value > hi)
    return FD_FAIL(FD_ERR_CONFIG, "%s %s: wanted an integer from %" PRId64 " to %" PRId64, name, text, lo, hi);
  *out = value;
  return FD_OK;
}

fd_status fd_run_flag_real(const struct fd_run *run, const char *name, double dflt, double lo, double hi, double *out) {
  const char *text = fd_run_flag(run, name);
  char *end = NULL;
  if (!text) {
    *out = dflt;
    return FD_OK;
  }
  double value = strtod(text, &end);
  if (end == text || *end || !(value >= lo && value <= hi))
    return FD_FAIL(FD_ERR_CONFIG, "%s %s: wanted a number from %g to %g", name, text, lo, hi);
  *out = value;
  return FD_OK;
}

/* ---- help ----------------------------------------------------------------------------------------------------------- */

static void print_usage(FILE *to) {
  fprintf(to, "fdhpc trains text-to-image diffusion transformers.\n\n"
              "  fdhpc CONFIG [--set KEY=VALUE]...      the same as fdhpc train CONFIG\n"
              "  mpirun -n RANKS fdhpc CONFIG           on several ranks\n");
  fprintf(to, "\n");
  for (int i = 0; i < N_COMMANDS; i++)
    if (commands[i]->help) fprintf(to, "  fdhpc %-8s %-22s %s\n", commands[i]->name, commands[i]->args, commands[i]->help);
  fprintf(to, "  fdhpc COMMAND --help                    flags of a command, and the configuration keys it reads\n"
              "  fdhpc --version                         commit, backends, versions of libraries\n\n"
              "Exit codes: 0 done, 1 a check failed, 2 configuration, 3 files, 4 file format, 5 data, 6 not finite,\n"
              "7 memory, 8 not built, 9 communication, 70 a fault of the program.\n");
}

static void print_flags(FILE *to, const struct fd_flag *flags) {
  for (const struct fd_flag *f = flags; f && f->name; f++) {
    char left[128], names[96];
    size_t n = strcspn(f->name, " ");
    snprintf(names, sizeof names, "%.*s%s%s", (int)n, f->name, f->name[n] ? ", " : "", f->name[n] ? f->name + n + 1 : "");
    snprintf(left, sizeof left, "%s%s%s", names, f->arg ? " " : "", f->arg ? f->arg : "");
    fprintf(to, "  %-32s %s", left, f->help);
    if (f->keys) {
      fprintf(to, " (");
      for (const char *p = f->keys; *p; p++) fputs(*p == ' ' ? ", " : (char[]){*p, 0}, to);
      fprintf(to, ")");
    }
    fprintf(to, "\n");
  }
}

static void print_help(FILE *to, const struct fd_command *c) {
  fprintf(to, "fdhpc %s %s\n\n%s\n\n", c->name, c->args, c->help ? c->help : "");
  print_flags(to, c->flags);
  print_flags(to, common_flags);
  if (c->more) fprintf(to, "\n%s\n", c->more);
  if (!c->groups || *c->groups) {
    fprintf(to, "\nConfiguration keys, with their defaults:\n");
    fd_config_print_help(to, c->groups);
  }
}

/* ---- before and after a command ---------------------------------------------------------------------------------------- */

/* Rank by the launcher's word, for what is said before MPI starts. */
static int rank_of_launcher(void) {
  static const char *const names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    const char *text = getenv(names[i]);
    if (text && *text) return atoi(text);
  }
  return 0;
}

static void say_failure(fd_status st) {
  if (st == FD_ERR_ARG)
    fd_log_error("%s (%s)", fd_status_message(), fd_status_where());
  else
    fd_log_error("%s", fd_status_message());
}

static fd_status configure(struct fd_run *run) {
  fd_status st = FD_OK;
  if (run->config_path) FD_TRY(fd_config_read(run->config, run->config_path));
  for (int i = 0; i < run->flags->n; i++) {
    const struct fd_flag *flag = run->flags->at[i].flag;
    const char *value = run->flags->at[i].value;
    char first[64];
    snprintf(first, sizeof first, "%.*s", (int)strcspn(flag->name, " "), flag->name);
    if (flag == &common_flags[0]) FD_TRY(fd_config_set(run->config, "--set", value));
    for (const char *p = flag->keys; p && *p;) {
      char *assignment = NULL;
      size_t n = strcspn(p, " ");
      if (asprintf(&assignment, "%.*s=%s", (int)n, p, value) < 0) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the command line"));
      st = fd_config_set(run->config, first, assignment);
      free(assignment);
      if (st != FD_OK) goto done;
      p += n;
      p += strspn(p, " ");
    }
  }
  FD_TRY(fd_config_finish(run->config));
done:
  return st;
}

static fd_status not_a_command(const char *word) {
  const char *best = NULL;
  int best_cost = 3;
  for (int i = 0; i < N_COMMANDS; i++) {
    int cost = fd_edit_distance(word, commands[i]->name);
    if (cost < best_cost && commands[i]->help) best = commands[i]->name, best_cost = cost;
  }
  if (best) return FD_FAIL(FD_ERR_CONFIG, "%s is neither a command nor a configuration file; did you mean fdhpc %s?", word, best);
  return FD_FAIL(FD_ERR_CONFIG, "%s is neither a command nor a configuration file; fdhpc --help lists the commands", word);
}

int fd_main(int argc, char **argv) {
  fd_status st = FD_OK;
  struct line line = {.command = NULL};
  struct fd_run run = {.command = NULL};
  bool quiet = rank_of_launcher() != 0; /* what follows until MPI runs is the same on all ranks */
  if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
    if (!quiet) print_usage(argc < 2 ? stderr : stdout);
    return argc < 2 ? fd_status_exit_code(FD_ERR_CONFIG) : 0;
  }
  if (!strcmp(argv[1], "--version")) {
    if (!quiet) fd_version_print(stdout);
    return 0;
  }
  line.words = calloc((size_t)argc, sizeof *line.words);
  if (!line.words) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "no memory for the command line"));
  line.command = find_command(argv[1]);
  int first = line.command ? 2 : 1;
  if (!line.command) {
    if (argv[1][0] != '-' && access(argv[1], F_OK) != 0) FD_TRY(not_a_command(argv[1]));
    line.command = find_command("train");
    if (!line.command) FD_TRY(FD_FAIL(FD_ERR_UNSUPPORTED, "fdhpc train is not built"));
  }
  FD_TRY(parse_line(argc - first, argv + first, &line));
  if (line.help) {
    if (!quiet) print_help(stdout, line.command);
    goto done;
  }
  FD_TRY(fd_comm_create(&run.comm));
  FD_TRY(fd_log_init(fd_comm_rank(run.comm), NULL));
  fd_threads_setup();
  run.command = line.command;
  run.flags = &line.flags;
  run.args = line.words + line.command->takes_config;
  run.n_args = line.n_words - line.command->takes_config;
  run.config_path = line.command->takes_config ? line.words[0] : NULL;
  st = fd_config_create(&run.config);
  if (st == FD_OK) st = configure(&run);
  FD_TRY(fd_agree(run.comm, st)); /* a file may be there on one node and not on another */
  run.opt = fd_config_options(run.config);
  FD_TRY(line.command->run(&run));
done:
  if (st != FD_OK && (run.comm ? fd_comm_rank(run.comm) == 0 : !quiet)) say_failure(st);
  fd_config_destroy(&run.config);
  fd_log_close();
  free(line.words);
  fd_comm_destroy(&run.comm);
  return fd_status_exit_code(st);
}
