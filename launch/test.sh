#!/usr/bin/env bash
# Sets up, then lint, types, the import contract and the tests. --all: the long tests too. Other arguments go to pytest.
#
# Test files run two at a time, long ones first. Tests that ask how soon processes notice each other's end, or how long
# wandb keeps a run waiting, have the machine to themselves afterwards. The twenty slowest of each part are shown.
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
"$bin/mypy"
"$bin/lint-imports" --no-logo
if [[ ${#rest[@]} -gt 0 ]]; then
    exec "$PYTHON" -m pytest "${select[@]}" "${rest[@]}"
fi
alone=(tests/faults tests/dist/test_lockstep_lost.py tests/dist/test_two_hosts.py tests/nissa/test_wandb.py)
select+=(--durations=20)
code=0
"$PYTHON" -m pytest "${select[@]}" -n 2 --dist loadfile --no-loadscope-reorder "${alone[@]/#/--ignore=}" || code=$?
"$PYTHON" -m pytest "${select[@]}" "${alone[@]}" || code=$?
exit "$code"
