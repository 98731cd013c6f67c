"""One trial as an episode: what it has shown, what was said in it, and what it pays."""

from collections.abc import Mapping
from typing import Any

from esper.leyline.commands import Command
from esper.leyline.protocols import Report
from esper.leyline.stages import Op
from esper.simic.env.reward import Payment, Reward
from esper.simic.env.tasks import GrowthTask
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.options import WITH_OPERATOR, WITH_SPEED, Options


class Episode:
    """One trial at its present tick.

    Fields:
        task: what is learned.
        seed: of the trial.
        report: the latest.
        memory: what features remember.
        reward: pays.
        ticks: steps taken.
        total: reward so far.
        said: the commands of each step, from which a saved episode is lived again.
    """

    def __init__(self, task: GrowthTask, seed: int, report: Report, reward: Reward) -> None:
        self.task, self.seed, self.report, self.reward = task, seed, report, reward
        self.memory = Memory()
        self.memory.note(report.observation)
        self.ticks, self.total = 0, 0.0
        self.said: list[list[Command]] = []

    def take(self, report: Report, commands: list[Command]) -> Payment:
        """Takes in the report of a step; returns what it pays."""
        self.report = report
        self.memory.note(report.observation)
        terms = self.reward.pay(report)
        self.ticks, self.total = self.ticks + 1, self.total + terms.reward
        self.said.append(commands)
        return terms


def why_illegal_choice(row: Mapping[str, Any], choice: Mapping[str, int], options: Options) -> str | None:
    """Checks the heads that matter against the masks of the observation that the choice was made from.

    Returns:
        Which option is not legal; None if all are.
    """
    op, slot = choice["op"], choice["slot"]
    asked: list[tuple[str, bool]] = [("op", bool(row["mask_op"][op]))]
    kind = options.ops[op]
    if kind is not Op.WAIT:
        asked.append(("slot", bool(row["mask_slot"][op, slot])))
    if kind is Op.GERMINATE:
        asked.append(("blueprint", bool(row["mask_blueprint"][slot, choice["blueprint"]])))
    if kind in WITH_OPERATOR:
        which = int(kind is not Op.GERMINATE)
        asked.append(("operator", bool(row["mask_operator"][which, slot, choice["operator"]])))
    if kind in WITH_SPEED:
        line = 1 + choice["operator"] if kind in WITH_OPERATOR else 0
        asked.append(("speed", bool(row["mask_speed"][slot, line, choice["speed"]])))
    for head, legal in asked:
        if not legal:
            return f"option {choice[head]} of head {head!r} is not legal for {kind.name} now"
    return None
