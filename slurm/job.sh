#!/usr/bin/env bash
# One attempt at a run inside a Slurm job: bash job.sh RUN [overrides]. The batch scripts beside this file end with it.
# The first attempt composes the settings, once and on this host; every later one resumes RUN as it is. If the first
# override is the word "resume", so does the first attempt, and the others are changes: resume trainer.steps=2000.

set -uo pipefail
run=$1
shift
python=${ESPER_PYTHON:-$ROOT/.venv/bin/python}
if [[ "${1:-}" == resume ]]; then # the changes of a resume may be repeated after a requeue
    words=(resume "$run" "${@:2}")
elif [[ -f "$run/config.yaml" ]]; then
    words=(resume "$run")
else
    words=(train "run.dir=$run" "world.nnodes=$SLURM_JOB_NUM_NODES" world.rdzv_endpoint=slurm "$@")
fi

# Slurm warns only this shell (--signal=B:USR1@seconds). The launcher may still be starting and then misses a signal, so
# the signal is repeated until the launcher has ended; to the launcher, repetitions are one signal.
trap : USR1 TERM
(
    trap '' USR1 TERM # until the launcher has installed its own handlers
    exec "$python" -m esper.cli "${words[@]}"
) &
launcher=$!
wait "$launcher"
code=$?
if kill -0 "$launcher" 2>/dev/null; then # a signal ended the wait
    while kill -USR1 "$launcher" 2>/dev/null; do sleep 1; done
    wait "$launcher"
    code=$?
fi
if ((code == 75)); then # stopped with a checkpoint; after a requeue Slurm ends this script at once
    "$python" -m esper.cli requeue "$run"
fi
exit "$code"
