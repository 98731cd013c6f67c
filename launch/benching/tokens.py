"""A corpus larger than what a rank may take: its own memory on 4 GiB of tokens, and its wait for them.

Two runs of one small GPT on two ranks, alike but for the corpus: one of 4 GiB, made for it and removed again, and one
so small that what is left is the model, torch, and the run. The difference of their peaks of RssAnon is what a corpus
takes of a rank's own memory (mapped pages of files are the system's).
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from esper.nissa.reading import read_events

HERE = Path(__file__).parents[2]
GIB, MIB = 2**30, 2**20
RANKS, VOCABULARY, BLOCK, STEPS = 2, 4096, 256, 40
CORPORA = {"small": (1, 16 * MIB), "large": (4, GIB)}  # shards, and bytes of each
PIECE = 32 * MIB


def write_corpus(folder: Path, shards: int, size: int) -> None:
    """Shards of uint16: one piece of skewed random tokens, rotated differently each time that it is written."""
    rng = np.random.default_rng(0)
    piece = (VOCABULARY * rng.random(min(PIECE, size) // 2) ** 3).astype("<u2")
    (folder / "train").mkdir(parents=True)
    for shard in range(shards):
        with (folder / "train" / f"{shard}.bin").open("wb") as file:
            for _ in range(size // piece.nbytes):
                file.write(np.roll(piece, int(rng.integers(len(piece)))).tobytes())


def _anonymous(mark: str) -> dict[str, int]:
    """Bytes of anonymous memory of each rank that carries a mark in its environment."""
    found = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = process.joinpath("environ").read_bytes().split(b"\0")
            if mark.encode() not in words:
                continue
            known = dict(word.split(b"=", 1) for word in words if b"=" in word)
            if b"RANK" not in known:
                continue
            for line in process.joinpath("status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    rank = known[b"RANK"].decode()
                    found[rank] = max(found.get(rank, 0), 1024 * int(line.split()[1]))
        except OSError:  # it has ended
            continue
    return found


def _run(corpus: Path, run: Path) -> tuple[dict[str, int], float]:
    """Peak of anonymous memory by rank, and the median share of a tick's steps that rank 0 waited for data."""
    settings = [
        "host=gpt",
        "host.dim=128",
        "host.layers=4",
        f"host.block={BLOCK}",
        "data=tokens",
        f"data.root={corpus}",
        f"data.vocabulary={VOCABULARY}",
        f"data.block={BLOCK}",
        "trainer=language",
        "trainer.batch=16",
        "trainer.eval_batch=32",
        f"trainer.steps={STEPS}",
        "optim.warmup_steps=2",
        "control.every=10",
        "slots.incubation=immediate",
        "gates.evidence=observe",
        "telemetry.wandb.mode=disabled",
        "telemetry.console=off",
        f"run.dir={run}",
        "launch=prepare",
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(HERE / "launch" / "train.py"), *settings], check=True, env=environment)
    mark = f"ESPER_MEASURED={uuid.uuid4().hex}"
    name, value = mark.split("=")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    worker = ["-m", "esper.worker", str(run / "config.yaml")]
    peaks: dict[str, int] = {}
    with subprocess.Popen([*torchrun, *worker], env={**environment, name: value}) as process:
        while process.poll() is None:
            for rank, size in _anonymous(mark).items():
                peaks[rank] = max(peaks.get(rank, 0), size)
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    ticks = [record["payload"] for record in read_events(run / "events.jsonl") if record["kind"] == "tick"]
    waits = [tick["data_ms"] / tick["steps_ms"] for tick in ticks]
    return peaks, statistics.median(waits)


def measure_tokens(rounds: int) -> None:
    """Prints both runs; ``rounds`` is how often each is run."""
    for _ in range(rounds):
        found = {}
        for name, (shards, size) in CORPORA.items():
            folder = Path(tempfile.mkdtemp(prefix="esper-tokens-"))
            try:
                write_corpus(folder / "corpus", shards, size)
                peaks, wait = _run(folder / "corpus", folder / "run")
            finally:
                shutil.rmtree(folder)
            found[name] = max(peaks.values())
            each = ", ".join(f"{peaks[rank] / MIB:,.0f}" for rank in sorted(peaks))
            print(
                f"{shards * size / GIB:.2f} GiB of tokens: RssAnon of the ranks at its peak {each} MiB; "
                f"{100 * wait:.2f} % of the steps' time is waiting for data",
                flush=True,
            )
        print(f"own memory of a rank for the corpus: {(found['large'] - found['small']) / MIB:,.0f} MiB", flush=True)


PARTS = {"memory": measure_tokens}
