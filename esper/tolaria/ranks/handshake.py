"""The start handshake: all ranks must run the same program on the same kind of machine in the same run directory.

Births and sums differ between CPU capabilities, thread counts and torch versions, so unequal ranks are refused. This
takes one all-reduce(MAX) of pairs (d, -d); only if a field differs, its values are gathered and shown.
"""

import functools
import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from esper.leyline.errors import LockstepError
from esper.leyline.files import package_folder
from esper.leyline.plain import digest62
from esper.tolaria.ranks.sources import describe_sources, differing_names, split_word
from esper.tolaria.ranks.world import World

WIDEST = 8192  # bytes of a value that travel at most for a diagnosis
SHOWN = 96  # characters of a value in an error at most

COMPUTED = (
    "weights and inputs are equal, what is computed is not: look for another copy of the model's code, another version "
    "of a library, another processor, or a setting of torch (tf32, cudnn) on these hosts"
)

# Advice to the user on a field that differs, by the beginning of its name.
ADVICE = {
    "run directory": "RUN must be on a file system that all ranks share",
    "config": "start all ranks with the same RUN/config.yaml",
    "order to the breaker": "RUN/breaker.json is not the same for all ranks (yet); give the order again",
    "teacher": "the teacher must be the same on every host, and built alike by every rank",
    "probe": "probe= must give the same samples on every rank; a random augmentation draws from torch's, numpy's or "
    "random's global generator, or is left out of the probe",
    "validation": "validation= must give the same samples on every rank, without augmentation",
    "data": "use the same files on every host",
    "registry": "install the same blueprint packages on every host",
    "ema": "call session.ema(decay) on every rank alike, at the same step",
    "threads": "set world.threads, or OMP_NUM_THREADS, alike on every host",
    "output of": COMPUTED,
    "gradients of": COMPUTED,
}


def code_digest() -> str:
    """BLAKE2b over the package's own source files, as they were when first asked for: what runs was loaded before."""
    return _digest_of(package_folder())


@functools.cache
def _digest_of(root: Path) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        hasher.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def describe_code(modules: Iterable[str]) -> str:
    """The field ``code``: the digest of esper's sources, and a word for each source of the user's own.

    Args:
        modules: names of imported modules of the user's own.
    """
    return f"{code_digest()} {describe_sources(modules)}".rstrip()


def machine_fields(device: torch.device) -> dict[str, str]:
    """The properties of the machine on which sums and births depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "device": name,
        "threads": str(torch.get_num_threads()),
    }


def _pick_differing(values: list[str]) -> list[str]:
    """Short values unchanged; of long values, which are lists of words, the words that not every rank has."""
    if max(map(len, values)) <= SHOWN:
        return values
    rows = [value.split() for value in values]
    common = set.intersection(*map(set, rows))
    left = [" ".join(word for word in row if word not in common) for row in rows]
    return [(text if len(text) <= SHOWN else f"{text[:SHOWN]}...") or "nothing besides" for text in left]


def _is_computed(name: str) -> bool:
    """Whether a field comes from `esper.tolaria.ranks.computed`."""
    return name.startswith(("output of", "gradients of"))


def _show(values: Sequence[str]) -> str:
    return ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))


def _advise(name: str) -> str:
    return next((f" ({advice})" for key, advice in ADVICE.items() if name.startswith(key)), "")


def _compare_code(world: World, text: str) -> list[str]:
    """The part of an error that says whose code differs; none if ranks have only imported more than others."""
    texts = [raw.decode() for raw in world.gather_bytes(text.encode(), what="diagnosis")]
    differing = differing_names(texts)
    if not differing:
        return []
    rows = [[word for word in text.split() if split_word(word)[0] in differing] for text in texts]
    own = [name for name in differing if name]
    advice = [] if "" not in differing else ["install the same version of esper on every host"]
    if own:
        names = ", ".join(own[:5]) + (", ..." if len(own) > 5 else "")
        advice.append(
            f"the source of {names} is not the same on every host; bring one copy of your code to all of them"
        )
    return [f"code: {_show(_pick_differing([' '.join(row) for row in rows]))} ({'; '.join(advice)})"]


def shake_hands(world: World, fields: Mapping[str, str]) -> None:
    """Compares named values over all ranks.

    Args:
        world: the ranks.
        fields: name -> value as text, with the same names on every rank. Of a long value, which is a list of words, an
            error shows only the words that differ.

    Raises:
        LockstepError: names every field that differs, the ranks, and their values; every rank raises the same text.
    """
    names = sorted(fields)
    row = []
    for name in names:
        digest = digest62(fields[name])
        row += [digest, -digest]
    vector = torch.tensor([*row, len(names), -len(names)], dtype=torch.int64)
    agreed = world.all_reduce(vector, dist.ReduceOp.MAX, what="handshake").tolist()
    parts = []
    differing = [name for index, name in enumerate(names) if agreed[2 * index] != -agreed[2 * index + 1]]
    if any(name != "code" and not _is_computed(name) for name in differing):  # then computing otherwise is no wonder
        differing = [name for name in differing if not _is_computed(name)]
    for name in differing:
        if name == "code":
            parts += _compare_code(world, fields[name])
            continue
        values = _pick_differing(world.gather_text(fields[name], what="diagnosis", width=WIDEST))
        parts.append(f"{name}: {_show(values)}{_advise(name)}")
    if parts:
        raise LockstepError("ranks are unequal: " + "; ".join(parts))


def newest_valid_everywhere(world: World, steps: Sequence[int], valid: Callable[[int], bool]) -> int | None:
    """The newest step whose checkpoint every rank has verified; None if there is none.

    Each rank verifies newest first and stops at the first valid one; if another rank is further back, it goes on from
    there. Reading may take long, so the all-reduce runs on the group with the longer limit.

    Args:
        world: the ranks.
        steps: those that this rank sees, newest first.
        valid: whether the checkpoint of a step is valid on this rank.
    """
    bound = 2**62
    while True:
        newest = next((step for step in steps if step <= bound and valid(step)), -1)
        pair = torch.tensor([newest, -newest], dtype=torch.int64)
        agreed = world.all_reduce(pair, dist.ReduceOp.MIN, what="choice of checkpoint", on="default").tolist()
        low, high = agreed[0], -agreed[1]
        if low < 0:
            return None
        if low == high:
            return int(low)
        bound = low
