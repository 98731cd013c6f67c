"""The counts of one rank between two ticks.

Sums stay on the device until the tick reads them, once. A step that was judged on the device is read when the next one
has been added, or by the tick.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST
from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.guard import Judgement, StepReport

NOT_SAVED = {"_device", "_late", "_seen", "_columns"}


class Window:
    """Sums since the last tick.

    Training loss and correctness are this rank's own (additive); gradient norms come from reduced gradients and are
    equal on all ranks (replicated).

    Args:
        device: where sums are kept.
        skipped_in_row: steps skipped in a row so far.
        columns: names of the task's further sums.

    Attributes:
        data_ms: milliseconds that this rank waited for data; wall clock, so it decides nothing.
        own_ms: the same for data and forward together, in which it waits for no other rank.
    """

    def __init__(self, device: torch.device, skipped_in_row: int = 0, columns: Sequence[str] = ()) -> None:
        self._device, self._columns = device, tuple(columns)
        self._late: deque[tuple[Judgement, int]] = deque()
        self.skipped_in_row = skipped_in_row
        self.reset()

    def reset(self, skipped_in_row: int | None = None) -> None:
        """Begins a new window.

        Args:
            skipped_in_row: steps skipped in a row so far; by default the row goes on over the tick.
        """
        if skipped_in_row is not None:
            self.skipped_in_row = skipped_in_row
        self._late.clear()
        # loss, its square, correct, count, non-finite, those of the task
        self._sums = torch.zeros(5 + len(self._columns), dtype=torch.float64, device=self._device)
        self._norms: dict[str, float] = defaultdict(float)
        self._steps: dict[str, int] = defaultdict(int)
        self._broken: dict[str, int] = defaultdict(int)
        self.skipped = 0
        self.first_skipped = -1
        self.longest_row = 0
        self.data_ms = self.own_ms = 0.0
        self._seen = 0

    @property
    def row(self) -> int:
        """Steps skipped in a row, up to the newest known step since the last tick; 0 if none is known."""
        return self.skipped_in_row if self._seen else 0

    @property
    def sums(self) -> Tensor:
        """This rank's own sums, on the device; `add_samples` never changes them in place."""
        return self._sums

    def add_wait(self, ms: float) -> None:
        """Adds a wait for data, in milliseconds; it is own work too."""
        self.data_ms += ms
        self.own_ms += ms

    def add_samples(self, loss: Tensor, correct: Tensor, weights: Tensor, rows: Tensor | None = None) -> None:
        """Adds the samples of one forward, [M] each, and the task's further sums [M, C]; non-finite losses are counted,
        not summed."""
        with torch.no_grad():
            loss, correct = loss.detach().double(), correct.detach().double()
            finite = torch.isfinite(loss)
            weighted = weights.double() * finite
            loss = torch.where(finite, loss, 0.0)
            sums = torch.stack(
                [
                    (loss * weighted).sum(),
                    (loss * loss * weighted).sum(),
                    (correct * weighted).sum(),
                    weighted.sum(),
                    (weights.double() * ~finite).sum(),
                ]
            )
            if rows is not None:
                kept = torch.where(finite[:, None], rows.to(sums), 0.0)
                sums = torch.cat([sums, (kept * weighted[:, None]).sum(0)])
            self._sums = self._sums + sums

    def add_step(self, report: StepReport | Judgement, step: int) -> None:
        """Adds the report of optimizer step ``step``."""
        if isinstance(report, StepReport):
            self._take(report, step)
            return
        self._late.append((report, step))
        self._read(leave=1)

    def settle(self) -> None:
        """Reads steps that were judged on the device and are not known yet; waits for the device."""
        self._read(leave=0)

    def _read(self, leave: int) -> None:
        while len(self._late) > leave:
            judgement, step = self._late.popleft()
            self._take(judgement.read(), step)

    def _take(self, report: StepReport, step: int) -> None:
        self._seen += 1
        for owner, norm in report.norms.items():
            self._norms[owner] += norm
            self._steps[owner] += 1
        if not report.skipped:  # a broken host breaks the seeds' gradients too: that is no slot's fault
            for owner in report.broken:
                self._broken[owner] += 1
        if report.skipped:
            self.skipped += 1
            if not report.overflowed:
                self.skipped_in_row += 1
                self.longest_row = max(self.longest_row, self.skipped_in_row)
            if self.first_skipped < 0:
                self.first_skipped = step
        else:
            self.skipped_in_row = 0

    def values(self, slots: list[str]) -> tuple[dict[str, float], int]:
        """Entries of the observe vector, and how many of this rank's samples had a non-finite loss."""
        self.settle()
        loss, squares, correct, count, nonfinite, *further = self._sums.tolist()
        entries = {
            "train_loss": loss,
            "train_loss_sq": squares,
            "train_correct": correct,
            "train_count": count,
            "train_samples": count + nonfinite,
            "host_norm": self._norms[HOST],
            "host_norm_steps": self._steps[HOST],
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "longest_row": self.longest_row,
            **{f"train_sum_{name}": value for name, value in zip(self._columns, further, strict=True)},
        }
        for slot in slots:
            entries[f"{slot}.norm"] = self._norms[slot]
            entries[f"{slot}.norm_steps"] = self._steps[slot]
            entries[f"{slot}.nonfinite"] = self._broken[slot]
        return entries, int(nonfinite)

    # saving -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything counted since the last tick: plain data, and this rank's own sums as a tensor on the CPU."""
        self.settle()
        fields = {key: value for key, value in vars(self).items() if key not in NOT_SAVED}
        return {
            key: value.cpu().clone() if isinstance(value, Tensor) else dict(value) if isinstance(value, dict) else value
            for key, value in fields.items()
        }

    def take_sums(self, sums: Tensor | None) -> None:
        """Replaces this rank's own sums; None if nothing was counted."""
        self._sums = torch.zeros_like(self._sums) if sums is None else sums.to(self._device)

    def move(self, device: torch.device) -> None:
        """Moves the sums to another device, and counts there from now on."""
        self._device, self._sums = device, self._sums.to(device)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores `state`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        fields = set(vars(self)) - NOT_SAVED
        if fields != set(state):
            raise CheckpointError(f"window: {', '.join(sorted(fields ^ set(state)))} missing or unknown")
        for key, value in state.items():
            present = getattr(self, key)
            if isinstance(present, Tensor):
                setattr(self, key, value.to(self._device).clone())
            elif isinstance(present, dict):
                present.clear()
                present.update(value)
            else:
                setattr(self, key, value)
