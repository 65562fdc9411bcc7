#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# doc/options.md is what the option table says, and every file of input/ is a configuration.
failed=0
"$top_builddir/fdhpc" options >test_options_doc.tmp || exit 1
if ! diff "$top_srcdir/doc/options.md" test_options_doc.tmp; then
    echo "doc/options.md is not up to date: run make options-doc"
    failed=1
fi
rm -f test_options_doc.tmp
for file in "$top_srcdir"/input/*.cfg; do
    "$top_builddir/fdhpc" used "$file" >/dev/null || failed=1
done
exit $failed
