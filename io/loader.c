// SPDX-License-Identifier: Apache-2.0
// A ring of micro-batches. Threads take (micro-batch, sample) pairs in order; the caller of fd_loader_get takes some itself when it
// would wait, so that a rank with one core loses nothing. What is counted is counted when a batch is handed out: what was
// decoded ahead and never used does not show, and the counts do not depend on the threads.
#include "io/loader.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/rng.h"
#include "io/image.h"

enum { MOST_ATTEMPTS = 200, FLOOR_VISITS = 1000 };

struct slot {
  int64_t batch; /* number of the micro-batch; -1: none */
  int64_t done;  /* samples of it that are ready */
  uint8_t *pixels;
  int32_t *rows, *ids, *first, *len; /* rows [B, length]: each sample's ids; ids: the same without gaps */
  int64_t *position, *sample;
  char **text; /* each owned */
  int64_t counts[FD_BAD_COUNT];
  fd_status status;
  char message[1024];
};

/* What a thread needs for itself. */
struct worker {
  struct fd_sample sample;
  fd_image image;
};

struct fd_loader {
  struct fd_loader_config c;
  int64_t n, length; /* samples of an epoch; ids of a row at most */
  int n_slots;
  struct slot *slots;
  pthread_mutex_t lock;
  pthread_cond_t work, ready; /* for threads: there is room; for the caller: something is done */
  int n_threads;
  pthread_t *threads;
  struct worker mine; /* of the caller */
  bool stop;
  int64_t current;                 /* the micro-batch that is handed out; -1: none yet */
  int64_t next_batch, next_sample; /* the pair to be taken next */
  int in_flight;
  int64_t counts[FD_BAD_COUNT];
  int64_t *logged; /* indices + 1 of bad samples that were logged: open addressing, a power of two */
  int64_t n_logged, logged_capacity;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- one sample ---------------------------------------------------------------------------------------------------- */

static int64_t index_at(const fd_loader *l, int64_t p, int attempt) {
  const int64_t epoch = p / l->n;
  int64_t i = p % l->n;
  if (attempt > 0) {
    uint32_t r[4];
    fd_rng_block(l->c.seed, FD_RNG_REPLACE, (uint64_t)p, (uint32_t)attempt, r);
    i = (int64_t)(((uint64_t)r[0] << 32 | r[1]) % (uint64_t)l->n);
  }
  return fd_rng_permute(l->c.seed, FD_RNG_SHUFFLE, (uint64_t)epoch, l->n, i);
}

static int caption_column(const fd_loader *l, int64_t p, int64_t index) {
  const bool first = fd_dataset_has_caption(l->c.dataset, 0), second = fd_dataset_has_caption(l->c.dataset, 1);
  if (!first) return 1;
  if (!second || l->c.original_caption_rate <= 0) return 0;
  if (fd_rng_uniform(l->c.seed, FD_RNG_CHOOSE_CAPTION, (uint64_t)p, 0) >= l->c.original_caption_rate) return 0;
  struct fd_sample_info info;
  fd_dataset_info(l->c.dataset, index, &info);
  return info.caption[1].bytes >= 0 ? 1 : 0;
}

static enum fd_bad read_sample(fd_loader *l, struct worker *w, int64_t index, int column) {
  enum fd_bad bad = fd_dataset_read(l->c.dataset, index, 1u << column, &w->sample);
  if (bad) return bad;
  switch (fd_image_decode(w->sample.image, w->sample.image_bytes, l->c.fast_jpeg ? l->c.resolution : 0, &w->image)) {
    case FD_IMAGE_KEPT: break;
    case FD_IMAGE_UNKNOWN: return FD_BAD_IMAGE_UNKNOWN;
    case FD_IMAGE_TOO_LARGE: return FD_BAD_IMAGE_LARGE;
    case FD_IMAGE_NOMEM:
      FD_FAIL(FD_ERR_NOMEM, "no memory to decode it");
      return FD_BAD_READ;
    case FD_IMAGE_DAMAGED: return FD_BAD_IMAGE_DAMAGED;
  }
  if (w->sample.caption_bytes[column] < 0) return FD_BAD_NO_CAPTION;
  return fd_utf8_valid(w->sample.caption[column], (size_t)w->sample.caption_bytes[column]) ? FD_BAD_NONE : FD_BAD_CAPTION_UTF8;
}

/* True the first time an index is asked for. Called under the lock; without memory everything is new. */
static bool first_time(fd_loader *l, int64_t index) {
  if ((l->n_logged + 1) * 2 > l->logged_capacity) {
    const int64_t capacity = l->logged_capacity ? l->logged_capacity * 2 : 256;
    int64_t *more = calloc((size_t)capacity, sizeof *more);
    if (!more) return true;
    for (int64_t i = 0; i < l->logged_capacity; i++)
      if (l->logged[i]) {
        int64_t at = l->logged[i] & (capacity - 1);
        while (more[at]) at = (at + 1) & (capacity - 1);
        more[at] = l->logged[i];
      }
    free(l->logged);
    l->logged = more;
    l->logged_capacity = capacity;
  }
  int64_t at = (index + 1) & (l->logged_capacity - 1);
  while (l->logged[at] && l->logged[at] != index + 1) at = (at + 1) & (l->logged_capacity - 1);
  if (l->logged[at]) return false;
  l->logged[at] = index + 1;
  l->n_logged++;
  return true;
}

static void log_bad(fd_loader *l, int64_t index, enum fd_bad kind) {
  pthread_mutex_lock(&l->lock);
  const bool fresh = first_time(l, index);
  pthread_mutex_unlock(&l->lock);
  if (!fresh) return;
  struct fd_sample_info info;
  fd_dataset_info(l->c.dataset, index, &info);
  fd_log_warn("%s: sample \"%.*s\" is replaced: %s%s%s", fd_dataset_shard_path(l->c.dataset, info.image.shard, NULL), info.key_bytes, info.key,
              fd_bad_text(kind), kind == FD_BAD_READ ? ": " : "", kind == FD_BAD_READ ? fd_status_message() : "");
}

/* Fill row b of a slot. Any thread; rows are disjoint. */
static void fill(fd_loader *l, struct worker *w, struct slot *s, int64_t b) {
  fd_status st = FD_OK;
  const int64_t p = s->batch * l->c.global_batch + l->c.first + b;
  const size_t R = (size_t)l->c.resolution;
  int64_t counts[FD_BAD_COUNT] = {0};
  int column = 0, attempt = 0;
  int64_t index = 0;
  enum fd_bad bad = FD_BAD_NONE;
  for (; attempt < MOST_ATTEMPTS; attempt++) {
    index = index_at(l, p, attempt);
    column = caption_column(l, p, index);
    bad = read_sample(l, w, index, column);
    counts[bad]++;
    if (!bad) break;
    log_bad(l, index, bad);
  }
  if (bad) FD_TRY(FD_FAIL(FD_ERR_DATA, "data: %d samples drawn one after the other are bad, the last because: %s", MOST_ATTEMPTS, fd_bad_text(bad)));

  float crop[2];
  if (!l->c.center_crop)
    for (int k = 0; k < 2; k++) crop[k] = fd_rng_uniform(l->c.seed, FD_RNG_CROP, (uint64_t)p, (uint32_t)k);
  FD_TRY(fd_image_fit(&w->image, l->c.resolution, l->c.center_crop ? NULL : crop, s->pixels + (size_t)b * R * R * 3));
  const bool dropped = fd_rng_uniform(l->c.seed, FD_RNG_DROP_CAPTION, (uint64_t)p, 0) < l->c.random_dropping_rate;
  const char *caption = dropped ? NULL : w->sample.caption[column];
  const size_t bytes = dropped ? 0 : (size_t)w->sample.caption_bytes[column];
  s->len[b] = (int32_t)fd_prompt_encode(l->c.prompt, caption, bytes, s->rows + b * l->length);
  s->position[b] = p;
  s->sample[b] = index;
  free(s->text[b]);
  s->text[b] = strndup(caption ? caption : "", bytes);
  if (!s->text[b]) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "data: no memory for a caption"));
done:
  pthread_mutex_lock(&l->lock);
  for (int k = 0; k < FD_BAD_COUNT; k++) s->counts[k] += counts[k];
  if (st != FD_OK && s->status == FD_OK) {
    s->status = st;
    snprintf(s->message, sizeof s->message, "%s", fd_status_message());
  }
  pthread_mutex_unlock(&l->lock);
}

/* ---- threads --------------------------------------------------------------------------------------------------------- */

/* Under the lock: take the next pair if there is room for it before micro-batch `before`. */
static bool take(fd_loader *l, int64_t before, struct slot **slot, int64_t *b) {
  if (l->next_batch >= before) return false;
  struct slot *s = &l->slots[l->next_batch % l->n_slots];
  if (s->batch != l->next_batch) { /* its first sample: what was there is not needed any more */
    s->batch = l->next_batch;
    s->done = 0;
    s->status = FD_OK;
    memset(s->counts, 0, sizeof s->counts);
  }
  *slot = s;
  *b = l->next_sample;
  l->in_flight++;
  if (++l->next_sample == l->c.count) {
    l->next_sample = 0;
    l->next_batch++;
  }
  return true;
}

static void give(fd_loader *l, struct slot *s) {
  s->done++;
  l->in_flight--;
  if (s->done == l->c.count || l->in_flight == 0) pthread_cond_broadcast(&l->ready);
}

static void *work(void *context) {
  fd_loader *l = context;
  struct worker w = {0};
  struct slot *s;
  int64_t b;
  pthread_mutex_lock(&l->lock);
  while (!l->stop) {
    if (l->current < 0 || !take(l, l->current + l->n_slots, &s, &b)) {
      pthread_cond_wait(&l->work, &l->lock);
      continue;
    }
    pthread_mutex_unlock(&l->lock);
    fill(l, &w, s, b);
    pthread_mutex_lock(&l->lock);
    give(l, s);
  }
  pthread_mutex_unlock(&l->lock);
  fd_sample_free(&w.sample);
  fd_image_free(&w.image);
  return NULL;
}

/* ---- the loader -------------------------------------------------------------------------------------------------------- */

static fd_status check(const struct fd_loader_config *c) {
  const fd_dataset *d = c->dataset;
  const int64_t n = fd_dataset_samples(d);
  if (n < 1) return FD_FAIL(FD_ERR_DATA, "data.data_path: no samples");
  if (c->resolution < 1 || c->resolution > FD_IMAGE_MAX_SIDE) return FD_FAIL(FD_ERR_CONFIG, "data.resolution = %d", c->resolution);
  if (c->micros < 1 || c->count < 1 || c->first < 0 || c->first + c->count > c->global_batch || c->threads < 0)
    return FD_FAIL(FD_ERR_ARG, "loader: positions %lld to %lld of %lld", (long long)c->first, (long long)(c->first + c->count - 1), (long long)c->global_batch);
  const struct {
    const char *key;
    double value;
  } rates[] = {{"data.random_dropping_rate", c->random_dropping_rate}, {"data.original_caption_rate", c->original_caption_rate}, {"data.max_bad_fraction", c->max_bad_fraction}};
  for (size_t i = 0; i < 3; i++)
    if (!(rates[i].value >= 0 && rates[i].value <= 1)) return FD_FAIL(FD_ERR_CONFIG, "%s = %g: a share between 0 and 1 is needed", rates[i].key, rates[i].value);
  if (c->original_caption_rate > 0 && !fd_dataset_has_caption(d, 1))
    return FD_FAIL(FD_ERR_CONFIG, "data.original_caption_rate = %g, but data.caption_column.original is not set", c->original_caption_rate);
  const int64_t no_image = fd_dataset_lost(d, FD_BAD_NO_IMAGE), no_caption = fd_dataset_lost(d, FD_BAD_NO_CAPTION), lost = no_image + no_caption;
  if ((double)lost > c->max_bad_fraction * (double)(n + lost))
    return FD_FAIL(FD_ERR_DATA,
                   "data: %lld of %lld samples have no picture, %lld no caption: more than data.max_bad_fraction = %g; check data.image_column and "
                   "data.caption_column",
                   (long long)no_image, (long long)(n + lost), (long long)no_caption, c->max_bad_fraction);
  int64_t unusable = 0, shown = -1;
  for (int64_t i = 0; i < fd_dataset_n_shards(d); i++) {
    enum fd_shard_state state;
    fd_dataset_shard_path(d, i, &state);
    if (state < FD_SHARD_MISSING) continue;
    if (shown < 0) shown = i;
    unusable++;
  }
  if ((double)unusable > c->max_bad_fraction * (double)fd_dataset_n_shards(d)) {
    enum fd_shard_state state;
    const char *path = fd_dataset_shard_path(d, shown, &state);
    return FD_FAIL(FD_ERR_DATA, "data.data_path: %lld of %lld files cannot be used, more than data.max_bad_fraction = %g; the first: %s %s", (long long)unusable,
                   (long long)fd_dataset_n_shards(d), c->max_bad_fraction, path, fd_shard_text(state));
  }
  return FD_OK;
}

static bool slot_make(struct slot *s, int64_t B, int64_t length, size_t R) {
  const size_t n = (size_t)B;
  s->batch = -1;
  s->pixels = malloc(n * R * R * 3);
  s->rows = malloc(n * (size_t)length * sizeof *s->rows);
  s->ids = malloc(n * (size_t)length * sizeof *s->ids);
  s->first = malloc(n * sizeof *s->first);
  s->len = malloc(n * sizeof *s->len);
  s->position = malloc(n * sizeof *s->position);
  s->sample = malloc(n * sizeof *s->sample);
  s->text = calloc(n, sizeof *s->text);
  return s->pixels && s->rows && s->ids && s->first && s->len && s->position && s->sample && s->text;
}

fd_status fd_loader_create(const struct fd_loader_config *config, fd_loader **out) {
  fd_status st = FD_OK;
  fd_loader *l = NULL;
  sigset_t all, before;
  FD_TRY(check(config));
  l = calloc(1, sizeof *l);
  if (!l) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "loader: no memory"));
  l->c = *config;
  pthread_mutex_init(&l->lock, NULL);
  pthread_cond_init(&l->work, NULL);
  pthread_cond_init(&l->ready, NULL);
  l->n = fd_dataset_samples(config->dataset);
  l->length = fd_prompt_length(config->prompt);
  l->current = -1;
  l->n_slots = 1 + (config->threads == 0 ? 0 : config->ahead > 0 ? config->ahead : 2);
  l->slots = calloc((size_t)l->n_slots, sizeof *l->slots);
  if (!l->slots) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "loader: no memory"));
  for (int i = 0; i < l->n_slots; i++)
    if (!slot_make(&l->slots[i], config->count, l->length, (size_t)config->resolution))
      FD_TRY(FD_FAIL(FD_ERR_NOMEM, "loader: no memory for %d batches of %lld pictures of %d x %d", l->n_slots, (long long)config->count, config->resolution,
                     config->resolution));
  l->threads = calloc((size_t)config->threads + 1, sizeof *l->threads);
  if (!l->threads) FD_TRY(FD_FAIL(FD_ERR_NOMEM, "loader: no memory"));
  sigfillset(&all); /* signals are the main thread's */
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (l->n_threads < config->threads && pthread_create(&l->threads[l->n_threads], NULL, work, l) == 0) l->n_threads++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (l->n_threads < config->threads && l->n_threads == 0) fd_log_warn("loader: no thread could be started; pictures are decoded in the step itself");
  *out = l;
  l = NULL;
done:
  fd_loader_destroy(&l);
  return st;
}

void fd_loader_destroy(fd_loader **loader) {
  fd_loader *l = *loader;
  if (!l) return;
  pthread_mutex_lock(&l->lock);
  l->stop = true;
  pthread_cond_broadcast(&l->work);
  pthread_mutex_unlock(&l->lock);
  for (int i = 0; i < l->n_threads; i++) pthread_join(l->threads[i], NULL);
  for (int i = 0; l->slots && i < l->n_slots; i++) {
    struct slot *s = &l->slots[i];
    for (int64_t b = 0; s->text && b < l->c.count; b++) free(s->text[b]);
    free(s->text);
    free(s->pixels);
    free(s->rows);
    free(s->ids);
    free(s->first);
    free(s->len);
    free(s->position);
    free(s->sample);
  }
  free(l->slots);
  free(l->threads);
  free(l->logged);
  fd_sample_free(&l->mine.sample);
  fd_image_free(&l->mine.image);
  pthread_cond_destroy(&l->work);
  pthread_cond_destroy(&l->ready);
  pthread_mutex_destroy(&l->lock);
  free(l);
  *loader = NULL;
}

int64_t fd_loader_token_capacity(const fd_loader *l) { return l->c.count * l->length; }

void fd_loader_counts(fd_loader *l, int64_t counts[FD_BAD_COUNT]) { memcpy(counts, l->counts, sizeof l->counts); }

/* The share of bad visits, judged over at least as many visits as make a share meaningful. */
static fd_status check_bad(const fd_loader *l) {
  int64_t visits = 0, bad = 0;
  char kinds[512] = "";
  size_t used = 0;
  for (int k = 0; k < FD_BAD_COUNT; k++) {
    visits += l->counts[k];
    if (k == FD_BAD_NONE || !l->counts[k]) continue;
    bad += l->counts[k];
    if (used < sizeof kinds) used += (size_t)snprintf(kinds + used, sizeof kinds - used, "%s%lld x %s", used ? ", " : "", (long long)l->counts[k], fd_bad_text((enum fd_bad)k));
  }
  int64_t least = l->n < FLOOR_VISITS ? l->n : FLOOR_VISITS;
  if (visits > least) least = visits;
  if (bad == 0 || (double)bad <= l->c.max_bad_fraction * (double)least) return FD_OK;
  return FD_FAIL(FD_ERR_DATA, "data: %lld of %lld samples visited cannot be used, more than data.max_bad_fraction = %g: %s", (long long)bad, (long long)visits,
                 l->c.max_bad_fraction, kinds);
}

fd_status fd_loader_get(fd_loader *l, int64_t step, int micro, struct fd_batch *batch, double *wait_s) {
  const double t0 = now();
  if (step < 0 || micro < 0 || micro >= l->c.micros) return FD_FAIL(FD_ERR_ARG, "loader: micro-batch %d of step %lld", micro, (long long)step);
  const int64_t want = step * l->c.micros + micro;
  struct slot *s;
  int64_t b;
  pthread_mutex_lock(&l->lock);
  if (l->current < 0 || (want != l->current && want != l->current + 1)) {
    /* not the next one: let what is being done finish (its slots are about to be used again), then begin there */
    l->next_batch = INT64_MAX;
    while (l->in_flight) pthread_cond_wait(&l->ready, &l->lock);
    for (int i = 0; i < l->n_slots; i++) l->slots[i].batch = -1;
    l->next_batch = want;
    l->next_sample = 0;
  }
  l->current = want;
  pthread_cond_broadcast(&l->work);
  struct slot *mine = &l->slots[want % l->n_slots];
  while (mine->batch != want || mine->done < l->c.count) {
    if (!take(l, want + 1, &s, &b)) {
      pthread_cond_wait(&l->ready, &l->lock);
      continue;
    }
    pthread_mutex_unlock(&l->lock);
    fill(l, &l->mine, s, b);
    pthread_mutex_lock(&l->lock);
    give(l, s);
  }
  pthread_mutex_unlock(&l->lock);

  int32_t total = 0;
  for (int64_t i = 0; i < l->c.count && mine->status == FD_OK; i++) {
    mine->first[i] = total;
    memcpy(mine->ids + total, mine->rows + i * l->length, (size_t)mine->len[i] * sizeof *mine->ids);
    total += mine->len[i];
  }
  for (int k = 0; k < FD_BAD_COUNT; k++) l->counts[k] += mine->counts[k];
  memset(mine->counts, 0, sizeof mine->counts); /* the same batch again is no new visit */
  if (wait_s) *wait_s = now() - t0;
  fd_status st = check_bad(l);
  if (st == FD_OK && mine->status != FD_OK) st = FD_FAIL(mine->status, "%s", mine->message);
  if (st != FD_OK) return st;
  *batch = (struct fd_batch){.B = (int)l->c.count,
                             .R = l->c.resolution,
                             .pixels = mine->pixels,
                             .ids = mine->ids,
                             .first = mine->first,
                             .len = mine->len,
                             .total = total,
                             .position = mine->position,
                             .sample = mine->sample,
                             .text = (const char *const *)mine->text};
  return FD_OK;
}
