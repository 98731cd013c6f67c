"""The owner of the optimizer: builds parameter groups, sets rates, freezes, judges gradients, clips and steps.

The host and every slot are owners. Each has parameter groups of its own (with and without weight decay), in canonical
order: host first, then slots row-major, never the order of birth. A birth adds groups and leaves old moments alone.
State is saved by parameter name, since flat indices would hand a seed's moments to another layer. That nothing is
trained that may not be is checked in `esper.tolaria.growth.parameters`.

The learning rate is a pure function of the optimizer step, so it survives growth and resume:

    host   lr * shape(step),   shape = linear warm-up, then constant, wsd, cosine or linear down to final_lr_fraction
    seed   host * seed_lr_scale * min(1, (step - learn_step + 1) / seed_warmup_steps)

Gradients are judged and clipped per owner, so a slot cannot touch the host's update. A fused optimizer does this
without a wait for the device (see `esper.tolaria.growth.guard`); others wait once per step, and all where a site may be
left out of a forward: a seed takes no step where its site ran on no rank.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST, Grown
from esper.leyline.errors import CheckpointError, ConfigError
from esper.tolaria.growth.config import OptimConfig, OptimizerKind
from esper.tolaria.growth.guard import Judgement, StepReport, build_found_inf, leave_idle, read_report, stack_norms
from esper.tolaria.growth.health import GradientMeter, norms_one_by_one
from esper.tolaria.growth.policy import Group, GroupPolicy, Scheduled


class ParameterOwner:
    """Owns the optimizer of a grown model.

    Args:
        grown: the model.
        config: settings of the optimizer.
        total_steps: of the run, for the schedule.
        adopted: an existing optimizer whose groups are the host's, and the policy of its groups; None builds the
            optimizer that the config describes.

    Fields:
        optimizer: one torch optimizer for all owners.
        late: whether it is fused, and steps are judged on the device.
        health: gradient health by owner.
    """

    def __init__(
        self,
        grown: Grown,
        config: OptimConfig,
        total_steps: int,
        *,
        adopted: tuple[torch.optim.Optimizer, GroupPolicy] | None = None,
    ) -> None:
        self.grown, self.config = grown, config
        self._groups: dict[str, list[Group]] = {}
        self.health = GradientMeter(
            vanishing_rms=config.vanishing_rms, exploding_rms=config.exploding_rms, every=config.health_every
        )
        self._may_skip = frozenset(slot for slot, site in grown.sites.items() if site.may_skip)
        on_gpu = any(p.device.type == "cuda" for _, p in grown.owner_parameters()[HOST])
        self.late = adopted is None and not self._may_skip and (on_gpu if config.fused is None else config.fused)
        self.policy: GroupPolicy = Scheduled(config, total_steps) if adopted is None else adopted[1]
        self.optimizer = self._build() if adopted is None else adopted[0]
        self._groups[HOST] = list(self.optimizer.param_groups)

    def _build(self) -> torch.optim.Optimizer:
        config, named = self.config, self.grown.owner_parameters()[HOST]
        host, fused = self.policy.groups_for(HOST, named), self.late or None
        if config.kind is OptimizerKind.SGD:
            return torch.optim.SGD(host, lr=config.lr, momentum=config.momentum, fused=fused)
        return torch.optim.AdamW(host, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)

    @property
    def host_groups(self) -> list[Group]:
        """The host's parameter groups."""
        return self._groups[HOST]

    @property
    def all_groups(self) -> list[Group]:
        """The parameter groups of all owners, in canonical order."""
        return [group for groups in self._groups.values() for group in groups]

    # membership ---------------------------------------------------------------------------------------------------

    def register(self, slot: str) -> None:
        """Builds groups for those parameters of a slot that stand in none; their moments start at zero.

        Groups whose parameters have left the slot (a gate's) are dropped with their moments. All others stay.
        """
        named = self.grown.owner_map()[slot]
        present, kept = {id(p) for _, p in named}, []
        for group in self._groups.get(slot, []):
            if all(id(p) in present for p in group["params"]):
                kept.append(group)
            else:
                self._forget(group)
        old = {id(p) for group in kept for p in group["params"]}
        before = len(self.optimizer.param_groups)
        for group in self.policy.groups_for(slot, [(name, p) for name, p in named if id(p) not in old]):
            self.optimizer.add_param_group(group)
        self._groups[slot] = [*kept, *self.optimizer.param_groups[before:]]
        self._in_order()

    def _forget(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            self.optimizer.state.pop(parameter, None)

    def release(self, slot: str) -> None:
        """Forgets a slot's groups and moments; call before the seed is uprooted."""
        for group in self._groups.pop(slot, []):
            self._forget(group)
        self._in_order()
        self.grown.drop_owner_map()

    def _in_order(self) -> None:
        order = [HOST, *(slot for slot in self.grown.slots if slot in self._groups)]
        self.optimizer.param_groups = [group for owner in order for group in self._groups[owner]]

    def owned_slots(self) -> set[str]:
        """The slots of which every parameter of the seed stands in exactly one group, which is the slot's."""
        counts, owned = Counter([id(p) for g in self.optimizer.param_groups for p in g["params"]]), set()
        for slot, holder in [(slot, holder) for slot, holder in self.grown.slots.items() if holder.seed is not None]:
            wanted = sorted([id(p) for p in holder.parameters()])
            grouped = sorted([id(p) for group in self._groups.get(slot, []) for p in group["params"]])
            if wanted == grouped and not [key for key in wanted if counts[key] != 1]:
                owned.add(slot)
        return owned

    def set_learning(self, slot: str, learning: bool) -> None:
        """Freezes or unfreezes a seed; a frozen one has no gradient and no update."""
        for _, parameter in self.grown.owner_map().get(slot, []):
            if parameter.requires_grad != learning:
                parameter.requires_grad_(learning)
            if not learning:
                parameter.grad = None

    def gradient_set(self) -> tuple[str, ...]:
        """Names of the parameters that get a gradient in every step, in canonical order."""
        owners = self.grown.owner_map().values()
        return tuple([name for named in owners for name, parameter in named if parameter.requires_grad])

    # stepping -----------------------------------------------------------------------------------------------------

    def set_lr(self, step: int, learn_steps: Mapping[str, int | None]) -> float:
        """Writes the learning rates of optimizer step ``step``; returns the host's.

        Args:
            step: index of the step to come.
            learn_steps: per slot, the first step in which its seed learns; None while it does not.
        """
        host = self.policy.host_lr(step, self._groups[HOST])
        for owner, groups in self._groups.items():
            if owner == HOST:
                continue
            self.policy.follow_host(groups)
            since = 0 if learn_steps.get(owner) is None else step - int(learn_steps[owner] or 0)
            warm = min(1.0, (since + 1) / self.config.seed_warmup_steps) if self.config.seed_warmup_steps else 1.0
            for group in groups:
                group["lr"] = host * self.config.seed_lr_scale * warm
        return host

    def step(self) -> StepReport | Judgement:
        """Judges, clips and applies the reduced gradients, then clears them, on all ranks alike.

        A slot's non-finite gradient is dropped and reported; only the host's skips the step."""
        return self._step_late() if self.late else self.step_now()

    def step_now(self) -> StepReport:
        """`step` with an optimizer of any kind; waits for the device once."""
        grads, totals = self._judge()
        report = read_report(tuple(totals), stack_norms(totals)) if totals else StepReport({}, (), False)
        report = leave_idle(report, self._may_skip, grads, totals, self._groups)
        self.health.step(grads, {owner: norms_one_by_one(grads[owner]) for owner in report.broken}, self._groups)
        if not report.skipped:
            for owner in report.broken:
                for group in self._groups[owner]:
                    for parameter in group["params"]:
                        parameter.grad = None
            self._clip({owner: total for owner, total in totals.items() if owner not in report.broken})
            self.optimizer.step()
            self.health.count_moved()
        self.optimizer.zero_grad(set_to_none=True)
        return report

    def _step_late(self) -> Judgement:
        """`step` with a fused optimizer, one owner after another, each with its own ``found_inf``."""
        grads, totals = self._judge()
        self.health.step(grads, {owner: total.reshape(1) for owner, total in totals.items()}, self._groups)
        owners = tuple(totals)
        norms_O = stack_norms(totals) if totals else torch.zeros(0, dtype=torch.float64)
        self._clip(totals)  # what is not finite stays so, and is left out below
        optimizer: Any = self.optimizer
        try:
            for owner, found_inf in build_found_inf(owners, norms_O).items():
                optimizer.param_groups, optimizer.found_inf = self._groups[owner], found_inf
                self._before_first_momentum(owner)
                optimizer.step()
        finally:
            vars(optimizer).pop("found_inf", None)
            self._in_order()
        self.health.count_moved()
        optimizer.zero_grad(set_to_none=True)
        return Judgement(owners, norms_O)

    def _judge(self) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Gradients, and the L2 norm of them all, 0-D on the device; each by owner."""
        grads: dict[str, list[Tensor]] = {}
        for owner, groups in self._groups.items():
            own = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if own:
                grads[owner] = own
            elif owner != HOST and not self.grown.beat.find_unused:
                self._refuse_unreached(owner)
            if any(grad.layout is not torch.strided for grad in own):
                self._refuse_sparse()
        return grads, {owner: torch.nn.utils.get_total_norm(own) for owner, own in grads.items()}

    def _refuse_unreached(self, slot: str) -> None:
        """Names a slot whose seed learns and has no gradient at all."""
        if any(parameter.requires_grad for group in self._groups[slot] for parameter in group["params"]):
            raise ConfigError(
                f"no gradient reached the seed of slot {slot} at site {self.grown.sites[slot].module!r}: what it adds "
                "is cut off (detach(), torch.no_grad()) or does not reach the loss; choose another module as site"
            )

    def _refuse_sparse(self) -> None:
        named = self.grown.model.named_parameters()
        names = [name for name, p in named if p.grad is not None and p.grad.layout is not torch.strided]
        raise ConfigError(
            f"the gradient of {', '.join(names[:3])} is sparse, and cannot be judged per owner; make it dense"
        )

    def _clip(self, totals: Mapping[str, Tensor]) -> None:
        for owner, total in totals.items():
            if (norm := self.config.norm_of(owner)) is not None:
                own = [p for group in self._groups[owner] for p in group["params"] if p.grad is not None]
                torch.nn.utils.clip_grads_with_norm_(own, norm, total)

    def _before_first_momentum(self, owner: str) -> None:
        """Sets SGD's momentum to zeros before its first step: if a fused first step is left out, torch would leave that
        memory uninitialised."""
        if self.config.kind is OptimizerKind.SGD and self.config.momentum > 0:
            for group in self._groups[owner]:
                for parameter in group["params"]:
                    if parameter.grad is not None and not self.optimizer.state[parameter]:
                        self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    # saving -------------------------------------------------------------------------------------------------------

    def state_by_name(self, *, copies: bool = True) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name; an empty dict for a parameter that has not been stepped.

        Args:
            copies: return copies of the tensors on the CPU; otherwise the living tensors.
        """
        names = {p: name for named in self.grown.owner_parameters().values() for name, p in named}
        states = {name: self.optimizer.state.get(parameter, {}) for parameter, name in names.items()}
        return {
            name: {
                key: (value.detach().to("cpu", copy=True) if copies else value.detach())
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }
            for name, state in states.items()
        }

    def load_by_name(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores `state_by_name`.

        Raises:
            CheckpointError: a parameter is missing or unknown, or a shape differs.
        """
        named = {name: p for pairs in self.grown.owner_parameters().values() for name, p in pairs}
        missing, unknown = sorted(set(named) - set(state)), sorted(set(state) - set(named))
        if missing or unknown:
            raise CheckpointError(f"optimizer state: missing {missing or 'none'}, unknown {unknown or 'none'}")
        for name, entries in state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and not self.policy.state_fits(value, named[name]):
                    shapes = f"{tuple(value.shape)} for a parameter {tuple(named[name].shape)}"
                    raise CheckpointError(f"optimizer state {key} of {name}: {shapes}")
        self.optimizer.state.clear()
        for name, entries in state.items():
            if entries:
                device = named[name].device
                self.optimizer.state[named[name]] = {
                    key: self._place(key, value, device) for key, value in entries.items()
                }

    def _place(self, key: str, value: Any, device: torch.device) -> Any:
        """A copy of a state entry on the device where the optimizer expects it."""
        if not isinstance(value, Tensor):
            return value
        # A fused or capturable optimizer counts steps on the device, others on the CPU, as in torch's own loading.
        on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return value.clone() if key == "step" and not on_device else value.to(device).clone()
