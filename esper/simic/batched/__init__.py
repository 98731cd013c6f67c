"""Many tiny hosts of one shape in training, stepped together on one device."""

from esper.simic.batched.trials import BatchedTrials

__all__ = ["BatchedTrials"]
