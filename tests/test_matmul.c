// SPDX-License-Identifier: Apache-2.0
// matmul against a double loop: types, transposes, bias, acc, counts; with and without AVX-512.
#include "cpu/dnnl.h"
#include "isa.h"

struct one {
  int64_t M, N, K;
  int ta, tb, bias, acc, count; /* bias 1 f32, 2 bf16; count -1: none */
  fd_dtype type, c_type;
};

static void check(struct ot *t, struct one o) {
  ot_reset(t);
  ot_what(t, "%lldx%lldx%lld %s>%s ta%d tb%d bias%d acc%d count%d", (long long)o.M, (long long)o.N, (long long)o.K,
          fd_dtype_name(o.type), fd_dtype_name(o.c_type), o.ta, o.tb, o.bias, o.acc, o.count);
  fd_tensor *a = o.ta ? OT_RAND(t, o.type, o.K, o.M) : OT_RAND(t, o.type, o.M, o.K);
  fd_tensor *b = o.tb ? OT_RAND(t, o.type, o.N, o.K) : OT_RAND(t, o.type, o.K, o.N);
  fd_tensor *c = o.acc ? OT_RAND(t, o.c_type, o.M, o.N) : OT_NEW(t, o.c_type, o.M, o.N);
  fd_tensor *bias = o.bias ? OT_RAND(t, o.bias == 2 ? FD_BF16 : FD_F32, o.N) : NULL;
  if (OT_ON_DEVICE && bias && o.c_type == FD_BF16) /* there it is rounded to the type of c */
    for (int64_t i = 0; i < o.N; i++) ot_set(bias, i, fd_bf16_to_f32(fd_f32_to_bf16((float)ot_get(bias, i))));
  fd_tensor *count = o.count >= 0 ? ot_count(t, o.count) : NULL;
  int64_t M = count && !o.ta ? o.count : o.M, K = count && o.ta ? o.count : o.K;
  /* what is beyond the count must not be read: NaN there would show */
  if (count)
    for (int64_t i = o.count * fd_tensor_cols(a); i < fd_tensor_numel(a); i++) ot_set(a, i, NAN);
  if (count && o.ta)
    for (int64_t i = 0; i < fd_tensor_numel(b); i++)
      if ((o.tb ? i % o.K : i / o.N) >= K) ot_set(b, i, NAN);
  double *ref = ot_doubles(c), *before = ot_doubles(c), *da = ot_doubles(a), *db = ot_doubles(b);
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < o.N; j++) {
      double s = bias ? ot_get(bias, j) : 0;
      for (int64_t k = 0; k < K; k++) s += da[o.ta ? k * o.M + i : i * o.K + k] * db[o.tb ? j * o.K + k : k * o.N + j];
      ref[i * o.N + j] = s + (o.acc ? before[i * o.N + j] : 0);
    }
  OT_RUN(t, matmul, .a = a, .b = b, .bias = bias, .count = count, .c = c, .acc = o.acc ? 1u << 4 : 0, .trans_a = o.ta, .trans_b = o.tb);
  fd_tensor used = *c;
  used.ndim = 2, used.shape[0] = M;
  OT_COMPARE(t, &used, ref, (double)K);
  for (int64_t i = M * o.N; i < o.M * o.N; i++)
    if (!(o.acc ? ot_get(c, i) == before[i] : isnan(ot_get(c, i)))) {
      OT_FAIL(t, "row %lld beyond the count was written", (long long)(i / o.N));
      break;
    }
  free(ref), free(before), free(da), free(db);
}

/* Shapes as models have them, of which only the primitives are made. */
static void list(struct ot *t) {
  static const struct {
    const char *what;
    int64_t M, N, K;
  } at[] = {
      {"demo qkv", 512, 320, 192},        {"demo gate up", 512, 1024, 192}, {"demo down", 512, 192, 512},   {"demo adaln", 32, 1152, 192},
      {"demo patch", 512, 192, 64},       {"demo out", 512, 64, 192},       {"mid qkv", 1024, 768, 512},    {"mid mlp", 1024, 4096, 512},
      {"mid down", 1024, 512, 2048},      {"production qkv", 8192, 3072, 2048}, {"production mlp", 8192, 16384, 2048},
      {"production down", 8192, 2048, 8192}, {"gemma qkv", 8192, 2560, 2048}, {"gemma mlp", 8192, 32768, 2048},
      {"golden", 18, 48, 24},             {"golden odd", 7, 13, 5},         {"vae attention", 4096, 512, 512},
  };
  size_t bytes;
  ot_reset(t);
  for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
    for (int type = FD_F32; type <= FD_BF16; type++)
      for (int counted = 0; counted < 2; counted++) {
        ot_what(t, "primitives of %s, %s", at[i].what, fd_dtype_name(type));
        int32_t n = 1;
        fd_tensor x = {NULL, {at[i].M, at[i].K}, 2, type, 0}, w = {NULL, {at[i].N, at[i].K}, 2, type, 0};
        fd_tensor y = {NULL, {at[i].M, at[i].N}, 2, type, 0}, bias = {NULL, {at[i].N}, 1, FD_F32, 0};
        fd_tensor count = {&n, {1}, 1, FD_I32, 0}, dw = w, *c = counted ? &count : NULL;
        dw.dtype = FD_F32;
        for (int b = 0; b < 2; b++)
          OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_matmul, &(struct fd_matmul_args){.a = &x, .b = &w, .bias = b ? &bias : NULL,
                      .count = c, .c = &y, .trans_b = 1}, &bytes) == FD_OK);
        for (unsigned acc = 0; acc < 2; acc++) {
          OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_matmul, &(struct fd_matmul_args){.a = &y, .b = &w, .count = c, .c = &x,
                      .acc = acc << 4}, &bytes) == FD_OK);
          OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_matmul, &(struct fd_matmul_args){.a = &y, .b = &x, .count = c, .c = &dw,
                      .acc = acc << 4, .trans_a = 1}, &bytes) == FD_OK);
          OT_CHECK(t, bytes <= (size_t)64 << 20);
        }
      }
  isa_no_reference(t);
}

static void body(struct ot *t) {
  static const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {33, 17, 65}, {130, 70, 31}, {64, 192, 32}, {1, 640, 9}, {200, 1, 40}};
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
    for (int type = FD_F32; type <= FD_BF16; type++)
      for (int c_type = FD_F32; c_type <= type; c_type++)
        for (int flags = 0; flags < 8; flags++)
          for (int bias = 0; bias < 3; bias++) {
            int64_t M = shapes[i][0], N = shapes[i][1], K = shapes[i][2], rows = flags & 1 ? K : M;
            struct one o = {M, N, K, flags & 1, flags >> 1 & 1, bias, flags >> 2 & 1, -1, type, c_type};
            check(t, o);
            if (bias != (flags >> 1 & 1)) continue;
            int64_t counts[] = {0, 1, rows / 2, rows - 1, rows};
            for (int c = 0; c < 5; c++)
              if (counts[c] >= 0 && (c == 0 || counts[c] != counts[c - 1])) {
                o.count = (int)counts[c];
                check(t, o);
              }
          }
  /* large enough for gemm, for more than one block of scratch, and for tiles plus a rest under a count */
  for (int type = FD_F32; type <= FD_BF16; type++)
    for (int acc = 0; acc < 2; acc++)
      for (int count = -1; count < 400; count += 331) {
        check(t, (struct one){333, 100, 1030, 0, 0, 1, acc, count, type, type});
        check(t, (struct one){333, 100, 1030, 0, 1, 0, acc, count, type, type});
        check(t, (struct one){220, 100, 770, 1, 0, 0, acc, count, type, FD_F32});
        check(t, (struct one){333, 40, 100, 0, 1, 1, acc, count, type, type});
      }
  check(t, (struct one){5, 3, 6000, 1, 0, 0, 1, -1, FD_BF16, FD_F32});
  check(t, (struct one){5, 9000, 300, 0, 1, 0, 1, -1, FD_BF16, FD_BF16});
  check(t, (struct one){0, 3, 4, 0, 0, 1, 0, -1, FD_F32, FD_F32});
  check(t, (struct one){3, 4, 0, 0, 0, 1, 0, -1, FD_F32, FD_F32});
  isa_no_reference(t);
  list(t);

  ot_reset(t);
  ot_what(t, "misuse");
  fd_tensor *a = OT_RAND(t, FD_F32, 4, 3), *b = OT_RAND(t, FD_F32, 5, 3), *c = OT_NEW(t, FD_F32, 4, 5), *h = OT_NEW(t, FD_BF16, 5, 3);
  fd_tensor *bias = OT_RAND(t, FD_F32, 4), *hc = OT_NEW(t, FD_BF16, 4, 5);
  OT_MISUSE(t, "b", matmul, .a = a, .b = b, .c = c);
  OT_MISUSE(t, "b", matmul, .a = a, .b = h, .c = c, .trans_b = 1);
  OT_MISUSE(t, "c", matmul, .a = a, .b = b, .c = a, .trans_b = 1);
  OT_MISUSE(t, "c", matmul, .a = a, .b = b, .c = hc, .trans_b = 1);
  OT_MISUSE(t, "bias", matmul, .a = a, .b = b, .bias = bias, .c = c, .trans_b = 1);
  fd_tensor *count = ot_count(t, 5);
  size_t bytes;
  struct fd_matmul_args m = {.a = a, .b = b, .count = count, .c = c, .trans_b = 1};
  OT_CHECK(t, t->ctx->backend->prepare(t->ctx, FD_OP_matmul, &m, &bytes) == FD_OK);
  OT_CHECK(t, OT_ON_DEVICE || fd_op_run(t->ctx, FD_OP_matmul, &m) == FD_ERR_ARG); /* a count beyond the rows */
}

int main(void) { return isa_main(body); }
