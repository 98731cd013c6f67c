"""Measures what evidence for a seed is worth when the host goes on training, on planted cases whose truth is known.

    python launch/baseline.py                                  # all cases, 20 runs each: minutes on one core
    python launch/baseline.py --cases redundant,late --runs 8

Small classifiers of scikit-learn's digits (64 - width - 10) train for a while, a seed joins the hidden layer, and at
four later steps each kind of evidence is asked whether it helps:

    standing     the network without the seed, at once (what a leave-one-out probe reads)
    twin         a copy of the host forked at the birth and trained on the same batches; the same, extrapolated
    continued    copies with and without the seed, after the same further steps on the same batches (two orders); the
                 same, extrapolated to the end of the run; and asked to be more than what the host is still to gain by
                 itself: esper.accord.evidence.lasting
    trend        the host's own loss, extrapolated from before the birth

The truth is measured on held-out samples at the end of the run: the loss of copies without the seed, minus the loss of
copies with it, both trained on from that step, as a mean over eight orders of batches. A seed *passes* where the
evidence is above 3 standard errors (trend: has none) and above ``gates.min_contribution``; extrapolated, where the
lower end of the interval is above it. All runs of a case are trained at once, as stacked matrices.

Shapes: R runs, N samples, B samples of a batch, W hidden units, M units of a seed.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from esper.accord.config import GateConfig
from esper.accord.evidence.lasting import judge_lasting
from esper.tolaria.growth.lasting import lasting_sums

BATCH, LR, DECAY, END = 32, 2e-3, 0.01, 660  # samples, AdamW, optimizer steps of a run after the birth
LOOKS = (110, 220, 330, 440)  # steps after the birth
MARKS = (30, 100)  # further steps of the copies
ORDERS, RAMP = 8, 33  # orders of batches that the truth is a mean over; steps of the alpha ramp
KINDS = (
    "standing",
    "twin",
    "twin, extrapolated",
    "continued",
    "continued, extrapolated",
    "continued, with the rest",
    "trend",
)

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A planted seed.

    Fields:
        kind: of the seed's delta, see `delta`.
        width: W.
        birth: optimizer steps of the host alone.
        rate: learning rate of the seed as a multiple of the host's.
        what: in words.
    """

    kind: str
    width: int
    birth: int
    rate: float
    what: str


CASES = {
    "helps": Case("mlp", 8, 300, 1.0, "helps, and cannot be replaced: an MLP in a narrow host"),
    "input": Case("skip", 4, 300, 1.0, "helps, and cannot be replaced: an MLP of the input past a bottleneck"),
    "late": Case("mlp", 8, 300, 0.1, "helps late: the same at a tenth of the rate"),
    "redundant": Case("lora", 32, 110, 1.0, "adds nothing: low rank behind a linear layer, wide host"),
    "narrow": Case("lora", 8, 110, 1.0, "adds nothing but speed: the same in a narrow host"),
    "overtaken": Case("lora", 8, 30, 4.0, "helps at once; the host would have got there: the same, early and fast"),
    "harmful": Case("noise", 8, 110, 1.0, "hurts, and the host grows used to it: a fixed rough function of the input"),
}


class Digits:
    """scikit-learn's digits, cut in three."""

    def __init__(self) -> None:
        digits = load_digits()
        self.x_N64 = torch.tensor(digits.data / 16.0 - 0.3, dtype=torch.float32)
        self.y_N = torch.tensor(digits.target)
        order = torch.randperm(len(self.y_N), generator=torch.Generator().manual_seed(5))
        self.train, self.probe, self.held = order[:700], order[700:1250], order[1250:]


class Orders:
    """Batches of every run, each in an order of its own."""

    def __init__(self, train: Tensor, runs: int, seed: int) -> None:
        self._train, self._runs = train, runs
        self._generator = torch.Generator().manual_seed(seed)
        self._left_RN = torch.empty(runs, 0, dtype=torch.int64)

    def next(self) -> Tensor:
        """Indices of the next batch, [R, B]."""
        if self._left_RN.shape[1] < BATCH:
            shuffled = [
                self._train[torch.randperm(len(self._train), generator=self._generator)] for _ in range(self._runs)
            ]
            self._left_RN = torch.stack(shuffled)
        batch_RB, self._left_RN = self._left_RN[:, :BATCH], self._left_RN[:, BATCH:]
        return batch_RB


def build_host(runs: int, width: int) -> Weights:
    """Uniform weights as torch's Linear has them, [R, ...]."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, fan_in: int) -> Tensor:
        return (torch.rand(runs, *shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)

    return {
        "w1": draw(64, width, fan_in=64),
        "b1": draw(1, width, fan_in=64),
        "w2": draw(width, 10, fan_in=width),
        "b2": draw(1, 10, fan_in=width),
    }


def build_seed(case: Case, runs: int) -> Weights:
    """Weights of the seeds, near identity at birth, [R, ...]."""
    generator, w = torch.Generator().manual_seed(2), case.width

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(runs, *shape, generator=generator) * std

    if case.kind == "lora":
        return {"down": draw(w, 8, std=1 / math.sqrt(w)), "up": draw(8, w, std=0.1 / math.sqrt(8))}
    inside, m = (w if case.kind == "mlp" else 64), 4 * w
    up = draw(m, w, std=(1.0 if case.kind == "noise" else 0.1) / math.sqrt(m))
    down = draw(inside, m, std=0.5 if case.kind == "noise" else math.sqrt(2 / inside))
    return {"down": down, "bias": torch.zeros(runs, 1, m), "up": up}


def delta(kind: str, seed: Weights, x_RN64: Tensor, h_RNW: Tensor) -> Tensor:
    """What the seed adds, [R, N, W]."""
    if kind == "lora":
        return h_RNW @ seed["down"] @ seed["up"]
    if kind == "noise":  # nothing of it learns
        return torch.sin(6 * (x_RN64 @ seed["down"].detach())) @ seed["up"].detach()
    inside = F.layer_norm(h_RNW, h_RNW.shape[-1:]) if kind == "mlp" else x_RN64
    return F.gelu(inside @ seed["down"] + seed["bias"]) @ seed["up"]


@dataclass(slots=True)
class Nets:
    """R networks, their seeds and AdamW's moments.

    Fields:
        case: what is planted.
        data: the digits.
        host: weights by name.
        seed: likewise; None without one.
        moments: first and second moment, and steps, by name.
    """

    case: Case
    data: Digits
    host: Weights
    seed: Weights | None = None
    moments: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)

    def copies(self, count: int = 1, *, keep: bool = True) -> "Nets":
        """``count`` copies of each network, [R * count, ...], with the seeds or without them."""
        seed = {n: t.repeat_interleave(count, 0) for n, t in self.seed.items()} if keep and self.seed else None
        moments = {
            n: (m.repeat_interleave(count, 0), v.repeat_interleave(count, 0), t)
            for n, (m, v, t) in self.moments.items()
            if keep or n.startswith("host")
        }
        host = {n: t.repeat_interleave(count, 0) for n, t in self.host.items()}
        return Nets(self.case, self.data, host, seed, moments)

    def losses(self, indices: Tensor, alpha: float) -> Tensor:
        """Nats of each sample, [R, N]; ``indices`` are [R, N], or [N] for all networks alike."""
        runs = len(self.host["w1"])
        x, y = self.data.x_N64[indices], self.data.y_N[indices]
        x, y = (x, y) if indices.dim() == 2 else (x.expand(runs, -1, -1), y.expand(runs, -1))
        h = x @ self.host["w1"] + self.host["b1"]
        if self.seed is not None:
            h = h + alpha * delta(self.case.kind, self.seed, x, h)
        logits = F.relu(h) @ self.host["w2"] + self.host["b2"]
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")

    def measure(self, indices: Tensor) -> Tensor:
        """`losses` at alpha 1, without a gradient."""
        with torch.no_grad():
            return self.losses(indices, 1.0)

    def step(self, batch_RB: Tensor, alpha: float = 1.0) -> None:
        """One step of AdamW on each network (Loshchilov and Hutter 2019)."""
        parts = {"host": (self.host, 1.0)} | ({} if self.seed is None else {"seed": (self.seed, self.case.rate)})
        leaves = []
        for weights, _ in parts.values():
            for name in weights:
                weights[name] = weights[name].detach().requires_grad_()
                leaves.append(weights[name])
        grads = iter(torch.autograd.grad(self.losses(batch_RB, alpha).mean(1).sum(), leaves, allow_unused=True))
        for part, (weights, rate) in parts.items():
            for name, weight in weights.items():
                grad = next(grads)
                weights[name] = weight.detach()
                if grad is not None:
                    weights[name] = self._update(f"{part}.{name}", weight.detach(), grad, LR * rate)

    def _update(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
        zero = torch.zeros_like(grad)
        m, v, t = self.moments.get(name, (zero, zero, 0))
        m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad, t + 1
        self.moments[name] = (m, v, t)
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return weight * (1 - lr * DECAY) - lr * step


Evidence = dict[str, tuple[Tensor, Tensor]]
"""Mean and lower end of the interval by kind of evidence, [R] each."""


def interval(difference_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and mean minus 3 standard errors, [R] each."""
    mean_R = difference_RN.mean(1)
    return mean_R, mean_R - 3 * difference_RN.std(1) / math.sqrt(difference_RN.shape[1])


def continue_copies(nets: Nets, seed: int) -> Tensor:
    """Losses of copies with and without the seeds at both marks of two orders: [2 orders, 2 arms, 2 marks, R, N]."""
    orders = []
    for order in (0, 1):
        arms = []
        for keep in (True, False):
            made, batches = nets.copies(keep=keep), Orders(nets.data.train, len(nets.host["w1"]), seed + order)
            marks = []
            for step in range(1, MARKS[1] + 1):
                made.step(batches.next())
                if step in MARKS:
                    marks.append(made.measure(nets.data.probe).double())
            arms.append(torch.stack(marks))
        orders.append(torch.stack(arms))
    return torch.stack(orders)


def extrapolate(first_R: Tensor, last_R: Tensor, spans: float) -> Tensor:
    """A difference ``spans`` spans after its last reading, if it shrinks geometrically; it never grows."""
    ratio_R = (last_R / first_R.clamp_min(1e-9)).clamp(0, 1)
    return torch.where(last_R > 0, last_R * ratio_R**spans, last_R)


def read_evidence(
    nets: Nets, twin: Nets, before: Sequence[tuple[int, Tensor]], since: int, earlier: tuple[int, Tensor] | None
) -> tuple[Evidence, Tensor]:
    """All kinds of evidence at a step; also the twin's difference, for the next call.

    Args:
        nets: with seeds at alpha 1.
        twin: the hosts that were forked at the birth.
        before: step and mean probe loss of the hosts, [R], from before the birth.
        since: steps since the birth.
        earlier: steps since the birth and the twin's difference, [R], of the call before.
    """
    probe, left = nets.data.probe, END - since
    full_RN = nets.measure(probe)
    found = {"standing": interval(nets.copies(keep=False).measure(probe) - full_RN)}
    found["twin"] = interval(twin.measure(probe) - full_RN)
    now_R = found["twin"][0]
    if earlier is not None:
        later_R = extrapolate(earlier[1], now_R, left / (since - earlier[0]))
        found["twin, extrapolated"] = (later_R, torch.minimum(later_R, found["twin"][1]))
    losses = continue_copies(nets, 1000 + since)
    found["continued"] = interval((losses[:, 1, 1] - losses[:, 0, 1]).mean(0))
    ends = []
    for run in range(len(full_RN)):
        sums = lasting_sums([(order[0, :, run], order[1, :, run]) for order in losses])
        step, total = nets.case.birth + since, nets.case.birth + END
        lasting = judge_lasting(sums, tick=0, step=step, total=total, marks=MARKS, ahead=left, se=1.64)
        assert lasting is not None
        ends.append((lasting.expected, lasting.lower, -math.inf if lasting.is_early else lasting.lower))
    expected_R, lower_R, late_R = torch.tensor(ends).T
    found["continued, extrapolated"] = (expected_R, lower_R)
    found["continued, with the rest"] = (expected_R, late_R)
    steps = torch.tensor([float(step) for step, _ in before])
    losses_SR = torch.stack([loss for _, loss in before])
    recent = steps >= steps[-1] - min(since, int(steps[-1]))
    steps, losses_SR = steps[recent], losses_SR[recent]
    middle = len(steps) // 2
    fall1_R, fall2_R = (losses_SR[0] - losses_SR[middle]), (losses_SR[middle] - losses_SR[-1])
    q_R = (fall2_R.clamp_min(1e-6) / fall1_R.clamp_min(1e-6)).clamp(0.01, 0.99)
    spans_gone = since / float(steps[-1] - steps[middle])
    fallen_R = fall2_R.clamp_min(1e-6) * q_R * (1 - q_R**spans_gone) / (1 - q_R)
    predicted_R = losses_SR[-1] - fallen_R - full_RN.mean(1)
    found["trend"] = (predicted_R, predicted_R)
    return found, now_R


def measure_truth(nets: Nets, since: int) -> Tensor:
    """Held-out help at the end of the run, [R]: copies without the seed minus copies with it, over `ORDERS` orders."""
    runs = len(nets.host["w1"])
    ends = []
    for keep in (False, True):
        made, batches = nets.copies(ORDERS, keep=keep), Orders(nets.data.train, runs * ORDERS, 5000 + since)
        for _ in range(END - since):
            made.step(batches.next())
        ends.append(made.measure(nets.data.held).mean(1).view(runs, ORDERS).mean(1))
    return ends[0] - ends[1]


def run_case(case: Case, runs: int) -> list[tuple[Evidence, Tensor]]:
    """Evidence and truth at each step of `LOOKS`."""
    data = Digits()
    nets = Nets(case, data, build_host(runs, case.width))
    batches, before = Orders(data.train, runs, 7), []
    for step in range(case.birth + 1):
        if step % 10 == 0 or step == case.birth:
            before.append((step, nets.measure(data.probe).mean(1)))
        if step < case.birth:
            nets.step(batches.next())
    twin = nets.copies()
    nets.seed = build_seed(case, runs)
    rows, earlier = [], None
    for since in range(1, LOOKS[-1] + 1):
        batch_RB = batches.next()
        nets.step(batch_RB, min(1.0, since / RAMP))
        twin.step(batch_RB)
        if since in LOOKS:
            found, now_R = read_evidence(nets, twin, before, since, earlier)
            earlier = (since, now_R)
            rows.append((found, measure_truth(nets, since)))
    return rows


def main() -> None:
    """Prints a row for each case and look: the truth, and the share of runs that pass by each kind of evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    unknown = [name for name in args.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    least = GateConfig().min_contribution
    table = Table("case", "step", "truth, nats", *KINDS, title=f"share of {args.runs} runs that pass, %")
    for name in args.cases.split(","):
        for since, (found, truth_R) in zip(LOOKS, run_case(CASES[name], args.runs), strict=True):
            truth = truth_R.tolist()
            error = statistics.stdev(truth) / math.sqrt(len(truth)) if len(truth) > 1 else math.nan
            shares = [
                f"{100 * float((torch.minimum(*found[kind]) >= least).float().mean()):.0f}" if kind in found else ""
                for kind in KINDS
            ]
            table.add_row(name, str(since), f"{statistics.mean(truth):+.4f} ± {error:.4f}", *shares)
    console = Console(width=160)
    console.print(table)
    for name in args.cases.split(","):
        console.print(f"{name}: {CASES[name].what}")


if __name__ == "__main__":
    main()
