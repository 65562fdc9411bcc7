// SPDX-License-Identifier: Apache-2.0
// The demo's tokenizer: added tokens, truncation, instructions, dropped captions, UTF-8, misuse. Ids themselves are
// compared with records by `fdhpc verify`.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/tokenizer.h"

static int failed;
#define CHECK(c)                                                                                            \
  do {                                                                                                      \
    if (!(c)) failed = 1, fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #c, fd_status_message()); \
  } while (0)

static int64_t encode(const fd_tokenizer *t, const char *text, int32_t *ids) { return fd_tokenizer_encode(t, text, strlen(text), true, ids, 64); }

int main(void) {
  char folder[4096];
  const char *top = getenv("top_srcdir");
  fd_tokenizer *t = NULL;
  fd_prompt *p = NULL;
  int32_t a[64], b[64];
  snprintf(folder, sizeof folder, "%s/input/demo/tokenizer", top ? top : ".");
  if (fd_tokenizer_open(folder, &t) != FD_OK) {
    fprintf(stderr, "%s\n", fd_status_message());
    return 1;
  }
  const int32_t bos = fd_tokenizer_bos_id(t);
  CHECK(bos >= 0 && !fd_tokenizer_pads_left(t) && fd_tokenizer_vocabulary(t) > 100);
  CHECK(encode(t, "", a) == 1 && a[0] == bos);
  const int64_t n = encode(t, "a large red circle", a);
  CHECK(n > 2 && n < 20 && a[0] == bos);
  CHECK(fd_tokenizer_encode(t, "a large red circle", 18, false, b, 64) == n - 1 && memcmp(a + 1, b, (size_t)(n - 1) * 4) == 0);
  for (int64_t i = 0; i < n; i++) CHECK(a[i] >= 0 && a[i] < fd_tokenizer_vocabulary(t));
  /* an added token is one id wherever it stands; the pieces around it are encoded apart */
  CHECK(encode(t, "<bos>", b) == 2 && b[1] == bos);
  const int64_t left = encode(t, "red", a);
  CHECK(encode(t, "red<bos>red", b) == 2 * left && b[left] == bos && memcmp(a, b, (size_t)left * 4) == 0 && memcmp(a + 1, b + left + 1, (size_t)(left - 1) * 4) == 0);
  CHECK(fd_tokenizer_encode(t, "a\0b", 3, false, b, 64) >= 3);
  /* only what fits is written */
  b[2] = -7;
  CHECK(fd_tokenizer_encode(t, "a large red circle", 18, true, b, 2) == n && b[2] == -7);

  struct fd_prompt_config config = {.instruction = "", .max_prompt_length = 4};
  CHECK(fd_prompt_create(t, &config, &p) == FD_OK && fd_prompt_length(p) == 4 && fd_prompt_instruction_length(p) == 0);
  encode(t, "a large red circle", a);
  CHECK(fd_prompt_encode(p, "a large red circle", 18, b) == 4 && memcmp(a, b, 16) == 0);
  CHECK(fd_prompt_encode(p, NULL, 0, b) == 1 && b[0] == bos);
  fd_prompt_destroy(&p);
  config = (struct fd_prompt_config){.instruction = "a large ", .max_prompt_length = 20};
  CHECK(fd_prompt_create(t, &config, &p) == FD_OK && fd_prompt_instruction_length(p) == encode(t, "a large", b) - 1);
  CHECK(fd_prompt_length(p) == 20 + fd_prompt_instruction_length(p));
  CHECK(fd_prompt_encode(p, "red circle", 10, b) == n && memcmp(a, b, (size_t)n * 4) == 0);
  CHECK(fd_prompt_encode(p, NULL, 0, b) == 1); /* dropped: no instruction */
  fd_prompt_destroy(&p);
  CHECK(p == NULL);
  config.max_prompt_length = 2; /* the instruction is cut as a caption is: bos and one token */
  CHECK(fd_prompt_create(t, &config, &p) == FD_OK && fd_prompt_instruction_length(p) == 1 && fd_prompt_length(p) == 3);
  fd_prompt_destroy(&p);
  config.max_prompt_length = 0;
  CHECK(fd_prompt_create(t, &config, &p) == FD_ERR_CONFIG);
  config = (struct fd_prompt_config){.max_prompt_length = 8, .apply_chat_template = true};
  CHECK(fd_prompt_create(t, &config, &p) == FD_ERR_UNSUPPORTED); /* the demo's tokenizer has no template */
  fd_tokenizer_destroy(&t);
  CHECK(t == NULL);

  static const struct {
    const char *text;
    size_t n;
    bool valid;
  } utf8[] = {{"", 0, true}, {"caf\xc3\xa9", 5, true}, {"caf\xe9", 4, false}, {"\xc0\xaf", 2, false}, {"\xed\xa0\x80", 3, false}, {"\xf4\x90\x80\x80", 4, false},
              {"\xf0\x9f\x98\x80", 4, true}, {"\xf0\x9f\x98", 3, false}, {"a\0b", 3, true}, {"\xef\xbf\xbf", 3, true}, {"\x80", 1, false}};
  for (size_t i = 0; i < sizeof utf8 / sizeof *utf8; i++) CHECK(fd_utf8_valid(utf8[i].text, utf8[i].n) == utf8[i].valid);

  char empty[] = "/tmp/fdhpc-tokenizer-XXXXXX", file[64];
  CHECK(mkdtemp(empty) != NULL);
  CHECK(fd_tokenizer_open(empty, &t) == FD_ERR_IO && strstr(fd_status_message(), "tokenizer.model"));
  snprintf(file, sizeof file, "%s/tokenizer.json", empty);
  FILE *f = fopen(file, "w");
  CHECK(f && fclose(f) == 0 && fd_tokenizer_open(empty, &t) == FD_ERR_UNSUPPORTED);
  unlink(file);
  snprintf(file, sizeof file, "%s/tokenizer.model", empty);
  f = fopen(file, "w");
  CHECK(f && fputs("no model", f) >= 0 && fclose(f) == 0 && fd_tokenizer_open(empty, &t) == FD_ERR_FORMAT);
  unlink(file);
  rmdir(empty);
  return failed;
}
