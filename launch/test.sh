#!/usr/bin/env bash
# Sets up, then lint, types, the import contract and the tests. --all: the long tests too. Other arguments go to pytest.
#
# Tests of one process run two at a time; what starts processes of its own, and asks how long they take to notice each
# other's end, has the machine to itself.
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
alone=(tests/dist tests/e2e tests/faults tests/slurm tests/nissa/test_wandb.py tests/launcher/test_launcher.py)
code=0 present=()
"$PYTHON" -m pytest "${select[@]}" -n 2 --dist loadfile "${alone[@]/#/--ignore=}" || code=$?
for path in "${alone[@]}"; do [[ -e "$path" ]] && present+=("$path"); done
"$PYTHON" -m pytest "${select[@]}" "${present[@]}" || code=$?
exit "$code"
