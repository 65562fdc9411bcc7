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
for command in $("$top_builddir/fdhpc" --help | sed -n 's/^  fdhpc \([a-z][a-z]*\) .*/\1/p'); do
    "$top_builddir/fdhpc" "$command" --help | grep -q "^fdhpc $command" || { echo "no help for $command"; failed=1; }
    seen="$seen $command"
done
[ "$seen" = " train sample demo pack vae verify plan bench" ] || { echo "commands in the help:$seen"; failed=1; }
exit $failed
