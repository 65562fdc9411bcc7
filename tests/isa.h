// SPDX-License-Identifier: Apache-2.0
// Runs an op test twice: as it is, then in a child process where oneDNN (and our own kernels) may use AVX2 at most.
#ifndef FD_TESTS_ISA_H
#define FD_TESTS_ISA_H

#include <sys/wait.h>
#include <unistd.h>

#include "cpu/dnnl.h"
#include "optest.h"

OT_UNUSED static int isa_main(void (*body)(struct ot *)) {
  int failed = ot_main(body);
  if (OT_ON_DEVICE || getenv("DNNL_MAX_CPU_ISA")) return failed;
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    setenv("DNNL_MAX_CPU_ISA", "AVX2", 1);
    execl("/proc/self/exe", "test", (char *)NULL);
    _exit(127);
  }
  int status = -1;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    printf("with DNNL_MAX_CPU_ISA=AVX2: failed (wait status %d)\n", status);
    return 1;
  }
  return failed;
}

OT_UNUSED static void isa_see(void *user, const struct cpu_prim *p) {
  struct ot *t = user;
  if (strncmp(p->name, "reorder", 7) == 0) return; /* of weights: small, or once */
  t->checks++;
  if (getenv("FD_LIST_PRIMITIVES")) printf("%-40s %s\n", p->name, p->impl);
  if (strncmp(p->impl, "ref", 3) == 0) OT_FAIL(t, "%s is a reference implementation of oneDNN: %s", p->name, p->impl);
}
/** No primitive that this context made may be one of oneDNN's slow reference implementations. */
OT_UNUSED static void isa_no_reference(struct ot *t) {
  if (!OT_ON_DEVICE) cpu_prim_each(t->ctx, isa_see, t); /* a device has other libraries */
}

#endif
