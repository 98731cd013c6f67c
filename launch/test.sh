#!/usr/bin/env bash
# Sets up, then lint, types, the import contract and the tests. --all: the long tests too. Other arguments go to pytest.
#
# Three processes share the test files on two cores, since one of them often waits for a timeout or a scheduler: long
# files first, while types are checked beside them. The twenty slowest tests are shown, then what was found in the types.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1
# Compiled once: some hundred processes import esper, and each would compile it again where the environment forbids this.
unset PYTHONDONTWRITEBYTECODE

select=(-m "not slow")
rest=()
for argument in "$@"; do
    if [[ "$argument" == --all ]]; then select=(); else rest+=("$argument"); fi
done

bin="$ROOT/.venv/bin"
if [[ ${#rest[@]} -eq 0 ]]; then
    found="$(mktemp)"
    "$bin/mypy" >"$found" 2>&1 &
    types=$!
    trap 'kill "$types" 2>/dev/null || true; rm -f "$found"' EXIT
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-logo
if [[ ${#rest[@]} -gt 0 ]]; then
    "$bin/mypy"
    exec "$PYTHON" -m pytest "${select[@]}" "${rest[@]}"
fi
code=0
"$PYTHON" -m pytest "${select[@]}" --durations=20 -n 3 --dist loadfile --no-loadscope-reorder || code=$?
wait "$types" || code=$((code ? code : $?))
cat "$found"
exit "$code"
