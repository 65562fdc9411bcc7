// SPDX-License-Identifier: Apache-2.0
// colsum against a double loop.
#include "optest.h"

static void body(struct ot *t) {
  static const int64_t shapes[][2] = {{1, 1}, {0, 5}, {3, 7}, {255, 33}, {257, 515}, {1000, 1030}, {9000, 17}, {300, 520}, {700, 8}};
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
    for (int type = FD_F32; type <= FD_BF16; type++)
      for (unsigned acc = 0; acc < 2; acc++)
        for (int c = -1; c < 3; c++) {
          int64_t R = shapes[i][0], n = shapes[i][1], used = c < 0 ? R : R * c / 3;
          ot_reset(t);
          ot_what(t, "%lldx%lld %s acc%u used %lld", (long long)R, (long long)n, fd_dtype_name(type), acc, (long long)used);
          fd_tensor *x = OT_RAND(t, type, R, n), *count = c < 0 ? NULL : ot_count(t, used);
          fd_tensor *y = acc ? OT_RAND(t, FD_F32, n) : OT_NEW(t, FD_F32, n);
          for (int64_t k = used * n; k < R * n; k++) ot_set(x, k, NAN);
          double *ref = ot_doubles(y);
          for (int64_t k = 0; k < n; k++) {
            if (!acc) ref[k] = 0;
            for (int64_t r = 0; r < used; r++) ref[k] += ot_get(x, r * n + k);
          }
          OT_RUN(t, colsum, .x = x, .count = count, .y = y, .acc = acc << 2);
          OT_COMPARE(t, y, ref, (double)used);
          free(ref);
        }
  ot_reset(t);
  fd_tensor *x = OT_RAND(t, FD_F32, 4, 3), *y = OT_NEW(t, FD_F32, 5);
  OT_MISUSE(t, "y", colsum, .x = x, .y = y);
}

int main(void) { return ot_main(body); }
