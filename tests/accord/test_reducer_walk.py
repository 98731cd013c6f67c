"""A random walk through lives: whatever is asked, vetoed or measured, the reducer keeps to its rules.

Several slots live at once under drawn terms; commands are legal or absurd, seeds break, builds are vetoed. After each
tick the agreed state is compared with a model that knows only what was planted where, and with the table of edges.
"""

import json
import random
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.accord.config import EvidencePolicy
from esper.accord.effects import Discard, Prepare, Register, Uproot, Veto
from esper.accord.evidence.plan import ProbePlan
from esper.accord.facts import max_looks
from esper.accord.lifecycle import SlotState
from esper.accord.observation import observation_of
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.leyline.alpha import AlphaMode, Curve
from esper.leyline.commands import Command, wait
from esper.leyline.events import CommandJudged, CommandRefused, RampCommitted, StageChanged
from esper.leyline.evidence import ABSENT
from esper.leyline.legality import legal_ops
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import EDGES, Incubation, Mechanical, Op, Stage
from tests.support.agreed_states import CATALOGUE, Run, make_terms

WALKED: Counter[tuple[Stage, str, Stage]] = Counter()
TABLE = {(edge.source, edge.cause.name, edge.target) for edge in EDGES}
COST = {info.name: info for info in CATALOGUE}
FORWARD = (Op.GERMINATE, Op.ADVANCE)

ANSWERS = [(100, 50.0, 26.0)] * 3 + [(100, -50.0, 26.0), (0, 0.0, 0.0)]
VETOES = [None] * 3 + [(Veto.NOT_READY, 1), (Veto.BUILD_FAILED, 0), (Veto.OUT_OF_MEMORY, 1)]
ABSURD = [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")]


def sensible(rng: random.Random, slot: str, op: Op) -> Command:
    """A command whose arguments make sense."""
    blueprint = rng.choice(["light", "noop", "heavy"]) if op is Op.GERMINATE else None
    target = rng.choice([1.0, 1.0, 1.0, 0.5, 0.25, 0.0])
    curve, ticks = rng.choice(list(Curve)), rng.choice([0, 1, 2, 3])
    return Command(slot=slot, op=op, blueprint=blueprint, curve=curve, ticks=ticks, target=target)


def absurd(rng: random.Random, slot: str) -> Command:
    """Any op with any argument."""
    return Command(
        slot=slot,
        op=rng.choice(list(Op)),
        blueprint=rng.choice([None, "light", "missing"]),
        curve=rng.choice(list(Curve)),
        ticks=rng.choice([-1, 0, 2, 10**6]),
        target=rng.choice(ABSURD),
        steepness=rng.choice(ABSURD),
    )


class Life:
    """Ticks of one run; ``beside`` and ``planted`` are what an owner of the model would hold by the effects alone."""

    def __init__(self, terms: Terms, rng: random.Random) -> None:
        self.terms, self.rng = terms, rng
        self.run = Run(terms, stage_ticks=2)
        self.beside: set[str] = set()
        self.planted: set[str] = set()
        self.drawn: set[tuple[str, str, int]] = set()
        self.pruned_at: dict[str, int] = {}
        self.proposal = 0
        self.deeds = [self.go_forward] * 3 + [
            self.do_anything_legal,
            self.do_anything_legal,
            self.ask_absurd_things,
            self.wait,
            self.veto,
            self.break_it,
            self.doubt,
        ]

    # what happens -------------------------------------------------------------------------------------------------

    def go_forward(self) -> None:
        """Empty slots germinate and seeds advance wherever they may; those at full alpha do anything legal."""
        seen = observation_of(self.run.state, self.terms)
        legal = [(view.slot, op) for view in seen.slots for op in FORWARD if op in legal_ops(seen, view)]
        held = [view for view in seen.slots if view.stage is Stage.HOLDING]
        legal += [(view.slot, self.rng.choice(legal_ops(seen, view))) for view in held]
        self.step([sensible(self.rng, slot, op) for slot, op in legal], evidence=self.rng.choice(ANSWERS))

    def do_anything_legal(self) -> None:
        """Any legal op in every slot."""
        seen = observation_of(self.run.state, self.terms)
        ops = [(view.slot, self.rng.choice(legal_ops(seen, view))) for view in seen.slots]
        self.step([sensible(self.rng, slot, op) for slot, op in ops], evidence=self.rng.choice(ANSWERS))

    def ask_absurd_things(self) -> None:
        """Any op with any argument in every slot."""
        self.step([absurd(self.rng, slot) for slot in self.terms.places], evidence=self.rng.choice(ANSWERS))

    def wait(self) -> None:
        """Nothing is asked."""
        self.step([], evidence=self.rng.choice(ANSWERS))

    def veto(self) -> None:
        """Staged seeds are vetoed, or pruned before they are born."""
        staged = [slot.slot for slot in self.run.state.slots if slot.staged is not None]
        said = {slot: code for slot in staged if (code := self.rng.choice(VETOES)) is not None}
        commands = [sensible(self.rng, slot, self.rng.choice([Op.WAIT, Op.PRUNE])) for slot in staged]
        self.step(commands, vetoes=said)

    def break_it(self) -> None:
        """A slot's gradient, or the host's, is not finite."""
        slot, row = self.rng.choice(list(self.terms.places)), self.rng.choice([0, 0, 0, 2, 3])
        broken = {f"{slot}__nonfinite": self.rng.choice([0, 1]), f"{slot}__degraded": self.rng.choice([0, 1, 2])}
        self.step([], skipped=row, skipped_in_row=row, **broken)

    def doubt(self) -> None:
        """For some ticks all speaks against every seed; fossils are pruned where that is legal, and some taken back."""
        for _ in range(6):
            seen = observation_of(self.run.state, self.terms)
            fossils = [view for view in seen.slots if view.stage is Stage.FOSSILIZED]
            asked = [Command(slot=view.slot, op=Op.PRUNE, ticks=3) for view in fossils if not view.ending]
            back = [Command(slot=view.slot, op=Op.SET_ALPHA_TARGET, ticks=1) for view in fossils if view.ending]
            self.step([*asked, *(one for one in back if self.rng.random() < 0.3)], evidence=ANSWERS[3])

    # what must hold -----------------------------------------------------------------------------------------------

    def step(self, commands, *, evidence=ANSWERS[0], vetoes=None, **values) -> None:
        numbered = []
        for command in commands:
            self.proposal += 1
            numbered.append(
                Command(**{f: getattr(command, f) for f in Command.__slots__} | {"proposal": self.proposal})
            )
        before = self.run.state
        answers = dict.fromkeys(self.terms.places, evidence)
        self.run.tick(*numbered, vetoes=vetoes, evidence=answers, **values)
        asked = {slot: wait(slot) for slot in self.terms.places} | {c.slot: c for c in numbered}
        self.same_again(asked, vetoes or {})
        self.follow_effects()
        self.budgets_hold()
        for old, mid, new in zip(before.slots, self.run.absorbed.slots, self.run.state.slots, strict=True):
            events = [e for e in self.run.out.events if getattr(e, "slot", None) == new.slot]
            self.stages_follow_the_table(mid, new, events, asked[new.slot])
            self.alpha_goes_on(mid, new, events)
            self.looks_are_bounded(new)
            self.endings_hold(old, mid, new, events)
        self.verdicts(numbered)
        assert self.run.state.proposals == max(before.proposals, *(c.proposal for c in asked.values()))

    def same_again(self, asked: dict[str, Command], said: dict[str, tuple[Veto, int]]) -> None:
        """The same inputs give the same outcome; every few ticks they go through a file before."""
        state, absorbed = self.run.state, self.run.absorbed
        if self.rng.random() < 0.2:
            read = from_plain(RunState, json.loads(json.dumps(to_plain(state))))
            assert read == state
            assert digest62(read) == digest62(state)
            absorbed = from_plain(RunState, json.loads(json.dumps(to_plain(absorbed))))
        again = reduce_tick(absorbed, asked, said, self.terms, stage_ticks=self.run.stage_ticks)
        assert again.state == state
        assert again.effects == self.run.out.effects
        assert [(type(e), e) for e in again.events] == [(type(e), e) for e in self.run.out.events]

    def follow_effects(self) -> None:
        for effect in self.run.out.effects:
            slot = effect.slot
            if isinstance(effect, Prepare):
                assert slot not in self.beside | self.planted
                assert effect.generation == self.run.slot(slot).generation + 1
                self.beside.add(slot)
            elif isinstance(effect, Register):
                self.beside.remove(slot)
                self.planted.add(slot)
            elif isinstance(effect, Discard):
                self.beside.remove(slot)
            else:
                assert isinstance(effect, Uproot)
                self.planted.remove(slot)
        slots = self.run.state.slots
        assert self.planted == {slot.slot for slot in slots if slot.stage.has_seed}
        assert self.beside == {slot.slot for slot in slots if slot.staged is not None}
        assert all(slot.stage is Stage.EMPTY for slot in slots if slot.staged is not None)

    def budgets_hold(self) -> None:
        config, state = self.terms.slots_config, self.run.state
        live = sum(slot.stage.is_live for slot in state.slots) + len(self.beside)
        assert config.max_live is None or live <= config.max_live
        assert config.max_germinations is None or state.germinations <= config.max_germinations
        paid = [slot.blueprint for slot in state.slots if slot.stage.has_seed]
        paid += [slot.staged.blueprint for slot in state.slots if slot.staged is not None]
        total = sum(COST[name].parameters for name in paid)
        assert config.max_parameters is None or total <= config.max_parameters

    def stages_follow_the_table(self, mid: SlotState, new: SlotState, events, asked: Command) -> None:
        moves = [event for event in events if isinstance(event, StageChanged)]
        stage = mid.stage
        for event in moves:
            assert event.source is stage
            assert (event.source, event.cause, event.target) in TABLE
            WALKED[event.source, event.cause, event.target] += 1
            stage = event.target
        assert stage is new.stage
        assert len(moves) <= 1 or all(event.cause == Mechanical.COOLDOWN.name for event in moves)
        own = [e for e in self.run.events(CommandJudged) if e.command == asked and asked.op is not Op.WAIT]
        if own and not moves and mid.stage.is_blended and asked.op in (Op.SET_ALPHA_TARGET, Op.PRUNE):
            assert (mid.stage, asked.op.name, new.stage) in TABLE
            WALKED[mid.stage, asked.op.name, new.stage] += 1
        assert new.since_tick == (self.run.state.tick if moves else mid.since_tick)
        assert new.generation == mid.generation + any(event.target is Stage.GERMINATED for event in moves)
        assert len(new.history) <= self.terms.slots_config.history
        if moves and new.stage is not Stage.FOSSILIZED:
            assert new.contribution is ABSENT
        if not moves and not own and new.staged == mid.staged:
            assert new.stage is mid.stage
            if mid.frozen_step is None or new.frozen_step is not None:
                assert new.ramp == mid.ramp
            elif mid.ramp is not None:  # it stood still for a while, and goes on later by as much
                late = self.run.state.step - mid.frozen_step if mid.frozen_step < mid.ramp.last_step else 0
                assert new.ramp.last_step == mid.ramp.last_step + late
            assert new.contribution == mid.contribution

    def alpha_goes_on(self, mid: SlotState, new: SlotState, events) -> None:
        step = self.run.state.step
        path = [new.alpha(step + ahead) for ahead in range(40)]
        assert all(0.0 <= alpha <= 1.0 for alpha in path)
        assert path in (sorted(path), sorted(path, reverse=True))
        ramps = [event for event in events if isinstance(event, RampCommitted)]
        assert len(ramps) <= 1
        for event in ramps:
            assert event.start == mid.alpha(step)
            back = mid.stage is Stage.FOSSILIZED and mid.ending and event.target == 1.0
            assert mid.alpha_mode(step) is AlphaMode.HOLD or back
            assert event.first_step == step
        if not new.stage.is_blended:
            assert set(path) == {0.0}
        elif ramps and ramps[0].last_step == step:
            assert path[0] == ramps[0].target
        else:
            assert path[0] == mid.alpha(step)
        assert new.stage is not Stage.HOLDING or mid.stage is Stage.HOLDING or path[0] == 1.0

    def looks_are_bounded(self, new: SlotState) -> None:
        plan, asked = self.terms.probe, new.request
        assert 0 <= new.drawn <= plan.shares
        if asked is not None and asked.refill:
            assert new.stage in (Stage.HOLDING, Stage.FOSSILIZED)
            assert (asked.counts, asked.look, new.drawn) == (True, new.refilled + 1, plan.shares)
            assert plan.refills[new.refilled] >= self.run.state.step + self.terms.tick_steps
        elif asked is not None and asked.counts:
            most = plan.shares if new.stage in (Stage.HOLDING, Stage.FOSSILIZED) else max_looks(new.stage, self.terms)
            assert asked.look == new.drawn + 1 <= most
            assert (new.slot, asked.draw, asked.look) not in self.drawn, "no share of the probe counts twice in a life"
            self.drawn.add((new.slot, asked.draw, asked.look))
        elif asked is not None:
            assert asked.look <= max(new.drawn, 1), "what is told only was drawn before"
        if new.evidence is not None:
            assert new.evidence.begun + new.evidence.looks + new.evidence.void <= new.drawn + new.refilled
            assert new.evidence.start < max(new.starts, 1)

    def endings_hold(self, old: SlotState, mid: SlotState, new: SlotState, events) -> None:
        tick = self.run.state.tick
        if old.stage is Stage.FOSSILIZED:
            assert new.stage is Stage.FOSSILIZED or (new.stage is Stage.PRUNED and old.ending)
            kept = ("generation", "blueprint", "since_tick", "history", "target")
            asked = any(isinstance(event, RampCommitted) for event in events)
            for field in () if new.stage is Stage.PRUNED else kept if asked else (*kept, "ramp", "ending"):
                assert getattr(new, field) == getattr(old, field)
        if new.stage is Stage.PRUNED and mid.stage is not Stage.PRUNED:
            self.pruned_at[new.slot] = tick
        if new.stage.is_cooling:
            kept = {f: getattr(new, f) for f in ("slot", "stage", "since_tick", "generation", "proposal", "history")}
            assert new == SlotState(**kept)
        if old.stage.is_cooling and not new.stage.is_cooling:
            assert new.stage is Stage.EMPTY
            assert tick - self.pruned_at.pop(new.slot) == 1 + self.terms.slots_config.embargo_ticks + 1
        back = mid.stage is Stage.FOSSILIZED and not new.ending and any(isinstance(e, RampCommitted) for e in events)
        if mid.ending and not back:
            assert new.stage is Stage.PRUNED or (new.ending and new.ramp == mid.ramp)
            assert new.request is None
        if mid.ending and back:
            assert (new.stage, new.ramp.target, new.ramp.start) == (
                Stage.FOSSILIZED,
                1.0,
                mid.alpha(self.run.state.step),
            )
        if new.ending:
            assert (new.stage in (Stage.BLENDING, Stage.FOSSILIZED), new.ramp.target) == (True, 0.0)

    def verdicts(self, numbered) -> None:
        """Each request has one verdict; no ramp is interrupted but by PRUNE now; a refusal has a reason."""
        done = {e.command.proposal: e for e in self.run.events(CommandJudged) if e.command.proposal}
        refused = {e.command.proposal: e for e in self.run.events(CommandRefused)}
        assert not set(done) & set(refused)
        assert set(done) | set(refused) == {c.proposal for c in numbered if c.op is not Op.WAIT}
        assert all(event.reason and not event.applied for event in refused.values())
        for command in numbered:
            mid, new = self.run.absorbed.slot(command.slot), self.run.slot(command.slot)
            if command.proposal in done:
                if mid.stage is Stage.FOSSILIZED:
                    assert command.op is (Op.SET_ALPHA_TARGET if mid.ending else Op.PRUNE)
                    assert command.ticks > 0 or mid.ending
                    continue
                if mid.alpha_mode(self.run.state.step) is not AlphaMode.HOLD or mid.ending:
                    assert command.op is Op.PRUNE
                    assert command.ticks == 0
            if command.op is Op.PRUNE and command.ticks == 0 and mid.stage.is_live and 0.01 <= command.steepness <= 50:
                assert new.stage is Stage.PRUNED


drawn_terms = st.builds(
    make_terms,
    st.sampled_from([3, 1, 2]),
    incubation=st.sampled_from(Incubation),
    embargo_ticks=st.integers(0, 2),
    max_live=st.sampled_from([None, 2, 1]),
    max_germinations=st.sampled_from([None, 9]),
    max_parameters=st.sampled_from([None, 910]),
    history=st.just(5),
    tick_steps=st.sampled_from([1, 10]),
    probe=st.builds(
        ProbePlan,
        samples=st.just(400),
        clusters=st.sampled_from([400, 80]),
        looks=st.just(5),
        reserve=st.sampled_from([0, 2, 6]),
        refills=st.sampled_from([(), (400, 300, 300, 200, 100, 50, 20)]),
    ),
    gates=st.fixed_dictionaries(
        {
            "evidence": st.sampled_from(EvidencePolicy),
            "auto_advance": st.sampled_from([[], ["G1", "G2", "G3"]]),
            "look_every": st.integers(1, 2),
            "relook_every": st.just(2),
            "fossil_every": st.just(2),
            "degraded_ticks": st.integers(0, 1),
        }
    ),
)


def test_every_walk_keeps_the_rules_and_together_they_walk_every_edge():
    WALKED.clear()

    @settings(max_examples=70, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn_terms, st.integers(0, 2**32), st.integers(50, 60))
    def walk(terms: Terms, seed: int, length: int) -> None:
        life = Life(terms, random.Random(seed))
        for _ in range(length):
            life.rng.choice(life.deeds)()

    walk()
    assert sum(WALKED.values()) > 1000
    walked_here = {edge for edge in TABLE if edge[1] != Mechanical.ROLLBACK.name}  # those are the governor's
    assert set(WALKED) == walked_here, f"never walked: {sorted(map(str, walked_here - set(WALKED)))}"
