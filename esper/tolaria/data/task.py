"""The tasks: what a sample is, with one loss and one share of correct answers per sample.

Everything that is counted over ranks (training loss, validation, paired evidence) is a sum over *samples*, so the unit
is fixed here: an image is a sample, and so is a whole sequence. A sequence's loss is the mean over its tokens, which
keeps nats comparable between block lengths.

Shapes: B samples, K classes, T tokens, V bytes of the vocabulary.
"""

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(StrEnum):
    """CLASSIFICATION: logits [B, K], target [B]. LANGUAGE: logits [B, T, V], target [B, T]. Targets are int64."""

    CLASSIFICATION = "classification"
    LANGUAGE = "language"

    def per_sample(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each sample. Pure; nothing waits for the device.

        Args:
            output: logits, [B, K] or [B, T, V].
            target: class or next token, [B] or [B, T], int64.

        Returns:
            loss [B] in nats (LANGUAGE: mean over T) and correct [B]: 0 or 1 (LANGUAGE: share of T). Both in the dtype
            of the logits, but never below float32.

        Raises:
            ValueError: shapes do not fit the task.
        """
        axes = 2 if self is Task.CLASSIFICATION else 3
        if output.ndim != axes or output.shape[:-1] != target.shape:
            expected = "logits [B, K] and target [B]" if axes == 2 else "logits [B, T, V] and target [B, T]"
            raise ValueError(
                f"task {self.value}: got logits {list(output.shape)} and target {list(target.shape)}, expected "
                f"{expected}; does the host fit the data?"
            )
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
        correct = (logits.argmax(-1) == target).to(loss.dtype)
        return (loss, correct) if self is Task.CLASSIFICATION else (loss.mean(1), correct.mean(1))
