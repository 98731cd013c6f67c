#!/usr/bin/env bash
# Sets up, then grows a network on two CPU ranks on real handwritten digits, and runs the same without growth beside it.
# Overrides may follow: seed=2 ...
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/launch/demo.py" "$@"
