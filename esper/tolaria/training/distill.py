"""Knowledge distillation: adds a frozen teacher's term to the task's loss of every sample.

    term_b = weight * T^2 * KL(softmax(t_b / T) || softmax(s_b / T))  +  feature_weight * sum_pairs mean((f_b - g_b)^2)

with logits s of the student and t of the teacher (Hinton, Vinyals, Dean 2015, arXiv:1503.02531: T^2 keeps the size of
the gradient when T changes) and features f at a slot's site and g at a module of the teacher (Romero et al. 2015,
arXiv:1412.6550, without a regressor, so shapes must fit). A sequence's term is the mean over its positions, as the
task's loss is. The term is added to the loss of each sample, so N ranks equal one here, too.

Seeds in their shadow forward get the same sum as the host, so that a seed learns what it will be blended in for. Their
judges do not: validation, probes, gates and the reported training loss use the task's loss alone.

The teacher runs once a batch, in eval() and without a graph, before the student's forward. It is no part of the model:
wrapper, digests and checkpoint do not hold it. A checkpoint only holds its identity, which a resume compares.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.feature import place_of, take
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.training.distill_config import DistillConfig

Autocast = Callable[[], contextlib.AbstractContextManager[None]]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each sample, in nats; pure.

    Its gradient by the student's logits is T * (softmax(student / T) - softmax(teacher / T)). A class that the teacher
    rules out (a logit of minus infinity) adds nothing.

    Args:
        student: logits [B, K] or [B, T, V].
        teacher: logits of the same shape.
        temperature: T.

    Returns:
        [B]; for a sequence the mean over its positions. In the dtype of the student, but never below float32.
    """
    log_q = torch.log_softmax(_wide(student) / temperature, dim=-1)
    log_p = torch.log_softmax(_wide(teacher).to(log_q.dtype) / temperature, dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p.nan_to_num(neginf=0.0) - log_q), 0.0)
    divergence = temperature**2 * terms.sum(-1)
    return divergence if divergence.ndim == 1 else divergence.mean(1)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each sample's features; pure.

    Args:
        student: [B, ...].
        teacher: of the same shape.

    Returns:
        [B], never below float32.
    """
    return (_wide(student) - _wide(teacher)).square().flatten(1).mean(1)


class Teacher:
    """A network that teaches, on the CPU or on the device where it was built.

    Args:
        module: holds its parameters.
        source: describes where it comes from.
        call: inputs -> logits; None to call the module itself.
    """

    def __init__(self, module: nn.Module, source: str, call: Callable[[Tensor], Any] | None = None) -> None:
        self.module, self.source = module, source
        self.call: Callable[[Tensor], Any] = module if call is None else call
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self.digest = digest_tensors((name, tensor.detach().cpu()) for name, tensor in tensors)

    @property
    def identity(self) -> dict[str, Any]:
        """Its identity in a checkpoint: its source, and the digest of all its tensors as they were read."""
        return {"source": self.source, "digest": self.digest}


class Distillation:
    """The teacher's term in the loss of a run.

    Args:
        config: weights and pairs.
        teacher: on the device, in the run's number format.
        grown: the student.
        example: a batch of inputs.
        autocast: context of the run's precision.

    Raises:
        ConfigError: logits or features do not fit, a pair names an unknown slot or module, or logits are not finite.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, grown: Grown, example: Any, autocast: Autocast) -> None:
        if not isinstance(example, Tensor):
            raise ConfigError(f"distill: the host takes {type(example).__name__} of inputs, a teacher takes one tensor")
        self.config, self.teacher, self._autocast = config, teacher, autocast
        self._open = False
        self._logits: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        self._taught: dict[str, Tensor] = {}
        self._hidden: set[str] = set()  # slots whose features came from a forward without gradients
        self._hooks: list[Any] = []
        try:
            self._watch(grown)
            self._check(grown, example)
        except ConfigError:
            self.release()
            raise

    def _watch(self, grown: Grown) -> None:
        modules = dict(self.teacher.module.named_modules())
        for slot, name in (self.config.features or {}).items():
            if slot not in grown.sites:
                raise ConfigError(f"distill.features.{slot}: no slot in use; there are {', '.join(grown.sites)}")
            if name not in modules:
                names = ", ".join([known for known in modules if known][:12])
                raise ConfigError(f"distill.features.{slot} = {name!r}: the teacher has no such module; it has {names}")
            site = grown.sites[slot]
            # Registered after the slot's own hook, so it sees the features that flow on, the seed's delta included.
            student = grown.model.get_submodule(site.module)
            self._hooks.append(student.register_forward_hook(partial(self._note, self._seen, slot, site.place)))
            self._hooks.append(modules[name].register_forward_hook(partial(self._note, self._taught, slot, ...)))

    def _note(
        self, features: dict[str, Tensor], slot: str, place: Any, module: nn.Module, args: Any, output: Any
    ) -> None:
        if self._open:
            if features is self._seen and not torch.is_grad_enabled():
                self._hidden.add(slot)
            try:
                features[slot] = take(output, place_of(output) if place is ... else place)
            except ValueError as error:
                raise ConfigError(f"distill.features.{slot}: {error}") from None

    def _check(self, grown: Grown, example: Tensor) -> None:
        who = f"distill: {self.teacher.source}"
        with undisturbed(self.teacher.module), evaluating(self.teacher.module), self.lesson(example):
            logits = self._logits
            with evaluating(grown.model), self._autocast():
                output = grown.model(example.clone())
            seen, taught = dict(self._seen), dict(self._taught)
        if not isinstance(logits, Tensor) or logits.shape != output.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(f"{who} returns {got}, the host returns {tuple(output.shape)}; they must be of one shape")
        if bool(torch.isnan(logits).any() | torch.isposinf(logits).any()):
            raise ConfigError(f"{who} returns logits that are not finite for the first samples; is it trained?")
        for slot, name in (self.config.features or {}).items():
            if slot not in taught:
                raise ConfigError(f"distill.features.{slot} = {name!r}: it did not run in the teacher's forward")
            shapes = tuple(seen[slot].shape), tuple(taught[slot].shape)
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"distill.features.{slot} = {name!r}: the teacher's features there are {shapes[1]}, the student's "
                    f"{shapes[0]}; they must be of one shape, so name another module"
                )

    @contextlib.contextmanager
    def lesson(self, x: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Runs the teacher on a batch; within the block the student's features are recorded.

        Args:
            x: inputs, [B, ...].

        Yields:
            A function from the output of the student's latest forward to the term of each sample, [B].
        """
        self._open = True
        try:
            with torch.no_grad(), self._autocast():
                self._logits = self.teacher.call(x.clone())  # it may write into what it is given
            yield self._term
        finally:
            self._open, self._logits = False, None
            for noted in (self._seen, self._taught, self._hidden):
                noted.clear()

    def _term(self, output: Tensor) -> Tensor:
        assert self._logits is not None
        config, terms = self.config, []
        if self._hidden and output.requires_grad:
            raise ConfigError(
                f"distill.features.{min(self._hidden)}: the site runs inside a segment of reentrant activation "
                "checkpointing, whose features no gradient reaches; use torch.utils.checkpoint with "
                "use_reentrant=False, or name a slot outside the segment"
            )
        if config.weight > 0:
            terms.append(config.weight * soft_target_loss(output, self._logits, config.temperature))
        for slot in config.features or ():  # each forward records its own
            terms.append(config.feature_weight * feature_loss(self._seen.pop(slot), self._taught[slot]))
        return torch.stack([term.to(terms[0].dtype) for term in terms]).sum(0)

    def release(self) -> None:
        """Drops the teacher and removes the hooks from the student."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        del self.teacher
