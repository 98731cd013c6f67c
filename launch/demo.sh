#!/usr/bin/env bash
# Sets up, then grows a network on two CPU ranks on real handwritten digits. Overrides may follow: seed=2 ...
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/launch/train.py" experiment=demo "$@"
