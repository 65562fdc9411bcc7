// SPDX-License-Identifier: Apache-2.0
// Finds the command, nothing else.
#include <stdio.h>

int main(void) {
  fprintf(stderr, "fdhpc: no command is built yet\n");
  return 8;
}
