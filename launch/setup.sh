# Makes .venv with everything that esper needs, exactly as pinned in requirements.lock; nothing to do when it is there.
# Called (bash launch/setup.sh) or sourced by the other scripts, from any folder; afterwards $PYTHON is its Python.
# ESPER_PYTHON=/path/to/python chooses the Python that the environment is made with.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

esper_suitable() { # 3.11 to 3.13, able to make an environment
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

esper_find_python() {
    local candidate
    for candidate in ${ESPER_PYTHON:+"$ESPER_PYTHON"} python3 python3.12 python3.11 python3.13 python; do
        if command -v "$candidate" >/dev/null 2>&1 && esper_suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
        if [[ -n "${ESPER_PYTHON:-}" ]]; then
            echo "esper: ESPER_PYTHON=$ESPER_PYTHON: no Python 3.11 to 3.13 with the venv module; name one that is" >&2
            return 1
        fi
    done
    echo "esper: no Python 3.11 to 3.13 with the venv module found; install one (Debian, Ubuntu: apt install" \
        "python3-venv) or name it: ESPER_PYTHON=/path/to/python" >&2
    return 1
}

esper_stamp() { # what the environment depends on
    { echo "$ROOT"; cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml" "$ROOT/setup.py"; } | sha256sum | cut -d' ' -f1
}

esper_pip() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile "$@" || {
        echo "esper: pip could not install $*; its reason stands above (no network? then set PIP_FIND_LINKS)" >&2
        return 1
    }
}

esper_compile() { # on all cores, where pip takes one, and without what is hardly ever imported
    local packages
    packages="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # Some packages ship files for other versions of Python, which do not compile.
    "$PYTHON" -m compileall -q -q -j 0 -x '/(tests?|transformers)/' "$packages" || true
}

esper_setup() {
    local stamp="$ROOT/.venv/.esper-stamp" base
    if [[ -x "$PYTHON" && -f "$stamp" && "$(cat "$stamp")" == "$(esper_stamp)" ]]; then
        return
    fi
    if [[ ! -x "$PYTHON" ]] || ! esper_suitable "$PYTHON"; then
        base="$(esper_find_python)"
        echo "esper: making $ROOT/.venv with $("$base" --version)"
        "$base" -m venv --clear "$ROOT/.venv"
    fi
    echo "esper: installing into $ROOT/.venv (the first time takes some minutes)"
    esper_pip "$(grep -E '^torch==' "$ROOT/requirements.lock")"
    esper_pip -r "$ROOT/requirements.lock"
    esper_pip --no-deps --no-build-isolation -e "$ROOT"
    esper_compile
    esper_stamp >"$stamp"
}

esper_setup
if [[ -r /proc/uptime ]]; then # a script that sources this one becomes the launcher: its start is counted from here
    read -r ESPER_SET_UP _ </proc/uptime
    export ESPER_SET_UP
fi
