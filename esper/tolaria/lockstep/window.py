"""What a rank counts between two ticks. Sums stay on the device until the tick reads them, once; a step that was judged
on the device is read when the next one has been taken in, or by the tick."""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST
from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.guard import Judgement, StepReport

NOT_SAVED = {"_device", "_late", "_seen"}


class Window:
    """Sums since the last tick.

    Training loss and correctness are this rank's own (additive); gradient norms come from reduced gradients and are
    equal on all ranks (replicated).
    """

    def __init__(self, device: torch.device, skipped_in_row: int = 0) -> None:
        self._device = device
        self._late: deque[tuple[Judgement, int]] = deque()
        self.skipped_in_row = skipped_in_row
        self.reset()

    def reset(self, skipped_in_row: int | None = None) -> None:
        """Begins a new window; a row of skipped steps goes on over a tick, unless another one is given."""
        if skipped_in_row is not None:
            self.skipped_in_row = skipped_in_row
        self._late.clear()
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._device)  # loss, correct, count, non-finite
        self._norms: dict[str, float] = defaultdict(float)
        self._steps: dict[str, int] = defaultdict(int)
        self._broken: dict[str, int] = defaultdict(int)
        self.skipped = 0
        self.first_skipped = -1
        self.longest_row = 0
        self._seen = 0

    @property
    def row(self) -> int:
        """Skipped steps in a row, at the newest step since the last tick that is known of; 0 without one."""
        return self.skipped_in_row if self._seen else 0

    def add_samples(self, loss: Tensor, correct: Tensor, weights: Tensor) -> None:
        """Takes per-sample numbers of one forward, [M] each; those that are not finite are counted, not summed."""
        with torch.no_grad():
            loss, correct = loss.detach().double(), correct.detach().double()
            finite = torch.isfinite(loss)
            weighted = weights.double() * finite
            self._sums += torch.stack(
                [
                    (torch.where(finite, loss, 0.0) * weighted).sum(),
                    (correct * weighted).sum(),
                    weighted.sum(),
                    (weights.double() * ~finite).sum(),
                ]
            )

    def add_step(self, report: StepReport | Judgement, step: int) -> None:
        """Takes what the owner of the parameters said of optimizer step ``step``."""
        if isinstance(report, StepReport):
            self._take(report, step)
            return
        self._late.append((report, step))
        self._read(leave=1)

    def settle(self) -> None:
        """Reads what was judged on the device and is not known yet; waits for the device."""
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
        if not report.skipped:  # a broken host breaks the seeds' gradients too; only what stays in a slot is its fault
            for owner in report.broken:
                self._broken[owner] += 1
        if report.skipped:
            self.skipped += 1
            self.skipped_in_row += 1
            self.longest_row = max(self.longest_row, self.skipped_in_row)
            if self.first_skipped < 0:
                self.first_skipped = step
        else:
            self.skipped_in_row = 0

    def values(self, slots: list[str]) -> tuple[dict[str, float], int]:
        """Entries of the observe vector, and how many of this rank's samples had a loss that was not finite."""
        self.settle()
        loss, correct, count, nonfinite = self._sums.tolist()
        found = {
            "train_loss": loss,
            "train_correct": correct,
            "train_count": count,
            "train_samples": count + nonfinite,
            "host_norm": self._norms[HOST],
            "host_norm_steps": self._steps[HOST],
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "longest_row": self.longest_row,
        }
        for slot in slots:
            found[f"{slot}.norm"] = self._norms[slot]
            found[f"{slot}.norm_steps"] = self._steps[slot]
            found[f"{slot}.nonfinite"] = self._broken[slot]
        return found, int(nonfinite)

    # saving -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything counted since the last tick: plain data, and this rank's own sums as a tensor on the CPU."""
        self.settle()
        own = {key: value for key, value in vars(self).items() if key not in NOT_SAVED}
        return {
            key: value.cpu().clone() if isinstance(value, Tensor) else dict(value) if isinstance(value, dict) else value
            for key, value in own.items()
        }

    def take_sums(self, sums: Tensor | None) -> None:
        """Puts other sums of this rank's own in the place of its own; None: nothing was counted."""
        self._sums = torch.zeros_like(self._sums) if sums is None else sums.to(self._device)

    def move(self, device: torch.device) -> None:
        """Goes on counting on another device."""
        self._device, self._sums = device, self._sums.to(device)

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes `state` back.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        own = set(vars(self)) - NOT_SAVED
        if own != set(state):
            raise CheckpointError(f"window: {', '.join(sorted(own ^ set(state)))} missing or unknown")
        for key, value in state.items():
            mine = getattr(self, key)
            if isinstance(mine, Tensor):
                setattr(self, key, value.to(self._device).clone())
            elif isinstance(mine, dict):
                mine.clear()
                mine.update(value)
            else:
                setattr(self, key, value)
