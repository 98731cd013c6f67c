"""How often luck passes G5 on real text, by how a probe is dealt: `python launch/bench.py gates --parts corpora`.

Three small GPTs, alike but for their seeds, are trained on some documents of a corpus; the others are the *pool*. The
differences between two of them in the loss of a window are a seed's differences as a gate sees them, with whatever
depends on what in real text. Two nulls are made of them:

    mean 0 over the pool    minus the mean over all windows: whoever draws windows at random draws independent ones
    signs by document       and each document with a sign of its own, drawn anew for each life: the mean is 0 over
                            documents in general, and windows of one document depend on each other as strongly as can be

A life draws its probe from the pool, and is judged as in `esper.drill.luck`.
"""

import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.accord.config import GateConfig
from esper.accord.evidence.levels import level_of_birth
from esper.drill.luck import Sample, cut_looks, plan_for, weighed
from esper.kasmina.hosts.gpt import GPT, GPTConfig
from esper.tolaria.data.corpus import STRETCH, standard_library
from esper.tolaria.data.task import Task
from esper.tolaria.data.windows import cut_documents, find_documents

BLOCK = 64
NETS, STEPS, BATCH = 3, 200, 32
LONGEST = 8_000  # bytes read of a document, so that a pool has many
POOL = 12_000  # windows, at most
PROBE = 1024
DOCUMENTS = 40  # of a probe dealt by document

Rng = np.random.Generator
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Differences of each pair of nets on the windows of a pool, [P, N], and the document of each window, [N]."""

    name: str
    differences: Floats
    documents: Ints


def read_corpora() -> dict[str, list[bytes]]:
    """Documents of Python's standard library, and of WikiText-2 where ESPER_DATA names it."""
    sources, _ = standard_library(Path(sysconfig.get_paths()["stdlib"]), 6_000_000)
    found = {"Python sources, by file": sources}
    folder = Path(os.environ.get("ESPER_DATA", ""), "wikitext2")
    if "ESPER_DATA" in os.environ and folder.is_dir():
        texts = [(folder / f"{name}.txt").read_bytes() for name in ("train", "test")]
        found["WikiText-2, by article"] = [one for text in texts for one in find_documents(text, "^ = [^=]")]
    else:
        print("ESPER_DATA names no folder with wikitext2 in it: WikiText-2 is left out", flush=True)
    return found


def train_net(windows: Tensor, seed: int) -> GPT:
    """A small GPT after some hundred steps on windows, uint8 [N, T + 1]."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(dim=48, layers=2, block=BLOCK), vocabulary=256)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,))].long()
        optimizer.zero_grad()
        loss, _ = Task.LANGUAGE.per_sample(net(batch[:, :-1]), batch[:, 1:])
        loss.mean().backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def losses_of(net: GPT, windows: Tensor) -> Floats:
    """Loss of each window in nats, float64 [N]."""
    parts = [Task.LANGUAGE.per_sample(net(w[:, :-1]), w[:, 1:].contiguous())[0] for w in windows.long().split(256)]
    return torch.cat(parts).double().numpy()


def make_pool(name: str, documents: list[bytes]) -> Pool:
    """Trains the nets on a sixth of the documents, and compares them on the others."""
    order = np.random.default_rng(3).permutation(len(documents))
    first, rest = order[: len(documents) // 6], order[len(documents) // 6 :]
    trained, _ = cut_documents([documents[i] for i in first], BLOCK)
    windows, numbers = cut_documents([documents[i][:LONGEST] for i in rest], BLOCK)
    windows, numbers = windows[:POOL], numbers[:POOL]
    losses = [losses_of(train_net(trained, seed), windows) for seed in range(NETS)]
    pairs = [one - other for one, other in itertools.combinations(losses, 2)]
    return Pool(name, np.stack([pair - pair.mean() for pair in pairs]), numbers.numpy())


def correlation_within(differences: Floats, labels: Ints) -> float:
    """Correlation of two samples of one cluster (the intraclass correlation, by analysis of variance)."""
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(numbers, differences) / sizes
    within = ((differences - means[numbers]) ** 2).sum() / (len(labels) - len(sizes))
    between = (sizes * (means - differences.mean()) ** 2).sum() / (len(sizes) - 1)
    size = (len(labels) - (sizes**2).sum() / len(labels)) / (len(sizes) - 1)
    return float((between - within) / (between + (size - 1) * within))


def stretches_of(documents: Ints) -> Ints:
    """Number of the stretch of each window: neighbours of one document, so many that each is full; -1 in none."""
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    place = np.arange(len(documents)) - np.repeat(starts, np.diff(np.append(starts, len(documents))))
    size = np.bincount(documents)[documents]
    full = place // STRETCH < size // STRETCH
    return np.where(full, documents * 10_000 + place // STRETCH, -1)


def deal(how: str, pool: Pool, rng: Rng) -> tuple[Ints, Ints]:
    """A probe's windows, and the cluster that each is counted as."""
    if how == "documents":
        chosen = rng.choice(np.unique(pool.documents), DOCUMENTS, replace=False)
        rows = np.flatnonzero(np.isin(pool.documents, chosen))
        return rows, pool.documents[rows]
    if how == "singly":
        rows = rng.choice(len(pool.documents), PROBE, replace=False)
    else:
        labels = stretches_of(pool.documents)
        chosen = rng.choice(np.unique(labels[labels >= 0]), PROBE // STRETCH, replace=False)
        rows = np.flatnonzero(np.isin(labels, chosen))
    return rows, np.arange(len(rows))


def share(pool: Pool, how: str, lives: int, *, signs: bool) -> float:
    """Share of lives of no effect in which G5 passes at a first birth."""
    gates, rng, passed = GateConfig(), np.random.default_rng([13, *pool.name.encode(), *how.encode(), signs]), 0
    level = level_of_birth(gates.false_share, 1, 0)
    for life in range(lives):
        differences = pool.differences[life % len(pool.differences)]
        if signs:
            differences = differences * rng.choice((-1.0, 1.0), pool.documents.max() + 1)[pool.documents]
        elif rng.random() < 0.5:  # either net may be the one with the seed
            differences = -differences
        rows, clusters = deal(how, pool, rng)
        sample = Sample(differences[rows] / differences.std(), clusters)
        plan = plan_for(sample, gates)
        passed += weighed(cut_looks(sample, plan, rng), plan, gates, level)
    return passed / lives


def corpora(lives: int) -> None:
    """Prints the table: share of lives in percent, by corpus, null and dealing."""
    head = ("differences of two nets", "windows singly, %", "whole documents, %", "stretches of 32 counted singly, %")
    print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|", flush=True)
    notes = []
    for name, documents in read_corpora().items():
        pool = make_pool(name, documents)
        stretches = stretches_of(pool.documents)
        full = stretches >= 0
        by_stretch = [correlation_within(d[full], stretches[full]) for d in pool.differences]
        by_document = [correlation_within(d, pool.documents) for d in pool.differences]
        notes.append(
            f"{name}: {len(pool.documents)} windows of {len(np.unique(pool.documents))} documents; differences "
            f"correlate by {min(by_stretch):.2f} to {max(by_stretch):.2f} within a stretch of 32, by "
            f"{min(by_document):.2f} to {max(by_document):.2f} within a document"
        )
        for signs in (False, True):
            cells = [
                f"{100 * share(pool, how, lives, signs=signs):.2f}" for how in ("singly", "documents", "stretches")
            ]
            null = "signs by document" if signs else "mean 0 over the pool"
            print("|", " | ".join((f"{name}; {null}", *cells)), "|", flush=True)
    print("\n" + "\n".join(notes) + "\n", flush=True)
