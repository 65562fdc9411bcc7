// SPDX-License-Identifier: Apache-2.0
// Configurations: what is written reads back to the bit, layers and --set win in order, models are found, keys are near.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/config.h"
#include "base/models.h"
#include "base/rng.h"

static int failed;
#define CHECK(c)                                                                                             \
  do {                                                                                                       \
    if (!(c)) failed = 1, printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static char dir[] = "/tmp/fdhpc-config-XXXXXX";

static const char *put(const char *name, const char *text) {
  static char path[4][256];
  static int turn;
  char *p = path[turn++ % 4];
  snprintf(p, sizeof path[0], "%s/%s", dir, name);
  FILE *f = fopen(p, "w");
  if (!f || fputs(text, f) < 0 || fclose(f) != 0) exit(99);
  return p;
}

static fd_config *text_config(const char *text) {
  fd_config *c = NULL;
  CHECK(fd_config_create(&c) == FD_OK);
  CHECK(fd_config_read_text(c, text, "text") == FD_OK);
  return c;
}

/* used.cfg must read back to the same bits, whatever a value is. */
static void test_round_trip(void) {
  static const char *const strings[] = {"plain", "quote \" backslash \\ done", "line\nbreak\ttab\r", "\x01\x1f\x7f", "Bär 猫", "// no comment # either", ""};
  for (int turn = 0; turn < 200; turn++) {
    fd_config *a = NULL, *b = NULL;
    char set[600];
    CHECK(fd_config_create(&a) == FD_OK && fd_config_create(&b) == FD_OK);
    uint32_t r[4];
    fd_rng_block(11, 1, 0, (uint64_t)turn, r);
    double lr = ldexp((double)r[0], -32 - (int)(r[1] % 60)), mean = ((double)r[2] - 2147483648.0) / 123456789.0;
    snprintf(set, sizeof set, "optimizer.lr=%.17g", lr);
    CHECK(fd_config_set(a, "--set", set) == FD_OK);
    snprintf(set, sizeof set, "trainer.logit_mean=%.17g", mean);
    CHECK(fd_config_set(a, "--set", set) == FD_OK);
    snprintf(set, sizeof set, "optimizer.betas=%.17g,%.17g", lr < 0.99 ? lr : 0.5, 1.0 / 3.0);
    CHECK(fd_config_set(a, "--set", set) == FD_OK);
    snprintf(set, sizeof set, "trainer.seed=%lld", (long long)(((uint64_t)r[3] << 31) | r[0]));
    CHECK(fd_config_set(a, "--set", set) == FD_OK);
    snprintf(set, sizeof set, "gen.negative_prompt=%s", strings[turn % 7]);
    CHECK(fd_config_set(a, "--set", set) == FD_OK);
    CHECK(fd_config_finish(a) == FD_OK);
    char *text = fd_config_text(a), *again = NULL;
    CHECK(text && fd_config_read_text(b, text, "used.cfg") == FD_OK && fd_config_finish(b) == FD_OK);
    const struct fd_options *x = fd_config_options(a), *y = fd_config_options(b);
    CHECK(x->optimizer.lr == y->optimizer.lr && x->optimizer.lr == lr);
    CHECK(x->trainer.logit_mean == y->trainer.logit_mean && x->trainer.logit_mean == mean);
    CHECK(x->optimizer.betas[0] == y->optimizer.betas[0] && y->optimizer.betas[1] == 1.0 / 3.0);
    CHECK(x->trainer.seed == y->trainer.seed);
    CHECK(!strcmp(x->gen.negative_prompt, strings[turn % 7]) && !strcmp(y->gen.negative_prompt, strings[turn % 7]));
    again = fd_config_text(b);
    /* the second names more keys as set; the values are the same */
    CHECK(again && !strcmp(strstr(text, "\ntrainer"), strstr(again, "\ntrainer")));
    free(text);
    free(again);
    fd_config_destroy(&a);
    fd_config_destroy(&b);
  }
}

static void test_values(void) {
  fd_config *c = text_config("trainer = { max_steps = 5000000000L; resume_from = 1200; seed = 0x10; validation_steps = \"\"; };\n"
                             "ema = { update_steps = \"\"; };\noptimizer = { lr = 1; betas = [0.5, 0.75]; eps = 1E-6; weight_decay = .5; };\n"
                             "data = { data_path = \"one.tar\"; }; gen = { val_prompt = (\"a\", \"b \\\"c\\\"\"); };\n"
                             "model = { base_config_override = { head_dim = 32; }; timestep_conditioning = \"\"; };\n");
  const struct fd_options *o = fd_config_options(c);
  CHECK(o->trainer.max_steps == 5000000000 && !strcmp(o->trainer.resume_from, "1200") && o->trainer.seed == 16);
  CHECK(o->ema.update_steps == 0 && o->optimizer.lr == 1.0 && o->optimizer.betas[1] == 0.75 && o->optimizer.eps == 1e-6);
  CHECK(o->data.data_path.n == 1 && !strcmp(o->data.data_path.at[0], "one.tar"));
  CHECK(o->gen.val_prompt.n == 2 && !strcmp(o->gen.val_prompt.at[1], "b \"c\""));
  CHECK(o->model.base_config_override.head_dim == 32 && !*o->model.timestep_conditioning);
  CHECK(fd_config_is_set(c, "optimizer.lr") && !fd_config_is_set(c, "trainer.zero_stage"));
  CHECK(!strcmp(fd_config_where(c, "optimizer.lr"), "text:3") && !strcmp(fd_config_where(c, "vae.subfolder"), "default"));
  /* the command line: no quotes needed, lists as in a file, large integers without L */
  CHECK(fd_config_set(c, "--set", "trainer.max_steps=7000000000") == FD_OK && o->trainer.max_steps == 7000000000);
  CHECK(fd_config_set(c, "--set", "gen.val_prompt=a cat, and a dog") == FD_OK && o->gen.val_prompt.n == 1);
  CHECK(fd_config_set(c, "--set", "gen.val_prompt=(\"x\", \"y\")") == FD_OK && o->gen.val_prompt.n == 2);
  CHECK(fd_config_set(c, "--set", "trainer.deterministic=true") == FD_OK && o->trainer.deterministic);
  CHECK(fd_config_set(c, "--set", "trainer.mixed_precision=\"no\"") == FD_OK && !strcmp(o->trainer.mixed_precision, "no"));
  CHECK(fd_config_set(c, "--set", "ema.update_steps=") == FD_OK && o->ema.update_steps == 0);
  CHECK(fd_config_set(c, "--set", "trainer.max_steps=1.0") == FD_ERR_CONFIG && fd_config_set(c, "--set", "trainer=1") == FD_ERR_CONFIG);
  CHECK(fd_config_set(c, "--set", "optimizer.lr=nan") == FD_ERR_CONFIG && fd_config_set(c, "--set", "optimizer.lr=") == FD_ERR_CONFIG);
  CHECK(fd_config_set(c, "--set", "optimizer.betas=0.9") == FD_ERR_CONFIG && o->optimizer.betas[0] == 0.5);
  fd_config_destroy(&c);
}

static void test_layers(void) {
  char sub[256];
  fd_config *c = NULL;
  snprintf(sub, sizeof sub, "%s/deep", dir);
  mkdir(sub, 0777);
  put("base.cfg", "trainer = { max_steps = 1; seed = 2; logging_steps = 3; };");
  put("deep/middle.cfg", "trainer = { seed = 20; logging_steps = 30; };\nextends = \"../base.cfg\";");
  put("part.cfg", "gen = { steps = 9; };");
  const char *top = put("top.cfg", "extends = \"deep/middle.cfg\";\n@include \"part.cfg\"\ntrainer = { logging_steps = 300; };");
  CHECK(fd_config_create(&c) == FD_OK && fd_config_read(c, top) == FD_OK);
  const struct fd_options *o = fd_config_options(c);
  CHECK(o->trainer.max_steps == 1 && o->trainer.seed == 20 && o->trainer.logging_steps == 300 && o->gen.steps == 9);
  fd_config_destroy(&c);
  put("ring1.cfg", "extends = \"ring2.cfg\";");
  const char *ring = put("ring2.cfg", "extends = \"ring1.cfg\";");
  CHECK(fd_config_create(&c) == FD_OK && fd_config_read(c, ring) == FD_ERR_CONFIG && strstr(fd_status_message(), "extends itself"));
  fd_config_destroy(&c);
}

static void test_integers_in_text(void) {
  static const struct {
    const char *text;
    bool fine;
  } rows[] = {
      {"trainer = { seed = 2147483647; };", true},
      {"trainer = { seed = 2147483648; };", false},
      {"trainer = { seed = 2147483648L; };", true},
      {"trainer = { seed = 0xFFFFFFFF; };", false},
      {"trainer = { seed = 99999999999999999999L; };", false},
      {"# 5000000000\ntrainer = { seed = 1; /* 5000000000\n */ };", true},
      {"gen = { negative_prompt = \"5000000000 \\\" 5000000000\"; };", true},
      {"optimizer = { lr = 0.00050000000000; eps = 1e-08; weight_decay = .50000000000; };", true},
      {"trainer = { run = \"a5000000000\"; };", true},
      {"trainer = { seed = -5000000000; };", false},
  };
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    fd_config *c = NULL;
    CHECK(fd_config_create(&c) == FD_OK);
    fd_status st = fd_config_read_text(c, rows[i].text, "text");
    if ((st == FD_OK) != rows[i].fine) failed = 1, printf("row %zu: %s (%s)\n", i, rows[i].text, fd_status_message());
    fd_config_destroy(&c);
  }
  /* every cut of a good file is read or refused, never more */
  const char *whole = "extends = \"nowhere.cfg\";\n@include \"x\"\ntrainer = { seed = -5L; run = \"a\\\"b\"; /* c */ };\n";
  for (size_t n = 0; n <= strlen(whole); n++) {
    char part[256];
    fd_config *c = NULL;
    snprintf(part, sizeof part, "%.*s", (int)n, whole);
    CHECK(fd_config_create(&c) == FD_OK);
    (void)fd_config_read_text(c, part, "text");
    fd_config_destroy(&c);
  }
}

static void test_near(void) {
  CHECK(!strcmp(fd_option_nearest("trainer.max_step"), "trainer.max_steps"));
  CHECK(!strcmp(fd_option_nearest("max_steps"), "trainer.max_steps"));
  CHECK(!strcmp(fd_option_nearest("train.max_steps"), "trainer.max_steps"));
  CHECK(!strcmp(fd_option_nearest("optimizer.learning_rates") ? "some" : "none", "none"));
  CHECK(!strcmp(fd_option_nearest("gen.sede"), "gen.seed"));
  CHECK(!strcmp(fd_option_nearest("head_dim"), "model.base_config_override.head_dim"));
  for (int i = 0; i < fd_option_count; i++) { /* the table itself: every key found, its default within its range */
    const struct fd_option *o = &fd_option_table[i];
    if (o->type == FD_OPTION_GROUP || o->type == FD_OPTION_GROUP_END) continue;
    CHECK(fd_option_find(o->key) == o && *o->help);
    if (o->type == FD_OPTION_INT) CHECK(o->int_default >= o->int_lo && o->int_default <= o->int_hi);
    if (o->type == FD_OPTION_REAL) CHECK(o->real_default[0] >= o->real_lo && o->real_default[0] <= o->real_hi);
  }
}

static void make_folder(const char *path) {
  char all[512];
  snprintf(all, sizeof all, "%s/%s", dir, path);
  for (char *p = all + strlen(dir) + 1; (p = strchr(p, '/')); p++) {
    *p = 0;
    mkdir(all, 0777);
    *p = '/';
  }
  mkdir(all, 0777);
}

static void test_models(void) {
  struct fd_options o;
  char *folder = NULL, home[300], models[300];
  bool shipped;
  fd_options_defaults(&o);
  snprintf(home, sizeof home, "%s/hf", dir);
  snprintf(models, sizeof models, "%s/models", dir);
  unsetenv("HF_HUB_CACHE");
  setenv("HF_HOME", home, 1);
  CHECK(fd_model_find(&o, "vae.x", "", "", &folder) == FD_ERR_CONFIG && strstr(fd_status_message(), "vae.x is not set"));
  CHECK(fd_model_find(&o, "vae.x", "REPA-E/e2e-flux-vae", "", &folder) == FD_ERR_IO);
  CHECK(strstr(fd_status_message(), "huggingface-cli download REPA-E/e2e-flux-vae") && !strstr(fd_status_message(), "licence"));
  CHECK(fd_model_find(&o, "vae.x", "black-forest-labs/FLUX.1-dev", "vae", &folder) == FD_ERR_IO);
  CHECK(strstr(fd_status_message(), "--include \"vae/*\"") && strstr(fd_status_message(), "licence must be accepted"));
  CHECK(fd_model_find(&o, "vae.x", "./nowhere", "", &folder) == FD_ERR_IO && strstr(fd_status_message(), "no folder ./nowhere"));
  /* the hub's cache, by refs/main, not by name */
  make_folder("hf/hub/models--A--b/snapshots/111/vae");
  make_folder("hf/hub/models--A--b/snapshots/222/vae");
  make_folder("hf/hub/models--A--b/refs");
  put("hf/hub/models--A--b/refs/main", "222");
  put("hf/hub/models--A--b/snapshots/222/vae/config.json", "{}");
  CHECK(fd_model_find(&o, "k", "A/b", "vae", &folder) == FD_OK && folder && strstr(folder, "snapshots/222/vae"));
  free(folder), folder = NULL;
  CHECK(fd_model_find(&o, "k", "A/b", "", &folder) == FD_ERR_IO && strstr(fd_status_message(), "no config.json"));
  /* paths.models comes first, a folder of that name before both */
  make_folder("models/A/b/vae");
  put("models/A/b/vae/config.json", "{}");
  o.paths.models = models;
  CHECK(fd_model_find(&o, "k", "A/b", "vae", &folder) == FD_OK && folder && !strncmp(folder, models, strlen(models)));
  free(folder), folder = NULL;
  /* what comes with the program is for plan and bench alone */
  CHECK(fd_model_find(&o, "k", "google/gemma-2b", "", &folder) == FD_ERR_IO);
  CHECK(fd_model_find_config(&o, "k", "google/gemma-2b", "", &folder, &shipped) == FD_OK && shipped);
  free(folder), folder = NULL;
  /* noise levels: the keys, else the folder, else what is built in */
  char *from = NULL;
  CHECK(fd_models_noise_scheduler(&o, &from) == FD_OK && o.noise_scheduler.shift == 3.0 && o.noise_scheduler.num_train_timesteps == 1000);
  free(from), from = NULL;
  fd_options_defaults(&o);
  o.paths.models = models;
  make_folder("models/A/s");
  put("models/A/s/scheduler_config.json", "{\"num_train_timesteps\": 500, \"shift\": 1.5}");
  o.noise_scheduler.pretrained_model_name_or_path = "A/s";
  o.noise_scheduler.num_train_timesteps = 250;
  CHECK(fd_models_noise_scheduler(&o, &from) == FD_OK && o.noise_scheduler.shift == 1.5 && o.noise_scheduler.num_train_timesteps == 250);
  free(from);
}

int main(void) {
  if (!mkdtemp(dir)) return 99;
  test_round_trip();
  test_values();
  test_layers();
  test_integers_in_text();
  test_near();
  test_models();
  char command[300];
  snprintf(command, sizeof command, "rm -rf %s", dir);
  if (system(command) != 0) failed = 1;
  return failed;
}
