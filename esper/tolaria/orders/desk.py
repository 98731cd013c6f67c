"""Hands people's orders to the ticks, on rank 0's main thread.

    take   at a tick that took orders before (the run went on from an earlier one): those again, from the journal
           at any other: those that wait, at most one for each slot and one to the whole run, written down first
    tell   what became of them: an event, an answer, and the level of telemetry

An order to a slot is a command like a controller's: it gets a proposal id, is judged by legality and its gate, and is
committed. What cannot even travel (a slot or a blueprint that this run does not have) is refused before the journal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.accord.effects import Outcome
from esper.accord.orders.steering import BREAKER
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.leyline.commands import Command, wait
from esper.leyline.errors import EsperError, one_line
from esper.leyline.events import CommandJudged, Event, OrdersRefused, OrderTaken
from esper.leyline.orders.answer import Answer
from esper.leyline.orders.answer import Outcome as Became
from esper.leyline.orders.order import Order, command_of
from esper.leyline.orders.verbs import NO_ORDER, PHASES, Refusal, RunOrder, RunVerb
from esper.leyline.protocols import EventSink
from esper.leyline.stages import Op
from esper.nissa.lane import say
from esper.tolaria.lockstep.desk import Taken
from esper.tolaria.lockstep.propose import check_command
from esper.tolaria.orders.clerk import Clerk
from esper.tolaria.orders.journal import Entry, Journal

DRY_RUNS = 8  # judged in one tick


@dataclass(frozen=True, slots=True)
class _Served:
    """An order of this tick."""

    entry: Entry
    asked: Command | RunOrder
    again: bool


def _what(order: Order) -> str:
    """What an order is about: a slot, the breaker, or the whole run."""
    return order.slot or (BREAKER if order.command == "breaker" else "")


class OrderDesk:
    """The desk of one attempt.

    Args:
        journal: of the run.
        clerk: takes in new orders; None if the run takes none.
        sink: takes the events.
        attempt: number of the attempt.
        lease: raises if a newer attempt has begun.
        set_level: sets the level of telemetry; "" sets that of the settings.
        cool_ticks: ticks for which an ordered COOLING lasts; None: the run has no governor, so its breaker stays.
    """

    def __init__(
        self,
        journal: Journal,
        clerk: Clerk | None,
        *,
        sink: EventSink,
        attempt: int,
        lease: Callable[[], None],
        set_level: Callable[[str], None],
        cool_ticks: int | None,
    ) -> None:
        self.journal, self.clerk, self.sink, self.attempt = journal, clerk, sink, attempt
        self._lease, self._set_level, self._cool_ticks = lease, set_level, cool_ticks
        self._served: list[_Served] = []
        self._told: dict[Refusal, int] = {}
        self._level = ""

    def close(self) -> None:
        """Answers what waits, and ends the clerk."""
        if self.clerk is not None:
            self.clerk.close()

    def begin(self, state: RunState) -> None:
        """The run begins, or goes on from this state: orders are taken from here on."""
        self._follow_level(state)
        if self.clerk is not None:
            try:
                self.clerk.start()
            except OSError as error:
                say(f"{self.clerk.files.path}: no orders can be taken there ({error.strerror}); training goes on")
                self.clerk = None

    # a tick -------------------------------------------------------------------------------------------------------

    def take(self, state: RunState, terms: Terms, *, stage_ticks: int) -> Taken:
        """Returns the orders of this tick; see `esper.tolaria.lockstep.desk`."""
        self._served = []
        steering = state.steering
        entries = self.journal.at(state.tick, steering.rollbacks)
        again = bool(entries)
        if entries:
            entries = [e for e in entries if not steering.bars(_what(e.order), e.tick, e.rollbacks)]
        elif self.clerk is not None:
            entries = self._accept(self.clerk, state, terms, stage_ticks)
        commands: dict[str, Command] = {}
        order = NO_ORDER
        for entry in entries:
            try:
                asked = self._check(entry.order, terms, entry.number)
            except ValueError as error:  # of an older version of this run
                say(f"orders: line {entry.number} of the journal is left out: {error}")
                continue
            self._served.append(_Served(entry, asked, again))
            if isinstance(asked, Command):
                commands[asked.slot] = asked
            else:
                order = asked
        return Taken(commands, order)

    def _accept(self, clerk: Clerk, state: RunState, terms: Terms, stage_ticks: int) -> list[Entry]:
        """Writes down the orders that wait, as far as one tick takes them."""
        waiting = clerk.take_all()
        if not waiting:
            return []
        chosen, later, dry = self._choose(clerk, waiting, terms)
        clerk.put_back(later)
        for order in dry:
            try:
                clerk.answer(self._try_out(order, state, terms, stage_ticks))
            except Exception as error:  # a verdict for nobody but its sender must not end the run
                clerk.refuse(Refusal.MALFORMED, one_line(error), order)
        if not chosen:
            return []
        try:
            self._lease()
            return self.journal.append(
                chosen, tick=state.tick, rollbacks=state.steering.rollbacks, attempt=self.attempt
            )
        except (OSError, EsperError) as error:
            for order in chosen:
                clerk.refuse(Refusal.UNWRITTEN, f"the journal cannot be written ({one_line(error)})", order)
            return []

    def _choose(
        self, clerk: Clerk, waiting: Sequence[Order], terms: Terms
    ) -> tuple[list[Order], list[Order], list[Order]]:
        """The orders that this tick takes, those that wait on, and dry runs to judge.

        One for each slot and one to the whole run; a sender's orders stay in their order.
        """
        chosen: list[Order] = []
        later: list[Order] = []
        dry: list[Order] = []
        taken: set[str] = set()
        held: set[str] = set()
        for order in waiting:
            if clerk.judge.now() > order.time_ms + order.valid_ms:
                clerk.refuse(Refusal.EXPIRED, f"no tick came within {order.valid_ms / 1000:g} s", order)
                continue
            try:
                self._check(order, terms, 0)
            except ValueError as error:
                clerk.refuse(Refusal.MALFORMED, str(error), order)
                continue
            place = order.slot or ""
            full = len(dry) >= DRY_RUNS if order.dry_run else place in taken
            if full or order.sender in held:
                held.add(order.sender)
                later.append(order)
            elif order.dry_run:
                dry.append(order)
            else:
                taken.add(place)
                chosen.append(order)
        return chosen, later, dry

    def _check(self, order: Order, terms: Terms, number: int) -> Command | RunOrder:
        """What an order asks of this run.

        Raises:
            ValueError: it cannot be asked of this run.
        """
        asked = command_of(order)
        if isinstance(asked, Command):
            if asked.slot not in terms.places:
                raise ValueError(f"no slot {asked.slot}; this run has {', '.join(terms.places)}")
            if asked.blueprint is not None and asked.blueprint not in terms.names:
                fit = ", ".join(info.name for info in terms.catalogue[asked.slot])
                raise ValueError(f"no blueprint {asked.blueprint!r}; {asked.slot} takes {fit}")
            return check_command(asked)
        if asked.verb is not RunVerb.BREAKER:
            return RunOrder(verb=asked.verb, value=asked.value, number=number)
        if self._cool_ticks is None:
            raise ValueError("this run has no governor (governor.enabled=false), so nothing turns its breaker")
        return RunOrder(verb=asked.verb, value=asked.value, span=self._cool_ticks, number=number)

    def _try_out(self, order: Order, state: RunState, terms: Terms, stage_ticks: int) -> Answer:
        """The verdict on an order, as of this tick; nothing comes of it."""
        asked = self._check(order, terms, 0)
        commands = {entry.slot: wait(entry.slot) for entry in state.slots}
        if isinstance(asked, Command):
            commands[asked.slot] = asked
        whole = asked if isinstance(asked, RunOrder) else NO_ORDER
        outcome = reduce_tick(state, commands, {}, terms, stage_ticks=stage_ticks, order=whole)
        applied, words = _verdict(asked, outcome)
        return _answer(order, state, applied, words, None)

    def tell(self, state: RunState, outcome: Outcome | None) -> None:
        """Tells what became of this tick's orders; see `esper.tolaria.lockstep.desk`."""
        axes = {"step": state.step, "tick": state.tick, "epoch": state.epoch}
        if outcome is not None:
            for served in self._served:
                self._tell_one(served, state, outcome, axes)
        self._served = []
        self._follow_level(state)
        if self.clerk is not None:
            counts, words = self.clerk.counts()
            for refusal, total in counts.items():
                count = total - self._told.get(refusal, 0)
                if count:
                    self._told[refusal] = total
                    self.sink.emit(
                        OrdersRefused(**axes, refusal=refusal, count=count, total=total, words=words[refusal])
                    )

    def _tell_one(self, served: _Served, state: RunState, outcome: Outcome, axes: dict[str, int]) -> None:
        order, number = served.entry.order, served.entry.number
        applied, words = _verdict(served.asked, outcome)
        event: Event = OrderTaken(
            **axes,
            number=number,
            sender=order.sender,
            words=order.words,
            slot=order.slot,
            applied=applied,
            reason=words,
            why=order.why,
            again=served.again,
        )
        self.sink.emit(event)
        if self.clerk is not None and not served.again:
            self.clerk.answer(_answer(order, state, applied, words, number))

    def _follow_level(self, state: RunState) -> None:
        if state.steering.level != self._level:
            self._level = state.steering.level
            self._set_level(self._level)


def _answer(order: Order, state: RunState, applied: bool, words: str, number: int | None) -> Answer:
    return Answer(
        nonce=order.nonce,
        outcome=Became.APPLIED if applied else Became.REFUSED,
        words=words,
        tick=state.tick,
        step=state.step,
        number=number,
        dry_run=order.dry_run,
    )


def _verdict(asked: Command | RunOrder, outcome: Outcome) -> tuple[bool, str]:
    """Whether an order was done, and what came of it or why not."""
    state = outcome.state
    if isinstance(asked, RunOrder):
        return True, _describe(asked, state)
    judged = next(
        event
        for event in outcome.events
        if isinstance(event, CommandJudged) and event.command.slot == asked.slot and event.command.op is asked.op
    )
    if not judged.applied:
        return False, judged.reason
    slot = state.slot(asked.slot)
    if asked.op is Op.GERMINATE:
        return True, f"{asked.slot}: {asked.blueprint} is staged; it is planted at the next tick, unless a rank cannot"
    return True, f"{asked.slot} is {slot.stage.name}" + (", on its way out" if slot.ending else "")


def _describe(order: RunOrder, state: RunState) -> str:
    steering = state.steering
    return {
        RunVerb.NONE: "nothing was asked",
        RunVerb.PAUSE: "growth stands still from here on",
        RunVerb.RESUME: "growth goes on",
        RunVerb.BREAKER: f"the breaker is {PHASES[order.value]}" if order.verb is RunVerb.BREAKER else "",
        RunVerb.CHECKPOINT: f"a checkpoint is saved after tick {steering.save_tick}",
        RunVerb.STOP: f"the run saves and stops after tick {steering.stop_tick}",
        RunVerb.LEVEL: f"telemetry.level is {steering.level}",
    }[order.verb]
