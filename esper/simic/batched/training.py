"""Optimizer steps of many nets together: forward with shadows, one backward, one judged step.

The loss of all lanes is summed, and no lane's loss depends on another's weights, so each net's gradient is its own.

Shapes: L lanes, of which the first N are the nets' own forwards; B samples; R rows of weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.slots.grown import HOST
from esper.leyline.alpha import Operator
from esper.simic.batched.data import Pool, padded
from esper.simic.batched.lanes import Lane, Plan, make_plan
from esper.simic.batched.net import Net
from esper.simic.batched.network import Listener, Network, margin
from esper.simic.batched.stepping import Bools, Stepper, rate_of_seed
from esper.simic.batched.weights import Weights


def per_sample(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and share of correct answers of each sample, [L, B]; a sequence's are means over its positions.

    Args:
        logits: [L, B, K] or [L, B, T, V].
        target: [L, B] or [L, B, T].
    """
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    correct = (logits.detach().argmax(-1) == target).to(loss.dtype)
    return (loss, correct) if target.ndim == 2 else (loss.mean(2), correct.mean(2))


def asks(lane: Lane, slot: str) -> bool:
    """Whether a lane's seat in a slot asks for class logits."""
    return lane.seats[slot].uses(Operator.CONFIDENCE)


def confidence_of(network: Network, lanes: Sequence[Lane], weights: Weights, x: Tensor) -> Tensor | None:
    """g of CONFIDENCE, by the nets without the seeds that ask for it; None if none asks.

    Args:
        network: of all nets.
        lanes: what is computed.
        weights: of all nets.
        x: their samples, [B * L, ...], in which the lanes change fastest.

    Returns:
        [L, B]; NaN in lanes without such a seed.
    """
    asking = [index for index, lane in enumerate(lanes) if any(asks(lane, slot) for slot in lane.seats)]
    if not asking:
        return None
    without = []
    for lane in (lanes[index] for index in asking):
        without.append(Lane(lane.net, {slot: seat for slot, seat in lane.seats.items() if not asks(lane, slot)}))
    x = x.unflatten(0, (-1, len(lanes)))
    found = torch.full((len(lanes), len(x)), torch.nan, dtype=weights.dtype, device=weights.device)
    with torch.no_grad():
        found[asking] = margin(network.run(make_plan(without, weights), x[:, asking].flatten(0, 1)))
    return found


class Tallies(Listener):
    """Counts what a training forward shows, for the nets' own forwards alone.

    Args:
        nets: in the order of their lanes.
        weights_NB: 1 for a sample, 0 for one that fills up.
        lanes_axis: axis of the lanes in a feature.
    """

    def __init__(self, nets: Sequence[Net], weights_NB: Tensor, lanes_axis: int) -> None:
        self.nets, self.weights, self.axis = nets, weights_NB.double(), lanes_axis
        self._listening: dict[str, list[int]] = {}
        for lane, net in enumerate(nets):
            for entry in net.state.slots:
                if entry.staged is not None:
                    self._listening.setdefault(entry.slot, []).append(lane)

    def hear(self, slot: str, feature: Tensor) -> None:
        """Adds up the features' mean squares where a seed waits."""
        lanes = self._listening.get(slot)
        if lanes is None:
            return
        with torch.no_grad():
            at = torch.tensor(lanes, device=feature.device)
            squares = feature.detach().index_select(self.axis, at).float().square().flatten(2).mean(2)
            squares_nB = squares.mT if self.axis else squares
            w = self.weights[at]
            sums = torch.stack([w.sum(1), (w * squares_nB).sum(1)], 1).tolist()
        for lane, (count, total) in zip(lanes, sums, strict=True):
            heard = self.nets[lane].heard[slot]
            heard[0] += count
            heard[1] += total

    def tally(self, slot: str, lanes: Tensor, g: Tensor) -> None:
        """Adds up g_eff."""
        own = lanes < len(self.nets)
        at, g = lanes[own], g[own]
        w = self.weights[at]
        sums = torch.stack([w.sum(1), (w * g).sum(1), (w * g * g).sum(1)], 1).tolist()
        for lane, row in zip(at.tolist(), sums, strict=True):
            tally = self.nets[lane].gates[slot]
            for place, value in enumerate(row):
                tally[place] += value


class Training:
    """Steps nets.

    Args:
        network: of all of them.
        weights: of all of them.
        stepper: applies gradients.
        pool: the training parts.
        places: number of nets.
    """

    def __init__(self, network: Network, weights: Weights, stepper: Stepper, pool: Pool, places: int) -> None:
        self.network, self.weights, self.stepper, self.pool = network, weights, stepper, pool
        self.sums = torch.zeros(places, 5, dtype=torch.float64, device=weights.device)
        self._plan: tuple[list[Lane], Plan] | None = None
        self._learning: Bools | None = None

    def forget(self) -> None:
        """Forgets what followed from the records; after each change of one."""
        self._plan = self._learning = None

    def step(self, nets: Sequence[Net]) -> None:
        """One optimizer step of these nets, each at its own place in its own run."""
        own = [net.training_lane(net.step) for net in nets]
        shadows = [lane for net in nets for lane in net.shadow_lanes(net.step)]
        plan = self._plan_of([*own, *shadows])
        batches = [net.recipe.indices(net.step) for net in nets]
        indices_NB, counted = padded(batches)
        dtype, device = self.weights.dtype, self.weights.device
        w_NB = torch.ones(indices_NB.shape, dtype=dtype) if counted is None else counted.to(dtype)
        w_NB = w_NB.to(device)
        places = plan.nets[: len(nets)]
        lanes_N = {net.place: lane for lane, net in enumerate(nets)}
        repeats = [*range(len(nets)), *(lanes_N[lane.net] for lane in shadows)]
        x, y = self.pool.gather(plan.nets, (indices_NB[repeats] if shadows else indices_NB).to(device))
        of_own = x.unflatten(0, (-1, len(repeats)))[:, : len(nets)].flatten(0, 1)
        confidence = confidence_of(self.network, own, self.weights, of_own)
        if confidence is not None and shadows:
            confidence = confidence[repeats]
        leaf = self.weights.flat.detach().requires_grad_()
        listener = Tallies(nets, w_NB, self.network.form.lanes_axis)
        logits = self.network.run(plan, x, leaf=leaf, confidence=confidence, listener=listener)
        loss_LB, correct_LB = per_sample(logits, y)
        self._add(places, loss_LB[: len(nets)].detach(), correct_LB[: len(nets)], w_NB)
        scale_N = torch.tensor([1.0 / len(batch) for batch in batches], dtype=dtype, device=device)
        factor_LB = (w_NB * scale_N[:, None])[repeats] if shadows else w_NB * scale_N[:, None]
        (grad,) = torch.autograd.grad((loss_LB * factor_LB).sum(), leaf)
        self._apply(nets, grad)

    def _plan_of(self, lanes: list[Lane]) -> Plan:
        if self._plan is None or self._plan[0] != lanes:
            self._plan = lanes, make_plan(lanes, self.weights)
        return self._plan[1]

    def _add(self, places: Tensor, loss: Tensor, correct: Tensor, weights: Tensor) -> None:
        loss, correct, weights = loss.double(), correct.double(), weights.double()
        finite = torch.isfinite(loss)
        taken = weights * finite
        loss = torch.where(finite, loss, 0.0)
        rows = [loss * taken, loss * loss * taken, correct * taken, taken, weights * ~finite]
        self.sums.index_add_(0, places, torch.stack(rows).sum(2).T)

    def _apply(self, nets: Sequence[Net], grad: Tensor) -> None:
        weights, by_place = self.weights, {net.place: net for net in nets}
        if self._learning is None:
            self._learning = self._learning_rows(by_place)
        steps = {place: net.step for place, net in by_place.items()}
        hosts = {place: net.recipe.host_lr(net.step) for place, net in by_place.items()}
        lr = np.zeros(len(weights.keys))
        sampled = np.zeros(len(weights.keys), dtype=bool)
        for row, (key, place) in enumerate(zip(weights.keys, weights.nets.tolist(), strict=True)):
            net = by_place.get(place)
            if net is None:
                continue
            rules = net.recipe.rules
            sampled[row] = net.window.seen % rules.health_every == 0
            lr[row] = hosts[place]
            if key[0] != HOST:
                learn_step = net.state.slot(key[0]).learn_step
                lr[row] = rate_of_seed(rules, hosts[place], steps[place], learn_step)
        skipping = self.stepper.step(grad, self._learning, lr, sampled)
        for net in nets:
            net.window.add(skipped=net.place in skipping)
            net.step += 1

    def _learning_rows(self, by_place: dict[int, Net]) -> Bools:
        learning = np.zeros(len(self.weights.keys), dtype=bool)
        for row, (key, place) in enumerate(zip(self.weights.keys, self.weights.nets.tolist(), strict=True)):
            net = by_place.get(place)
            if net is not None:
                learning[row] = key[0] == HOST or net.learns(net.state.slot(key[0]))
        return learning
