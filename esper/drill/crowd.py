"""A crowd of ranks in a random run with random vetoes and delays, and at most one fault at the end.

    run_crowd(Crowd(ranks=1024, slots=12, ticks=3, fault=FaultKind.STAGE))

Each rank is a whole `Replica`: its own slots and seeds, the shipped growth, controller, cycle and lockstep. Rank 0
decides by the random controller. At every tick some ranks veto a birth, or say that it is not ready. The fault strikes
one rank at the last tick; there is one more tick, for a rank that is lost after its commit.
"""

import random
import statistics
from dataclasses import dataclass

from esper.accord.config import EvidencePolicy, GateConfig, SlotsConfig
from esper.accord.effects import Veto
from esper.accord.state import RunState
from esper.drill.bus import Bus, ProtocolBroken, RankEnd
from esper.drill.faults import FaultKind, InjectedFault
from esper.drill.replica import Replica, build_chain, terms_for
from esper.leyline.events import Event
from esper.leyline.fields import Checks
from esper.leyline.plain import digest62
from esper.leyline.protocols import NullSink
from esper.leyline.stages import Incubation
from esper.tamiyo.random import RandomConfig, RandomController
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World

BLUEPRINTS = ("lora", "norm")
VETOES = (Veto.NOT_READY, Veto.BUILD_FAILED, Veto.OUT_OF_MEMORY)


@dataclass(kw_only=True, slots=True)
class Crowd:
    """Settings of a crowd: its size, its length, and its fault.

    Fields:
        ranks: number of ranks.
        slots: number of slots.
        ticks: number of ticks.
        seed: decides commands, vetoes and delays.
        fault: strikes at the last tick, on a rank drawn from the seed; None for none. The first tick must be healthy.
    """

    ranks: int
    slots: int = 12
    ticks: int = 4
    seed: int = 0
    fault: FaultKind | None = None

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("ranks", self.ranks >= 2, "must be >= 2")
            check("slots", self.slots >= 1, "must be >= 1")
            check("ticks", self.ticks >= (1 if self.fault is None else 2), "must be >= 1, and >= 2 with a fault")

    def build_fault(self) -> InjectedFault | None:
        """The fault with its rank and tick; None if there is none."""
        if self.fault is None:
            return None
        rank = 0 if self.fault is FaultKind.DECIDE else random.Random(f"{self.seed}/struck").randrange(self.ranks)
        return InjectedFault(self.fault, rank, self.ticks)


class EventList(NullSink):
    """Keeps the events of one rank."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keeps it."""
        self.events.append(event)


@dataclass(frozen=True, slots=True)
class Life:
    """The result of a rank that reached the end: digests of the agreed state after each tick, last state, events."""

    digests: tuple[int, ...]
    state: RunState
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class CrowdResult:
    """The result of a crowd.

    Fields:
        ranks: the end of each rank.
        bytes_per_tick: bytes that a rank sends in a healthy tick.
        collectives: collectives that it enters in a healthy tick.
        ms_per_tick: median over ranks of the CPU milliseconds per tick, model and seeds included.
    """

    ranks: list[RankEnd[Life]]
    bytes_per_tick: int
    collectives: int
    ms_per_tick: float


def _vetoes(crowd: Crowd, rank: int, state: RunState) -> dict[str, Veto]:
    """This rank's vetoes in a tick; on average one rank of the crowd vetoes each staged seed."""
    draw = random.Random(f"{crowd.seed}/vetoes/{rank}/{state.tick}")
    staged = [entry.slot for entry in state.slots if entry.staged is not None]
    return {slot: draw.choice(VETOES) for slot in staged if draw.random() < 1.0 / crowd.ranks}


class Setting:
    """The sites and terms that the ranks of a crowd share."""

    def __init__(self, setup: Crowd) -> None:
        self.sites = build_chain(setup.slots).sites
        slots = SlotsConfig(incubation=Incubation.SHADOW, max_live=None, embargo_ticks=1)
        gates = GateConfig(evidence=EvidencePolicy.OBSERVE, first_look=1, look_every=1, min_samples=8)
        self.terms = terms_for(self.sites, setup.ranks, slots, gates, names=BLUEPRINTS)


def live(world: World, setup: Crowd, setting: Setting) -> Life:
    """Runs one rank to its end, on a `Bus` or with real process groups."""
    sink = EventList() if world.rank == 0 else NullSink()
    controller = RandomController(RandomConfig(rate=0.8, max_ticks=2), slots=tuple(setting.sites), seed=setup.seed)
    replica = Replica(
        world,
        build_chain(setup.slots, setting.sites),
        setting.terms,
        ControlConfig(digest_every=2),
        controller=controller if world.rank == 0 else None,
        sink=sink,
        seed=setup.seed,
    )
    injected, digests = setup.build_fault(), []
    for tick in range(1, setup.ticks + (injected is not None) + 1):
        fault = injected if injected is not None and injected.tick == tick else None
        replica.tick(fault=fault, vetoes=_vetoes(setup, world.rank, replica.state))
        digests.append(digest62(replica.state))
    return Life(tuple(digests), replica.state, tuple(sink.events) if isinstance(sink, EventList) else ())


def run_crowd(setup: Crowd) -> CrowdResult:
    """Runs a crowd; see the module.

    Raises:
        ProtocolBroken: ranks did not enter the same collectives.
    """
    setting = Setting(setup)
    ends = Bus(setup.ranks, seed=setup.seed).run(lambda world: live(world, setup, setting))
    whole = [rank for rank in ends if rank.calls[:2] == ["observe", "commit"]]  # took a whole tick
    sent = {sum(rank.sent[:2]) for rank in whole}
    healthy = {rank.calls.index("observe", 1) if rank.calls.count("observe") > 1 else len(rank.calls) for rank in whole}
    if len(sent) != 1 or len(healthy) != 1:
        raise ProtocolBroken(f"in their first tick ranks sent {sorted(sent)} bytes in {sorted(healthy)} collectives")
    return CrowdResult(
        ranks=ends,
        bytes_per_tick=sent.pop(),
        collectives=healthy.pop(),
        ms_per_tick=1e3 * statistics.median(rank.seconds for rank in ends) / setup.ticks,
    )


def strip_ages(text: str) -> str:
    """Removes from an error text how long ago a rank was seen, since ranks look at different moments."""
    return ", ".join(part for part in text.split(", ") if not part.split(" s ago")[0].replace(".", "").isdigit())
