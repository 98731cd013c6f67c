#!/usr/bin/env bash
# Sets up, then lint, types, the import contract and the tests. --all: the long tests too. Other arguments go to pytest.
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
"$PYTHON" -m pytest "${select[@]}" "${rest[@]}"
