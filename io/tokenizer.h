// SPDX-License-Identifier: Apache-2.0
// Tokenizers as published for Gemma: tokenizer.model (SentencePiece) with tokenizer_config.json and special_tokens_map.json.
//
// Invariants: ids = bos + pieces, never eos, as transformers' slow GemmaTokenizer gives them. Added tokens are cut out of the text
// literally, each piece between them goes through SentencePiece by itself. Text is bytes with a length and may hold
// NUL. After opening nothing is written: any thread may encode.
#ifndef FD_IO_TOKENIZER_H
#define FD_IO_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"

typedef struct fd_tokenizer fd_tokenizer;

/** Read a folder. FD_ERR_IO if a file is missing, FD_ERR_FORMAT if it is not what it should be, FD_ERR_UNSUPPORTED for
 *  a tokenizer that is not SentencePiece (only tokenizer.json, or CLIP's vocab.json). */
fd_status fd_tokenizer_open(const char *folder, fd_tokenizer **out);
void fd_tokenizer_destroy(fd_tokenizer **t);

int fd_tokenizer_vocabulary(const fd_tokenizer *t); /* ids are below this */
int32_t fd_tokenizer_pad_id(const fd_tokenizer *t); /* 0 if the folder names none */
int32_t fd_tokenizer_bos_id(const fd_tokenizer *t); /* -1 if none is added */
/** padding_side of tokenizer_config.json; right (false) if it says nothing. */
bool fd_tokenizer_pads_left(const fd_tokenizer *t);

/** ids of `text`; the first `capacity` of them are written, the number of all is returned. add_bos: as the
 *  tokenizer's configuration says; false: never. Invalid UTF-8 becomes U+FFFD by SentencePiece: check it before. */
int64_t fd_tokenizer_encode(const fd_tokenizer *t, const char *text, size_t bytes, bool add_bos, int32_t *ids, int64_t capacity);

/** Strict UTF-8: no surrogates, nothing overlong, nothing above U+10FFFF. What Python's decoder accepts. */
bool fd_utf8_valid(const void *text, size_t bytes);

/* ---- how a caption becomes a prompt ------------------------------------------------------------------------------ */

struct fd_prompt_config {
  const char *instruction; /* before the caption; "" or NULL: none */
  int64_t max_prompt_length; /* tokens, bos included, those of the instruction not */
  bool apply_chat_template;
  bool add_generation_prompt;
};

/** A prompt's form, ready to use. Borrows the tokenizer. */
typedef struct fd_prompt fd_prompt;

/** FD_ERR_UNSUPPORTED for a chat template that is not Gemma's; FD_ERR_CONFIG if max_prompt_length < 1. */
fd_status fd_prompt_create(const fd_tokenizer *t, const struct fd_prompt_config *config, fd_prompt **out);
void fd_prompt_destroy(fd_prompt **p);
/** Tokens of the instruction (with a chat template: and of the empty turn around it, bos not counted), by which rows are longer. */
int64_t fd_prompt_instruction_length(const fd_prompt *p);
/** max_prompt_length + instruction length, at least 1: the most ids that fd_prompt_encode gives, and the padded row's length. */
int64_t fd_prompt_length(const fd_prompt *p);
/** ids of instruction + caption, cut from the right to fd_prompt_length. caption NULL is a dropped one: no instruction. A text
 *  that is empty gives bos alone, without template. `ids` has room for fd_prompt_length. Returns their number (>= 0). */
int64_t fd_prompt_encode(const fd_prompt *p, const char *caption, size_t bytes, int32_t *ids);

#ifdef __cplusplus
}
#endif
#endif
