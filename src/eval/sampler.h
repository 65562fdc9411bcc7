// SPDX-License-Identifier: Apache-2.0
// Pictures from prompts: text states, Euler steps of the flow with classifier-free guidance, un-normalised latents, VAE decoder.
// Invariant: a picture depends on (seed, prompt index, sample) and the batch size alone, never on the number of ranks, since every
// batch is full and holds the same requests on whatever rank it runs.
#ifndef FD_EVAL_SAMPLER_H
#define FD_EVAL_SAMPLER_H

#include "comm/comm.h"
#include "io/tokenizer.h"
#include "model/model.h"

/** The models; all borrowed, weights in place. The caller puts moving averages into `dit`'s weights if it wants them. */
struct fd_sampler_parts {
  fd_ctx *ctx;
  fd_model *dit, *text_encoder, *vae;
  const fd_tokenizer *tokenizer; /* NULL: requests give token ids (bench) */
};

struct fd_sampler_config {
  int64_t batch;              /* pictures of one batch */
  int64_t height, width;      /* pixels */
  int num_inference_steps;
  double guidance_scale;      /* > 1: classifier-free guidance */
  const char *negative_prompt; /* "" is the empty caption */
  const char *instruction;    /* put before each prompt, never before the negative one */
  int64_t max_length;         /* tokens of a prompt */
  int text_index;             /* hidden state of the text encoder that the DiT reads */
  double shift;               /* of the schedule (train/scheduler.h) */
  int64_t num_train_timesteps;
  fd_dtype dtype;             /* FD_BF16 or FD_F32 */
};

struct fd_sample_request {
  const char *prompt;
  uint64_t seed;
  uint32_t prompt_index, sample; /* key of the first latents with the seed */
  const int32_t *ids; /* without a tokenizer: n_ids (1 .. max_length) tokens; the negative prompt is the first of them alone */
  int n_ids;
};

typedef struct fd_sampler fd_sampler;

/** Builds and plans the graphs. Local. */
fd_status fd_sampler_create(const struct fd_sampler_parts *parts, const struct fd_sampler_config *config, fd_sampler **out);
void fd_sampler_destroy(fd_sampler **s);
/** Bytes of device memory beside the weights. */
size_t fd_sampler_bytes(const fd_sampler *s);

/** What a watcher sees of a batch, in this order; text once, the next two after each step, pictures at the end. */
enum fd_sampler_stage {
  FD_SAMPLER_TEXT,      /* values: none; text: the packed ids of all rows (negative prompts first) */
  FD_SAMPLER_MODEL_OUT, /* [rows, h, w, C] before guidance */
  FD_SAMPLER_LATENTS,   /* [batch, h, w, C] after the step */
  FD_SAMPLER_PICTURES   /* [batch, H, W, 3] not clamped */
};
typedef fd_status fd_sampler_watch(void *user, enum fd_sampler_stage stage, int step, const float *values, int64_t n, const struct fd_text *text);

/** Run from given latents ([batch, h, w, C], normalised as the DiT sees them) instead of the requests' own, and look at every stage: for
 *  verify. latents NULL: the requests'; watch NULL: nobody looks; rgb NULL: no bytes. Local. */
fd_status fd_sampler_run_watched(fd_sampler *s, int n, const struct fd_sample_request *request, const float *latents, fd_sampler_watch *watch,
                                 void *user, unsigned char *rgb);

/** One batch: n <= batch requests (the rest is filled with copies of the last and thrown away); rgb out [n, H, W, 3]. Local. */
fd_status fd_sampler_run(fd_sampler *s, int n, const struct fd_sample_request *request, unsigned char *rgb);

/** All prompts x n_samples, split over the ranks by whole batches; writes the pictures and, on rank 0, the contact
 *  sheet DIR/sheet.png (at most 64 pictures). Files are DIR/<prompt:05>.png, or <prompt:05>-<sample:02>.png with several samples;
 *  jpeg: .jpg. Collective. */
fd_status fd_sample_prompts(fd_sampler *s, fd_comm *comm, int n_prompts, const char *const *prompts, int n_samples, uint64_t seed,
                            const char *dir, bool jpeg, void (*progress)(void *user, int64_t done, int64_t total), void *user);

#endif
