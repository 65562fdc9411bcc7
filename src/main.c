// SPDX-License-Identifier: Apache-2.0
// Finds the command, nothing else.
#include "cmd/cmd.h"

int main(int argc, char **argv) { return fd_main(argc, argv); }
