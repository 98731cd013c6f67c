"""Adopts a user's optimizer: its groups are the host's, and seeds get groups of their own beside them.

    host   the user's groups as they are; the user's scheduler sees these alone, and so never the growth
    seed   lr = lr of the widest host group * seed_lr_scale * warm-up; every other option as in that group, except the
           weight decay, which is seed_weight_decay on matrices and 0 on vectors

A loss scaler works per owner, too (`esper.tolaria.growth.guard.move_scale`). Gradients are unscaled here.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from esper.kasmina.slots.grown import HOST, Grown
from esper.leyline.errors import CheckpointError, ConfigError, LoopError
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.guard import StepReport, move_scale
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.policy import Following

REFUSED = {
    "LBFGS": "it knows one parameter group only and steps by a closure",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and seeds have vectors",
    "ZeroRedundancyOptimizer": "each rank holds a part of its state only",
}


def check_optimizer(grown: Grown, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that cannot grow, or that is not this model's.

    Raises:
        ConfigError: its class cannot grow, a learning parameter of the host stands in no group, or a parameter in a
            group is not the host's.
    """
    real = isinstance(optimizer, torch.optim.Optimizer)
    if not real or not {"param_groups", "state", "defaults", "_optimizer_step_pre_hooks"} <= vars(optimizer).keys():
        inner = _find_inner(optimizer)
        what = "it stands for another optimizer" if real or inner else "expected a torch.optim.Optimizer"
        advice = f"; pass the {type(inner[1]).__name__} itself (its attribute {inner[0]})" if inner else ""
        raise ConfigError(f"optimizer = {type(optimizer).__name__}: {what}{advice}")
    for cls in type(optimizer).__mro__:
        if cls.__name__ in REFUSED:
            raise ConfigError(
                f"optimizer = {type(optimizer).__name__}: it cannot grow, {REFUSED[cls.__name__]}; use AdamW or SGD"
            )
    named = {id(p): name for name, p in grown.owner_parameters()[HOST]}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in grown.owner_parameters()[HOST] if p.requires_grad and id(p) not in owned]
    if lost:
        raise ConfigError(
            f"optimizer: {_some(lost)} of the host stand in no parameter group; add them, or freeze them "
            "(requires_grad_(False))"
        )
    foreign = [
        f"group {g} parameter {i} {tuple(p.shape)}"
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if id(p) not in named
    ]
    if foreign:
        raise ConfigError(f"optimizer: {_some(foreign)} is no parameter of the host; build it from model.parameters()")


def _find_inner(wrapper: Any) -> tuple[str, torch.optim.Optimizer] | None:
    """The optimizer that an object holds, and the name of the attribute; None if it holds none."""
    held = getattr(wrapper, "__dict__", {}).items()
    return next(((name, value) for name, value in held if isinstance(value, torch.optim.Optimizer)), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class AdoptedOptimizer:
    """A user's optimizer for the length of a session, with its scheduler and its loss scaler.

    Args:
        grown: the model, its slots empty.
        optimizer: of the host.
        config: ``seed_*`` and ``clip_norm`` are read.
        scheduler: of that optimizer, or None.
        scaler: of the losses, or None.
        scheduler_per: ``step`` or ``epoch``, after which the scheduler steps; one of timm's kind has a method for each.

    Fields:
        owner: owns all parameters, those of seeds included.
        overflows: by slot, steps in a row with a non-finite gradient there; only with a scaler.

    Raises:
        ConfigError: see `check_optimizer`; or the scheduler cannot work, or belongs to another optimizer.
    """

    def __init__(
        self,
        grown: Grown,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        *,
        scheduler: Any,
        scaler: Any,
        scheduler_per: str = "step",
    ) -> None:
        check_optimizer(grown, optimizer)
        self.grown, self.optimizer = grown, optimizer
        self._policy = Following(optimizer, config.seed_weight_decay)
        self.owner = ParameterOwner(grown, config, 1, adopted=(optimizer, self._policy))
        self.scheduler, self._per = _check_scheduler(scheduler, optimizer), scheduler_per
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.overflows: dict[str, int] = {}
        self._stepping = False
        self._guard = optimizer.register_step_pre_hook(self._refuse_step_outside)
        for group in self.owner.host_groups:
            group["owner"] = HOST

    def _refuse_step_outside(self, *call: Any) -> None:
        if not self._stepping:
            raise LoopError("optimizer.step() was called beside the session; call session.step() instead")

    @property
    def lr(self) -> float:
        """The host's present rate: that of its widest group."""
        return float(self._policy.reference["lr"])

    def close(self) -> None:
        """Gives the optimizer back."""
        self._guard.remove()
        for group in self.owner.host_groups:
            group.pop("owner", None)

    def without_gradient(self) -> list[str]:
        """Names of the host's parameters that learn and that no backward has reached."""
        return [name for name, p in self.grown.owner_map()[HOST] if p.requires_grad and p.grad is None]

    @contextlib.contextmanager
    def host_only(self) -> Iterator[None]:
        """Within the block the optimizer shows only the host's groups."""
        before = self.optimizer.param_groups
        self.optimizer.param_groups = self.owner.host_groups
        try:
            yield
        finally:
            self.optimizer.param_groups = before

    def advance_schedule(self, unit: str, count: int) -> None:
        """Tells the user's scheduler that an optimizer step or an epoch is over.

        One of torch's steps after the unit that the session's settings name, one of timm's after both, as in timm's own
        loop. A skipped optimizer step counts, so torch's warning is not shown.

        Args:
            unit: ``step`` or ``epoch``.
            count: how many of these are over.
        """
        if self.scheduler is None or (unit != self._per and not _counts_itself(self.scheduler)):
            return
        with self.host_only(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            if not _counts_itself(self.scheduler):
                self.scheduler.step()
            elif unit == "step":
                self.scheduler.step_update(count)
            else:
                self.scheduler.step(count)

    # stepping -----------------------------------------------------------------------------------------------------

    def scale(self, device: torch.device) -> Tensor | None:
        """The loss scale, 0-D on the device; None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def step_mean(self, passes: int) -> StepReport:
        """Steps on the mean of the gradients that ``passes`` backward passes of scaled losses have added up.

        See `ParameterOwner.step_now`.

        Raises:
            LoopError: the optimizer's groups were changed from outside.
        """
        known = self.owner.all_groups
        if sorted(map(id, self.optimizer.param_groups)) != sorted(map(id, known)):
            raise LoopError(
                "the optimizer's groups were changed beside the session (add_param_group, load_state_dict); use "
                "session.load_state_dict, or make the session after it"
            )
        factor = 1.0 / passes / (1.0 if self.scaler is None else self.scaler.get_scale())
        if factor != 1.0:
            for group in known:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        self._stepping = True
        try:
            report = self.owner.step_now()
        finally:
            self._stepping = False
        if self.scaler is not None:
            state, self.overflows, report = move_scale(self.scaler.state_dict(), self.overflows, report)
            self.scaler.load_state_dict(state)
        return report

    # saving -------------------------------------------------------------------------------------------------------

    def host_groups(self) -> list[dict[str, Any]]:
        """The options of the host's groups, and the names of their parameters."""
        names = {id(p): name for name, p in self.grown.owner_parameters()[HOST]}
        return [
            {
                "names": [names[id(p)] for p in group["params"]],
                "options": {
                    key: value for key, value in group.items() if key not in ("params", "param_names", "owner")
                },
            }
            for group in self.owner.host_groups
        ]

    def load_host_groups(self, groups: list[dict[str, Any]]) -> None:
        """Restores `host_groups`.

        Raises:
            CheckpointError: the groups hold other parameters or options than this optimizer's.
        """
        present = self.host_groups()
        if [group["names"] for group in present] != [group["names"] for group in groups]:
            raise CheckpointError(
                "optimizer: its groups hold other parameters than the saved ones; build it as it was built then"
            )
        for index, (group, saved) in enumerate(zip(self.owner.host_groups, groups, strict=True)):
            differing = sorted(set(present[index]["options"]) ^ set(saved["options"]))
            if differing:
                raise CheckpointError(f"optimizer group {index}: option {', '.join(differing)} on one side only")
            group.update(saved["options"])


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    if scheduler is None:
        return None
    if isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "PlateauLRScheduler":
        raise ConfigError(
            f"scheduler = {type(scheduler).__name__}: its step needs a metric that the session does not have; use "
            "another, or leave it out and set the host's lr yourself"
        )
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "state_dict", None)):
        raise ConfigError(f"scheduler = {type(scheduler).__name__}: expected one of torch.optim.lr_scheduler")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError("scheduler: it belongs to another optimizer than the session's")
    try:
        inspect.signature(scheduler.step).bind(*([1] if _counts_itself(scheduler) else []))
    except TypeError as error:
        raise ConfigError(
            f"scheduler = {type(scheduler).__name__}: its step() does not go with a session ({error}); it must take "
            "nothing, as torch's, or have step(epoch) and step_update(num_updates), as timm's"
        ) from None
    return scheduler


def _counts_itself(scheduler: Any) -> bool:
    """Whether it is of timm's kind: ``step_update(num_updates)`` after a step, ``step(epoch)`` after an epoch."""
    return callable(getattr(scheduler, "step_update", None))
