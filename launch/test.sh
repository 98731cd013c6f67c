#!/usr/bin/env bash
# Sets up, then lint, types, the import contract and the tests. --all: the long tests too. Other arguments go to pytest.
#
# Types are checked while the tests are collected, which finds what cannot be imported and compiles the rest. Then two
# processes share the test files, long ones first. The twenty slowest tests are shown.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1

select=(-m "not slow")
rest=()
for argument in "$@"; do
    if [[ "$argument" == --all ]]; then select=(); else rest+=("$argument"); fi
done

bin="$ROOT/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-logo
if [[ ${#rest[@]} -gt 0 ]]; then
    "$bin/mypy"
    exec "$PYTHON" -m pytest "${select[@]}" "${rest[@]}"
fi
"$bin/mypy" &
types=$!
collected="$("$PYTHON" -m pytest "${select[@]}" --collect-only -qq 2>&1)" || {
    echo "$collected"
    wait "$types"
    exit 1
}
wait "$types"
exec "$PYTHON" -m pytest "${select[@]}" --durations=20 -n 2 --dist loadfile --no-loadscope-reorder
