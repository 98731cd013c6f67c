"""One loss of a user's batch: the host's forward, a shadow forward per seed that incubates so, and their checks.

A loss must call the model that it is given: what a shadow sees, and what data parallel training reduces, goes through
that call. One that calls a model of its closure would train the host twice and the seed not at all, so it is refused.

Ranks must not train on equal batches. The digests of the first ones are compared once, at the first tick.
"""

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from esper.accord.state import RunState
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError
from esper.leyline.plain import digest62
from esper.session.batches import tensors_of
from esper.session.continuing import wants_batches
from esper.session.evaluator import BatchEvaluator
from esper.session.model import LiveModel, StandIn, UserLoss, evaluate_loss
from esper.tolaria.growth.growth import Growth
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.training.incubation import Call, with_shadows

COMPARED = 4  # batches of each rank whose digest is compared


class Passes:
    """Computes the losses of one session.

    Args:
        loss: the user's; None without one.
        model: the model that the user calls.
        growth: knows the present wrapper.
        window: takes the counts.
        evaluator: keeps the newest batches while a seed may be continued in copies.

    Fields:
        graded: whether the last loss said which samples were right.
    """

    def __init__(
        self, loss: UserLoss | None, model: LiveModel, growth: Growth, window: Window, evaluator: BatchEvaluator
    ) -> None:
        self._loss, self._model, self._growth, self._window = loss, model, growth, window
        self._world = evaluator.world
        self._grown: Grown = growth.grown
        self.graded = False
        self._recent = evaluator.recent
        self._digests: list[int] = []
        self._first, self._compared = True, self._world.size == 1

    def judge(self, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The user's loss of a batch, checked: loss [B], and correct [B] or None."""
        assert self._loss is not None
        return evaluate_loss(self._loss, model, batch)

    def losses(self, batch: Any, state: RunState) -> tuple[Tensor, Tensor]:
        """The host's mean loss, and its sum with one shadow loss per seed that learns in a forward pass of its own."""
        began = time.perf_counter()
        self._note(batch)
        if wants_batches(state, self._growth.terms.gates):
            self._recent.keep(batch, self._growth.terms.gates.continue_steps)
        means: list[Tensor] = []
        shadowed = self._growth.shadowed_slots(state)

        def host() -> Tensor:
            loss, correct = self._judge_host(batch, again=bool(shadowed))
            self.graded = correct is not None
            ones = torch.ones(len(loss), device=loss.device)
            self._window.add_samples(loss, torch.zeros_like(loss) if correct is None else correct, ones)
            means.append(loss.mean())
            return means[0]

        def shadow(call: Call) -> Tensor:
            return self._judge_given(call, batch)[0].mean()

        total = with_shadows(host, shadow, self._grown, shadowed, self._world.device)
        self._window.own_ms += 1e3 * (time.perf_counter() - began)
        return means[0], total

    # the model that the loss is given -----------------------------------------------------------------------------

    def _judge_given(self, call: Call, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The user's loss with a stand-in for the model, which it must call."""
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return call(*args, **kwargs)

        judged = self.judge(StandIn(self._grown, counted), batch)
        if not calls:
            raise ConfigError(
                "loss(model, batch) did not call the model that it was given: write model(...) with its first "
                "argument, not with a model from outside the function, nor by one of its methods"
            )
        return judged

    def _judge_host(self, batch: Any, *, again: bool) -> tuple[Tensor, Tensor | None]:
        """`_judge_given` of the host; the first time no call may go past the stand-in.

        Args:
            batch: the user's.
            again: other forwards will see this batch, so the model, which may write into its input, gets a copy.
        """
        inside, past = 0, 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                args, kwargs = copy_inputs((args, kwargs)) if again else (args, kwargs)
                return self._model.call_present(*args, **kwargs)
            finally:
                inside -= 1

        def count(module: Any, args: Any) -> None:
            nonlocal past
            past += not inside and torch.is_grad_enabled()

        model = self._grown.model
        compiled = getattr(model, "_compiled_call_impl", None) is not None  # a hook would have it compiled anew
        hook = model.register_forward_pre_hook(count) if self._first and not compiled else None
        self._model.passing = True
        try:
            judged = self._judge_given(call, batch)
        finally:
            self._model.passing = False
            if hook is not None:
                hook.remove()
        if past:
            raise ConfigError(
                f"loss(model, batch) called the grown model {past} times past the one that it was given: call only its "
                "first argument, or the other one under torch.no_grad()"
            )
        self._first = False
        return judged

    # the batches of other ranks -----------------------------------------------------------------------------------

    def _note(self, batch: Any) -> None:
        """Takes the digest of one of the first batches."""
        if not self._compared and len(self._digests) < COMPARED:
            self._digests.append(digest_tensors((str(i), t.detach().cpu()) for i, t in enumerate(tensors_of(batch))))

    def describe_equal_batches(self) -> str:
        """One line on ranks that train on the same batches; empty if there are none, and from the second call on.

        The first call is a collective of 8 bytes.
        """
        if self._compared:
            return ""
        self._compared = True
        row = torch.tensor([digest62(self._digests) if self._digests else -1 - self._world.rank])
        ranks = defaultdict(list)
        for rank, other in enumerate(self._world.all_gather(row, what="first batches")):
            ranks[int(other)].append(str(rank))
        alike = [f"ranks {', '.join(equal)}" for equal in ranks.values() if len(equal) > 1]
        if not alike:
            return ""
        return (
            f"{' and '.join(alike)} train on the same batches: give the loader "
            "sampler=DistributedSampler(dataset, session.world.size, session.world.rank), without shuffle=True, and "
            "call its set_epoch(epoch)"
        )
