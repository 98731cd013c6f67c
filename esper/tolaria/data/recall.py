"""Multi-hop recall: look-ups that lead from key to key to a value, in a sequence of links in random order.

    links      3>7  1>4  4=v2  7=v5 ...     one token each: a key leads to another key, or to a value
    questions  1 4 3 ...                    follow the links from 1: over 4 to v2; from 4: to v2
    targets    blank at every link's place; at a question's place the value at the end of its chain

A question asks from any place of a chain, so one needs as many look-ups as there are links left, up to ``hops``.

Each sample has links and values of its own, so nothing can be learned by heart: the answer is in the sequence, and what
is learned is to look it up. Whoever follows the links has loss 0; whoever does not read them can only guess among the
values, and `RecallConfig.chance` is the loss of that. One hop is associative recall, which one layer of attention can
do; with more hops a look-up needs what another one found, so attention must follow attention (k-hop in Sanford, Hsu,
Telgarsky 2024, "Transformers, parallel computation, and logarithmic depth"). So with many keys a host that is too
shallow gains little from more time, and depth that is grown into it helps late, when the look-up has been learned. Few
keys are no such test: one layer can learn all ways in which a handful of links can be read.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.leyline.fields import Checks
from esper.tolaria.data.hashing import hash_positions
from esper.tolaria.data.noise import with_label_noise
from esper.tolaria.data.parts import Bundle, Part, make_bundle
from esper.tolaria.data.registry import DataConfig, register
from esper.tolaria.data.task import Task

BLANK = 0  # the target where nothing is asked; no input has it


@dataclass(kw_only=True, slots=True)
class RecallConfig(DataConfig):
    """Look-ups that lead from key to key to a value; made by a formula, of any length and number."""

    kind: str = "recall"
    """Registered name of this kind: ``recall``."""

    hops: int = 2
    """Links of a chain: look-ups from its first key to its value."""

    chains: int = 3
    """Chains of links in a sample, each with a value of its own."""

    values: int = 4
    """Values that a chain may end in, each as likely as the others."""

    keys: int = 6
    """Keys there are; at least ``hops`` x ``chains``, which a sample uses, each once."""

    questions: int = 6
    """Questions at the end of a sample; each asks from a key drawn at random."""

    train: int = 4096
    """Samples in the training part."""

    validation: int = 256
    """Samples in the validation part."""

    probe: int = 512
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 512
    """Samples in the test part."""

    label_noise: float = 0.0
    """Share of the training answers that are wrong, 0 to 1."""

    @property
    def length(self) -> int:
        """Tokens of a sample: one for each link and each question."""
        return self.hops * self.chains + self.questions

    @property
    def vocabulary(self) -> int:
        """Tokens there are: the blank, the values, the keys, links from key to key, links from key to value."""
        return 1 + (self.values + self.keys) * (1 + self.keys)

    @property
    def chance(self) -> float:
        """Loss, in nats per sample, of whoever knows everything but does not read the links."""
        return self.questions / self.length * math.log(self.values)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            for name in ("hops", "chains", "questions"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("values", self.values >= 2, "must be >= 2")
            used = self.hops * self.chains
            check("keys", self.keys >= used, f"must be >= {used}, data.hops x data.chains")
            for name in ("train", "test"):
                check(name, getattr(self, name) >= 2, "samples, must be >= 2")
            check("label_noise", 0 <= self.label_noise <= 1, "share of the training answers, must be 0 to 1")


class RecallPart(Part):
    """Sequences of tokens and the answers asked for.

    Args:
        tokens: int16 [N, T].
        answers: int16 [N, T], `BLANK` where nothing is asked.
    """

    def __init__(self, tokens: Tensor, answers: Tensor) -> None:
        self._tokens, self._answers = tokens, answers

    def __len__(self) -> int:
        return len(self._tokens)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`; x and y are int64 [N, T]."""
        return self._tokens[indices].to(torch.int64), self._answers[indices].to(torch.int64)

    def content(self) -> tuple[Tensor, ...]:
        """Tokens and answers."""
        return self._tokens, self._answers


def make_samples(config: RecallConfig, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples ``first`` to ``first + count`` of an endless series, a pure function of the split seed and their numbers.

    Returns:
        tokens and answers, int16 [count, T].
    """
    places = torch.arange(first, first + count)

    def draws(what: str, each: int) -> np.ndarray:
        """Uniform 64-bit numbers [count, each]."""
        at = (places[:, None] * each + torch.arange(each)).flatten()
        return hash_positions(at, "recall", what, config.split_seed).reshape(count, each)

    links, ways = config.hops * config.chains, config.values + config.keys
    order = np.argsort(draws("keys", config.keys), axis=1, kind="stable")[:, :links]
    chains = order.reshape(count, config.chains, config.hops)  # the keys of each chain, from its head
    ends = (draws("values", config.chains) % np.uint64(config.values)).astype(np.int64)
    targets = np.concatenate([config.values + chains[:, :, 1:], ends[:, :, None]], axis=2)  # where each key leads
    tokens = (1 + ways + chains * ways + targets).reshape(count, links)
    shuffle = np.argsort(draws("links", links), axis=1, kind="stable")
    shown = np.take_along_axis(tokens, shuffle, axis=1)
    asked = (draws("questions", config.questions) % np.uint64(links)).astype(np.int64)
    heads = 1 + config.values + np.take_along_axis(order, asked, axis=1)
    found = 1 + np.take_along_axis(ends, asked // config.hops, axis=1)
    answers = np.concatenate([np.full_like(shown, BLANK), found], axis=1)
    whole = np.concatenate([shown, heads], axis=1)
    return torch.from_numpy(whole.astype(np.int16)), torch.from_numpy(answers.astype(np.int16))


def follow_links(tokens: Tensor, config: RecallConfig) -> Tensor:
    """The answers by looking them up, int64 [N, T]: what a perfect network says."""
    links, ways = config.hops * config.chains, config.values + config.keys
    link = tokens[:, :links].long() - 1 - ways
    leads = torch.zeros(len(tokens), 1 + ways, dtype=torch.int64)
    leads.scatter_(1, 1 + config.values + link // ways, 1 + link % ways)
    at = tokens[:, links:].long()
    for _ in range(config.hops):
        at = torch.where(at > config.values, leads.gather(1, at), at)
    return torch.cat([torch.full((len(tokens), links), BLANK), at], 1)


@register(RecallConfig)
def load_recall(config: RecallConfig) -> Bundle:
    """Makes the samples; x and y are int64 [N, T]. No sequence is in two parts, nor twice in one.

    Raises:
        DataError: there are too few different sequences.
    """
    sizes = {"test": config.test, "validation": config.validation, "probe": config.probe, "train": config.train}
    wanted = made = sum(sizes.values())
    firsts = np.zeros(0, dtype=np.int64)
    while len(firsts) < wanted and made < 16 * wanted:
        made *= 2
        tokens, answers = make_samples(config, 0, made)
        firsts = np.sort(np.unique(tokens.numpy(), axis=0, return_index=True)[1])
    if len(firsts) < wanted:
        raise DataError(
            f"data=recall: of {made} sequences {len(firsts)} differ, and the parts need {wanted}; make the "
            "parts smaller, or data.keys, data.chains or data.questions larger"
        )
    rows = dict(zip(sizes, torch.from_numpy(firsts[:wanted]).split([*sizes.values()]), strict=True))
    asked = answers[rows["train"]]  # a copy
    noisy = with_label_noise(
        asked[asked != BLANK].long() - 1, config.label_noise, classes=config.values, split_seed=config.split_seed
    )
    asked[asked != BLANK] = 1 + noisy.to(asked.dtype)
    targets = {name: answers[index] for name, index in rows.items()} | {"train": asked}
    return make_bundle(
        name=config.kind,
        task=Task.LANGUAGE,
        input_shape=(config.length,),
        classes=config.vocabulary,
        parts={name: RecallPart(tokens[index], targets[name]) for name, index in rows.items()},
        record={"files": [], "chance": config.chance},
    )
