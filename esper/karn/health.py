"""Judges the health of a run from the events of its ticks, as they come. Pure: it decides nothing and waits for nobody.

Each figure is compared with the median of the last ticks, so nothing has to be known of model or machine. An ailment is
told when it has lasted, once, and again only after it was over.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from esper.leyline.events import Ailment, Event, HealthAlert, LossSettled, RolledBack, SeedBorn, StageChanged, TickDone
from esper.leyline.stages import Stage
from esper.nissa.config import HealthConfig

LEAST = 8  # ticks before a median says anything
BEFORE = 5  # ticks whose mean loss a spike is measured against

LOOK_AT = {
    Ailment.THROUGHPUT: "time/steps_ms and time/tick_ms; other jobs on the machine; a seed that has joined (births)",
    Ailment.DATA_WAIT: "data.workers, the disk or network that holds the data, augmentations",
    Ailment.STALL: "the events around this tick: a save, a birth that was compiled, a rank that was stopped",
    Ailment.LOSS: "the decisions of the last ticks, optim.lr; the governor's panics, if it judges so too",
    Ailment.GRADIENT: "slots/*/gradient_ratio for the seed behind it, optim.clip, optim.lr",
    Ailment.STRAGGLER: "that rank's machine: other jobs, heat, its disk; RUN/health has the times of every rank",
    Ailment.HOST_MEMORY: "data.workers and caches on that machine, library.memory_mib, snapshots of the governor",
    Ailment.DEVICE_MEMORY: "slots.max_parameters and slots.max_live, trainer.accumulate; a birth may be vetoed",
}

MUST_LAST = {Ailment.THROUGHPUT, Ailment.DATA_WAIT, Ailment.STRAGGLER}  # all others are told at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank measured of itself in the last interval.

    Fields:
        tick: the tick that ended it.
        own_ms: milliseconds that it worked by itself (data and forward), which no other rank's waits lengthen.
        host_share: share of the machine's memory that is in use, 0 to 1; None if the system does not say.
        device_share: share of the device's memory that is in use; None without one.
    """

    tick: int
    own_ms: float
    host_share: float | None
    device_share: float | None


@dataclass(slots=True)
class _Spike:
    """A loss that is watched after a birth or a blending."""

    slot: str
    blueprint: str
    after: str
    step: int
    tick: int
    base: float
    spread: float
    highest: float = -float("inf")


class HealthJudge:
    """Takes the events of a run and says what is odd.

    Args:
        config: limits.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._past: dict[str, deque[float]] = {}
        self._lasting: dict[tuple[Ailment, int | None], int] = {}
        self._losses: deque[float] = deque(maxlen=config.window)
        self._spikes: list[_Spike] = []

    def take(self, event: Event, works: Mapping[int, Work]) -> list[Event]:
        """Returns what is to be said after an event.

        Args:
            event: any event of rank 0.
            works: what each rank has measured of itself lately; may be empty or late.
        """
        if isinstance(event, RolledBack):  # what came before counts no more
            self._losses.clear()
            self._spikes.clear()
        elif isinstance(event, SeedBorn):
            self._watch(event, event.slot, event.blueprint, "birth")
        elif isinstance(event, StageChanged) and event.target is Stage.BLENDING:
            self._watch(event, event.slot, str(event.blueprint), "blending")
        elif isinstance(event, TickDone):
            return [*self._judge(event), *self._judge_ranks(event, works), *self._settle(event)]
        return []

    def _watch(self, event: Event, slot: str, blueprint: str, after: str) -> None:
        if len(self._losses) >= BEFORE:
            last = list(self._losses)[-BEFORE:]
            spread = median(abs(a - b) for a, b in pairwise(last))
            self._spikes.append(_Spike(slot, blueprint, after, event.step, event.tick, fmean(last), spread))

    def _judge(self, event: TickDone) -> list[Event]:
        config, told = self._config, list[Event]()
        interval_ms = event.steps_ms + event.tick_ms
        rate = 1e3 * event.samples / interval_ms if interval_ms > 0 else 0.0
        wait = event.data_ms / event.steps_ms if event.steps_ms > 0 else 0.0
        usual_rate, usual_ms = self._median("rate", rate), self._median("interval", interval_ms)
        loss, norm = event.train_loss.value, event.host_gradient_norm.value
        if usual_rate is not None:
            words = f"{rate:.4g} samples a second, of late {usual_rate:.4g}"
            share = rate / usual_rate if usual_rate > 0 else 1.0
            told += self._say(event, Ailment.THROUGHPUT, share, config.min_throughput, words)
        words = f"steps waited for data {wait:.0%} of their time"
        told += self._say(event, Ailment.DATA_WAIT, wait, config.max_data_wait, words)
        if usual_ms is not None and usual_ms > 0:
            times = interval_ms / usual_ms
            words = f"the last interval took {interval_ms / 1e3:.3g} s, usually {usual_ms / 1e3:.3g} s"
            told += self._say(event, Ailment.STALL, times, config.stall_times, words)
        told += self._judge_loss(event, loss)
        if norm is not None:
            usual = self._median("norm", norm)
            times = norm / usual if usual else 0.0
            words = f"the host's gradient has norm {norm:.4g}, of late {usual or 0.0:.4g}"
            told += self._say(event, Ailment.GRADIENT, times, config.gradient_times, words)
        return told

    def _judge_loss(self, event: TickDone, loss: float | None) -> list[Event]:
        told: list[Event] = []
        if loss is None:
            return told
        if len(self._losses) >= LEAST:
            past = list(self._losses)
            usual = median(past)
            spread = max(1.4826 * median(abs(value - usual) for value in past), 1e-3 * abs(usual))
            off = (loss - usual) / spread if spread > 0 else 0.0
            words = f"training loss {loss:.4g}, of late {usual:.4g}: {off:.3g} robust deviations above"
            told = self._say(event, Ailment.LOSS, off, self._config.loss_deviations, words)
        self._losses.append(loss)
        return told

    def _judge_ranks(self, event: TickDone, works: Mapping[int, Work]) -> list[Event]:
        config, told = self._config, list[Event]()
        fresh = {rank: work for rank, work in works.items() if event.tick - work.tick <= config.ticks}
        for rank, work in sorted(fresh.items()):
            others = [other.own_ms for number, other in fresh.items() if number != rank]
            usual = median(others) if others else 0.0
            times = work.own_ms / usual if usual > 0 else 0.0
            words = f"rank {rank} worked {work.own_ms:.4g} ms in the last interval, the others {usual:.4g} ms (median)"
            told += self._say(event, Ailment.STRAGGLER, times, config.straggler_times, words, rank)
            for ailment, share in ((Ailment.HOST_MEMORY, work.host_share), (Ailment.DEVICE_MEMORY, work.device_share)):
                if share is not None:
                    words = f"rank {rank}: {share:.0%} of the {ailment.value.replace('_', ' ')} is in use"
                    told += self._say(event, ailment, share, config.max_memory, words, rank)
        return told

    def _say(
        self,
        event: TickDone,
        ailment: Ailment,
        value: float,
        limit: float,
        words: str,
        rank: int | None = None,
    ) -> list[Event]:
        """An alert, if this has been odd for so many ticks in a row; one alert for the whole row."""
        key = (ailment, rank)
        odd = value < limit if ailment is Ailment.THROUGHPUT else value > limit
        self._lasting[key] = self._lasting.get(key, 0) + 1 if odd else 0
        if self._lasting[key] != (self._config.ticks if ailment in MUST_LAST else 1):
            return []
        axes = {"step": event.step, "tick": event.tick, "epoch": event.epoch}
        found = {"value": value, "limit": limit, "words": words, "look_at": LOOK_AT[ailment]}
        return [HealthAlert(**axes, ailment=ailment, rank=rank, **found)]  # type: ignore[arg-type]

    def _median(self, name: str, value: float) -> float | None:
        """The median of the last values, this one left out; None before there are enough."""
        past = self._past.setdefault(name, deque(maxlen=self._config.window))
        found = median(past) if len(past) >= LEAST else None
        past.append(value)
        return found

    def _settle(self, event: TickDone) -> list[Event]:
        told: list[Event] = []
        loss = event.train_loss.value
        for spike in list(self._spikes):
            if loss is None or event.tick <= spike.tick:
                continue
            spike.highest = max(spike.highest, loss)
            back = loss <= spike.base + spike.spread
            if back or event.tick - spike.tick >= self._config.settle_ticks:
                self._spikes.remove(spike)
                told.append(
                    LossSettled(
                        step=event.step,
                        tick=event.tick,
                        epoch=event.epoch,
                        slot=spike.slot,
                        blueprint=spike.blueprint,
                        after=spike.after,
                        height=spike.highest - spike.base,
                        recovery=event.step - spike.step if back else None,
                    )
                )
        return told
