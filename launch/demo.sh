#!/usr/bin/env bash
# Sets up, then grows a network on two CPU ranks on real handwritten digits; then a trained network meets new data, with
# growth and without, on two seeds. Overrides of the first part may follow: seed=2 ...
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/launch/demo.py" "$@"
