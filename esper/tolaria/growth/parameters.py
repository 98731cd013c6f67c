"""Checks that nothing is trained that may not be: model, optimizer groups and agreed record must tell the same story.

    owner      what      trained
    host       host      always, except for what the host's own code has frozen
    a slot     seed      by stage: TRAINING, BLENDING and HOLDING, until a prune ramp takes it out; a fossil by
                       config, until a prune ramp takes it out
    a slot     gate      with the seed of its slot
    teacher    teacher   never

`esper.tolaria.growth.ownership` acts: it builds groups, freezes, clips, steps. This module only compares. It keeps no
list of its own that could drift: names and owners are read off the model, groups off the optimizer, reasons off the
agreed record. Only a teacher must be made known, and is held weakly. `ParameterChecker.check` names each parameter that
contradicts: in two optimizer groups or in none, in a group of another owner, or learning though it may not.
"""

import gc
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.accord.lifecycle import SlotState, learns
from esper.accord.state import RunState
from esper.kasmina.slots.grown import HOST, Grown
from esper.leyline.errors import OwnershipError
from esper.leyline.stages import Stage
from esper.tolaria.growth.ownership import ParameterOwner

TEACHER = "teacher"


def why_frozen(entry: SlotState, *, train_fossils: bool) -> str:
    """Why a slot's seed is not trained, for an error; empty exactly where `learns` says that it is."""
    if learns(entry.stage, ending=entry.ending, train_fossils=train_fossils):
        return ""
    if entry.ending:
        return "its prune ramp is running: what is blended out does not learn"
    if entry.stage is Stage.FOSSILIZED:
        return "a fossil, and slots.train_fossils = false"
    if entry.stage is Stage.GERMINATED:
        return "GERMINATED: it learns from TRAINING on, once it has passed G1"
    return f"{entry.stage.name}: there is no seed"


class ParameterChecker:
    """Checks the parameters of one grown model and its teacher.

    Args:
        grown: host and slots.
        owner: owns the optimizer.
    """

    def __init__(self, grown: Grown, owner: ParameterOwner) -> None:
        self.grown, self.owner = grown, owner
        self._frozen: dict[str, str] = {}
        self._teacher: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self._guard: Any = None
        self._learning: list[nn.Parameter] = []
        self._still: list[nn.Parameter] = []

    def follow(self, state: RunState, *, train_fossils: bool) -> None:
        """Reads the reasons off the agreed state; called at every tick, after seeds and gates have come and gone."""
        self._frozen = {
            entry.slot: why_frozen(entry, train_fossils=train_fossils) for entry in state.slots if entry.stage.has_seed
        }

    def note_learning(self) -> None:
        """Remembers which parameters require a gradient now, as the model is wrapped."""
        everyone = [parameter for named in self.grown.owner_map().values() for _, parameter in named]
        self._learning = [parameter for parameter in everyone if parameter.requires_grad]
        self._still = [parameter for parameter in everyone if not parameter.requires_grad]

    def forget_learning(self) -> None:
        """Lets go of those parameters, some of which are no longer the model's."""
        self._learning, self._still = [], []

    def has_changed(self) -> bool:
        """Whether one of them no longer does, or another does; asked in every step, so no name is looked up."""
        return bool([p for p in self._learning if not p.requires_grad] or [p for p in self._still if p.requires_grad])

    def explain_refusal(self, owner: str, parameter: nn.Parameter) -> str:
        """Why a parameter of the host or of a slot may not be trained now; empty if it may."""
        if owner != HOST and owner not in self._frozen:
            return "planted since the last tick: its stage is not agreed yet"
        if owner != HOST:
            return self._frozen[owner]
        return "" if parameter.requires_grad else "frozen by the host's own code: requires_grad is False"

    def check(self) -> None:
        """Compares model, optimizer and record.

        Raises:
            OwnershipError: names every contradiction by its parameter.
        """
        self._check_teacher()
        groups: dict[int, list[str]] = {}
        strays: dict[int, Tensor] = {}
        for group in self.owner.optimizer.param_groups:
            for parameter in group["params"]:
                groups.setdefault(id(parameter), []).append(str(group.get("owner", "nobody")))
                strays[id(parameter)] = parameter
        problems = []
        for owner, named in self.grown.owner_parameters().items():
            for name, parameter in named:
                strays.pop(id(parameter), None)
                of = groups.get(id(parameter), [])
                if not of and owner == HOST and not parameter.requires_grad:
                    continue  # a user's optimizer need not hold what the user has frozen
                if not of:
                    problems.append(f"{name} of {owner} stands in no optimizer group")
                elif len(of) > 1:
                    problems.append(f"{name} of {owner} stands in {len(of)} optimizer groups, of {' and '.join(of)}")
                elif of != [owner]:
                    problems.append(f"{name} of {owner} stands in an optimizer group of {of[0]}")
                refusal = self.explain_refusal(owner, parameter)
                if refusal and parameter.requires_grad:
                    problems.append(f"{name} of {owner} may not be trained ({refusal}), but requires_grad is True")
        for parameter in strays.values():
            shape = tuple(parameter.shape)
            problems.append(f"an optimizer group holds a parameter of shape {shape} that is not in the model")
        if problems:
            raise OwnershipError("; ".join(problems))

    # the teacher --------------------------------------------------------------------------------------------------

    def adopt_teacher(self, module: nn.Module) -> None:
        """Freezes a teacher for good, puts it into eval() and checks its parameters from now on.

        From then on no optimizer step runs while one of them stands in a group, requires a gradient or has one.

        Raises:
            OwnershipError: there is a teacher already, or it shares a parameter with the model.
        """
        if self._teacher:
            raise OwnershipError("there is a teacher already: release it first")
        own = {id(p): name for named in self.grown.owner_parameters().values() for name, p in named}
        for name, parameter in module.named_parameters():
            if id(parameter) in own:
                raise OwnershipError(
                    f"{name} of the teacher is {own[id(parameter)]} of the model: a teacher must stand by itself"
                )
        module.eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.grad = None
            self._teacher[id(parameter)] = (f"{TEACHER}.{name}", weakref.ref(parameter))
        self._guard = self.owner.optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._check_teacher()

    def _check_teacher(self) -> None:
        """Raises OwnershipError if a parameter of the teacher could be trained."""
        if not self._teacher:
            return
        for group in self.owner.optimizer.param_groups:
            for parameter in group["params"]:
                entry = self._teacher.get(id(parameter))
                if entry is not None and entry[1]() is parameter:
                    raise OwnershipError(f"{entry[0]} stands in an optimizer group: a teacher is not trained")
        for name, ref in self._teacher.values():
            parameter = ref()
            if parameter is not None and parameter.requires_grad:
                raise OwnershipError(f"{name} requires a gradient: a teacher is not trained")
            if parameter is not None and parameter.grad is not None:
                raise OwnershipError(f"{name} has been given a gradient: a teacher is not trained")

    def release_teacher(self) -> None:
        """Forgets the teacher, so that its memory is freed once its holder drops it. Safe to call without one."""
        if self._guard is not None:
            self._guard.remove()
        self._teacher, self._guard = {}, None
        gc.collect()  # a model with hooks on itself is a reference cycle
