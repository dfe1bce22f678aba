#!/bin/sh
# fuzz.sh TIME: runs every fuzzing target for TIME, one after the other, and fails at the first that finds something.
#
# Go before 1.27 now and then ends a run that found nothing with "context deadline exceeded": its coordinator takes the end of
# -fuzztime for a worker's error (https://go.dev/issue/75804). That is let pass if it is all that was said: what a target finds,
# or a worker that hangs or dies, is reported with its input, which is kept under testdata/fuzz.
set -eu

cd "$(dirname "$0")/.."
time=${1:?"usage: $0 TIME, such as 3s or 10m"}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# said FILE: what a run printed, without the fuzzer's progress and the lines that every failure has.
said() { grep -vE '^(fuzz: elapsed: .*|--- FAIL: Fuzz[A-Za-z0-9]+ \([0-9.]+s\)|FAIL|FAIL	.*|exit status 1)$' "$1"; }

grep -rEo --include=*_test.go '^func Fuzz[A-Za-z0-9]+' . | sort | sed 's|/[^/]*_test.go:func | |' >"$work/targets"
while read -r dir target; do
	# Interesting inputs are tried smaller a few times only: Go's default is a minute for each, in which nothing new is tried.
	{
		status=0
		${GO:-go} test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 20x -timeout 0 "$dir" 2>&1 || status=$?
		echo "$status" >"$work/status"
	} </dev/null | tee "$work/log"
	status=$(cat "$work/status")
	[ "$status" != 0 ] || continue
	[ "$(said "$work/log")" = "    context deadline exceeded" ] || exit "$status"
	echo "fuzz: $target found nothing; Go's fuzzer ended late, which it reports as a failure (https://go.dev/issue/75804)"
done <"$work/targets"
