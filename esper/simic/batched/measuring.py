"""The sums of many nets for a tick, as `esper.tolaria.lockstep.measure` makes them for one.

Shapes: L lanes, B samples.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper.accord.lifecycle import ProbeRequest
from esper.kasmina.attribution.probe import difference_sums
from esper.kasmina.slots.grown import HOST
from esper.simic.batched.data import Pool, padded
from esper.simic.batched.lanes import Lane, make_plan
from esper.simic.batched.net import Net
from esper.simic.batched.network import Network
from esper.simic.batched.training import Training, confidence_of, per_sample
from esper.simic.batched.weights import COUNTS, GATE, Weights

AT_ONCE = 2048  # samples of all lanes in one forward: more of them leave the cache of a core
Sums = dict[str, float]


class Measuring:
    """Measures nets.

    Args:
        network: of all of them.
        weights: of all of them.
        training: counted their steps.
        validation: the validation parts.
        probe: the probe parts.
    """

    def __init__(
        self, network: Network, weights: Weights, training: Training, *, validation: Pool, probe: Pool
    ) -> None:
        self.network, self.weights, self.training = network, weights, training
        self.validation, self.probe = validation, probe

    def measure(self, nets: Sequence[Net]) -> None:
        """Sets each net's sums since its last tick, and begins its counts anew."""
        rows = self.training.sums.tolist()
        values = {net.place: self._steps_of(net, rows[net.place]) for net in nets}
        self.training.sums[[net.place for net in nets]] = 0.0
        self._count(nets, values)
        due = [net for net in nets if net.recipe.validates(net.state.tick + 1, net.step)]
        if due:
            for net, sums in zip(due, self._validation_sums(due), strict=True):
                values[net.place] |= {f"validation_{name}": value for name, value in sums.items()}
        self._look(nets, values)
        for net in nets:
            net.sums = net.recipe.agree(values[net.place])

    def _steps_of(self, net: Net, row: Sequence[float]) -> Sums:
        loss, squares, correct, count, nonfinite = row
        window = net.window
        return {
            "train_loss": loss,
            "train_loss_sq": squares,
            "train_correct": correct,
            "train_count": count,
            "train_samples": count + nonfinite,
            "skipped": window.skipped,
            "skipped_in_row": window.row,
            "longest_row": window.longest,
        }

    def _count(self, nets: Sequence[Net], values: Mapping[int, Sums]) -> None:
        """Adds what is counted by row of weights, and by slot."""
        weights = self.weights
        weights.settle()
        finite = self._finite_owners()
        wanted = {net.place: net for net in nets}
        for row, (key, place) in enumerate(zip(weights.keys, weights.nets.tolist(), strict=True)):
            if place not in wanted:
                continue
            own, name = values[place], key[0]
            if key[1] == GATE:
                continue  # counted with its seed
            prefix = "host_" if name == HOST else f"{name}."
            own |= {f"{prefix}{what}": value for what, value in zip(COUNTS, weights.counts[row].tolist(), strict=True)}
            weights.counts[row] = 0.0
            if name == HOST:
                del own["host_nonfinite"]  # a skipped step, which is counted as such
                continue
            count, total, squares = wanted[place].gates.pop(name, (0.0, 0.0, 0.0))
            own |= {f"{name}.finite": float(finite[row]), f"{name}.owned": 1.0, f"{name}.degraded": 0.0}
            own |= {f"{name}.gate_count": count, f"{name}.gate_sum": total, f"{name}.gate_sum_sq": squares}
        for net in nets:
            for entry in net.state.slots:
                if entry.staged is not None:
                    count, total = net.heard.pop(entry.slot, (0.0, 0.0))
                    values[net.place] |= {f"{entry.slot}.feature_count": count, f"{entry.slot}.feature_sq": total}

    def _finite_owners(self) -> list[bool]:
        """For the row of each owner, whether all its weights are finite."""
        weights, finite = self.weights, [True] * len(self.weights.keys)
        for row in weights.number_rows[~torch.isfinite(weights.flat)].unique().tolist():
            finite[weights.owners[row]] = False
        return finite

    def _losses(self, pool: Pool, lanes: Sequence[Lane], indices_LB: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each sample, float64 [L, B]."""
        plan, losses, corrects = make_plan(lanes, self.weights), [], []
        with torch.no_grad():
            for part in indices_LB.split(max(1, AT_ONCE // len(lanes)), 1):
                x, y = pool.gather(plan.nets, part.to(self.weights.device))
                confidence = confidence_of(self.network, lanes, self.weights, x)
                loss, correct = per_sample(self.network.run(plan, x, confidence=confidence), y)
                losses.append(loss.double())
                corrects.append(correct.double())
        return torch.cat(losses, 1), torch.cat(corrects, 1)

    def sample_sums(self, pool: Pool, lanes: Sequence[Lane], rows: Sequence[Tensor]) -> list[Sums]:
        """Sums over samples of the loss and the correctness, and of their squares, for each lane.

        Args:
            pool: of the samples.
            lanes: what is computed.
            rows: samples of each lane, int64 [B_l].
        """
        indices_LB, counted = padded(rows)
        loss, correct = self._losses(pool, lanes, indices_LB)
        if counted is not None:
            counted = counted.to(loss.device)
            loss, correct = torch.where(counted, loss, 0.0), torch.where(counted, correct, 0.0)
        table = torch.stack([loss.sum(1), (loss * loss).sum(1), correct.sum(1), (correct * correct).sum(1)], 1).tolist()
        names = ("loss", "loss_sq", "correct", "correct_sq")
        return [
            {**dict(zip(names, row, strict=True)), "count": float(len(samples))}
            for row, samples in zip(table, rows, strict=True)
        ]

    def _validation_sums(self, nets: Sequence[Net]) -> list[Sums]:
        lanes = [net.evaluating_lane() for net in nets]
        return self.sample_sums(self.validation, lanes, [torch.arange(len(net.recipe.validation)) for net in nets])

    def _look(self, nets: Sequence[Net], values: Mapping[int, Sums]) -> None:
        """Adds the paired evidence that the nets' last ticks asked for."""
        asked: list[tuple[Net, str, ProbeRequest]] = [
            (net, entry.slot, entry.request) for net in nets for entry in net.state.slots if entry.request is not None
        ]
        for pool, refill in ((self.probe, False), (self.training.pool, True)):
            self._look_at(pool, [one for one in asked if one[2].refill is refill], values)

    def _look_at(self, pool: Pool, asked: Sequence[tuple[Net, str, ProbeRequest]], values: Mapping[int, Sums]) -> None:
        """Adds the paired evidence of looks whose samples are in one pool."""
        if not asked:
            return
        drawn = [net.recipe.look(slot, request) for net, slot, request in asked]
        lanes = [net.evaluating_lane({slot: alpha}) for net, slot, request in asked for alpha in (0.0, request.alpha)]
        indices_LB, _ = padded([chosen for chosen, _ in drawn for _ in range(2)])
        losses, _ = self._losses(pool, lanes, indices_LB)
        d_KB = (losses[0::2] - losses[1::2]).cpu()
        for (net, slot, _), (chosen, places), d in zip(asked, drawn, d_KB, strict=True):
            sums = difference_sums([d[: len(chosen)]], (), places)
            values[net.place] |= {f"{slot}.probe_{name}": value for name, value in sums.items()}

    def birth_sums(self, asked: Sequence[tuple[Net, str]]) -> list[tuple[Sums, Sums]]:
        """Sums at alpha 0 and at alpha 1 of seeds that wait, each over the samples of its birth."""
        rows = [net.recipe.births.draw(slot, net.state.slot(slot).generation + 1) for net, slot in asked]
        lanes = [lane for net, slot in asked for lane in (net.evaluating_lane(), net.newborn_lane(slot))]
        sums = self.sample_sums(self.probe, lanes, [row for row in rows for _ in range(2)])
        return list(zip(sums[0::2], sums[1::2], strict=True))
