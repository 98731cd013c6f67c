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

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.configs import RecallConfig
from esper.tolaria.data.hashing import hash_positions
from esper.tolaria.data.noise import with_label_noise
from esper.tolaria.data.parts import Bundle, Part, make_bundle
from esper.tolaria.data.task import Task

BLANK = 0  # the target where nothing is asked; no input has it


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
