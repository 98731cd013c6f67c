"""What the pages of `esper watch` hold: pure functions of what `esper.karn.report.gather` reads.

overview    state, progress, losses with their course, seeds, cost, last word
slots       a lane of stages for each slot over the run's steps, with alpha and contribution
evidence    every look of the living seeds, and what the gate ahead asks
decisions   what was asked, by whom, and what came of it; the newest first
health      breaker, faults and recoveries, gradients, times
log         all that was told; the newest last
"""

from collections.abc import Callable

from esper.karn.lives import Life
from esper.karn.report.gather import RunReport
from esper.karn.report.traced import from_event
from esper.karn.store.facts import describe
from esper.karn.store.listing import STYLES, short_count, shorten
from esper.karn.watch.lines import Page, Piece, Shown, Word, spark
from esper.karn.why.sentence import at
from esper.leyline.events import EVENTS
from esper.leyline.stages import Stage
from esper.nissa.reading import Record

MOST = 300  # lines of decisions and log
LANE = {
    Stage.EMPTY: ("·", "dim"),
    Stage.GERMINATED: ("g", "yellow"),
    Stage.TRAINING: ("t", "yellow"),
    Stage.BLENDING: ("b", "cyan"),
    Stage.HOLDING: ("h", "blue"),
    Stage.FOSSILIZED: ("F", "green"),
    Stage.PRUNED: ("x", "red"),
    Stage.EMBARGOED: ("-", "dim"),
    Stage.RESETTING: ("-", "dim"),
}


def overview(report: RunReport, width: int) -> Page:
    """State, progress, losses, seeds, cost, last word."""
    page, facts = Page(), report.facts
    page.add(Word(report.name, "bold"), "  ", Word(facts.state, STYLES.get(facts.state, "")), _of_kinds(report))
    begun = report.of("run_started")
    step = Shown(report.newest_step, ",.0f")
    line: list[Piece] = ["step ", step]
    if begun:
        total = from_event(begun[-1], "total_steps")
        done = (step.figure.value or 0.0) / max(1.0, total.value or 1.0)
        room = max(10, width - 44)
        filled = round(min(1.0, done) * room)
        line += [" of ", Shown(total, ",.0f"), "  ", Word("█" * filled, "green"), Word("░" * (room - filled), "dim")]
    page.add(*line)
    page.head("Learning")
    for key, name, form, scale in (
        ("train_loss", "training loss", ".4g", 1.0),
        ("validation_loss", "validation loss", ".4g", 1.0),
        ("train_accuracy", "training accuracy %", ".1f", 100.0),
        ("validation_accuracy", "validation accuracy %", ".1f", 100.0),
    ):
        series = report.series[key]
        if series.values:
            error: list[Piece] = [" ± ", Shown(series.errors[-1], form, scale)] if series.errors else []
            page.add(f"{name:<22}", Shown(series.values[-1], form, scale), *error)
            page.add(" " * 22, Word(spark(series, max(10, width - 24)), "cyan"))
    for key, name in (("test_loss", "test loss"), ("test_accuracy", "test accuracy %")):
        figure = report.from_result(key, "value")
        if figure.value is not None:
            percent = key == "test_accuracy"
            page.add(f"{name:<22}", Shown(figure, ".1f" if percent else ".4g", 100.0 if percent else 1.0))
    for metric in report.metrics:
        figure = report.from_result("test_metrics", metric.name)
        if figure.value is not None:
            share = metric.unit == "share"
            unit = "%" if share else metric.unit
            page.add(f"{f'test {metric.name} {unit}'.rstrip():<22}", Shown(figure, ".4g", 100.0 if share else 1.0))
    page.head("Growth")
    fates = report.fates
    page.add(
        f"{fates.total()} born, {fates['fossilised']} kept, {fates['pruned']} pruned, "
        f"{fates['alive']} alive, in {len(report.slots)} slots"
    )
    parameters, flops = report.series["parameters"], report.series["flops"]
    if parameters.values:
        page.add("parameters ", Shown(parameters.values[0], ",.0f"), " → ", Shown(parameters.values[-1], ",.0f"))
    if flops.values:
        value = flops.values[-1]
        page.add("training FLOPs ", Shown(value, ".3g"), f" ({short_count(value.value, 'FLOP')})")
    if facts.last_word:
        page.head("Last word")
        page.add(facts.last_word)
    return page


def _of_kinds(report: RunReport) -> str:
    facts = report.facts
    parts = [facts.host, facts.data, facts.controller and f"controller {facts.controller}"]
    ranks = f"{facts.ranks} ranks" if facts.ranks else None
    start = f"attempt {facts.attempts}" if facts.attempts else None
    said = ", ".join(part for part in (*parts, ranks, start) if part)
    return f"  {said}" if said else ""


def slots(report: RunReport, width: int) -> Page:
    """A lane of stages for each slot."""
    page, room = Page(), max(20, width - 8)
    last = max(1, report.last_step)
    page.add(Word(f"{'step':<7}", "dim"), Word(f"0{last:>{room - 1},}", "dim"))
    for slot in report.slots:
        page.add(f"{slot:<7}", *_lane(list(report.moves.get(slot, ())), last, room))
        for index, life in enumerate(report.lives):
            if life.slot == slot:
                page.add(" " * 7, *_life_line(report, index, life))
    page.add()
    signs = [Word(f"{sign} {stage.name.lower()}", style) for stage, (sign, style) in LANE.items() if sign != "-"]
    page.add_wrapped(signs, width)
    return page


def _lane(moves: list[tuple[int, str]], last: int, room: int) -> list[Word]:
    signs: list[Word] = []
    stage, position = Stage.EMPTY, 0
    for column in range(room):
        until = (column + 1) * last / room
        passed = []
        while position < len(moves) and moves[position][0] < until:
            stage = Stage[moves[position][1]]
            passed.append(stage)
            position += 1
        shown = Stage.PRUNED if Stage.PRUNED in passed else stage  # a prune is shown even if the slot is empty again
        signs.append(Word(*LANE[shown]))
    return signs


def _life_line(report: RunReport, index: int, life: Life) -> list[Piece]:
    line: list[Piece] = [f"{life.blueprint:<14} {life.fate:<10}"]
    alpha = report.alpha[index]
    if alpha.values and life.fate == "alive":
        line += [" alpha ", Shown(alpha.values[-1], ".2f")]
    looks = life.of("contribution")
    if looks:
        line += [" saves ", Shown(from_event(looks[-1], "running", "value"), "+.4f")]
        line += [" ± ", Shown(from_event(looks[-1], "running", "se"), ".4f")]
    end = life.end
    if end is not None:
        line += [f" {at(end)}"]
    return line


ENDED = 20  # seeds that have ended, of which evidence is shown


def evidence(report: RunReport, width: int) -> Page:
    """Every look of the living seeds, then of those that have ended, and what the gate ahead said last."""
    page = Page()
    page.add(Word("this, all: loss that it saves, at this look and over all at this alpha", "dim"))
    page.add(Word("e: log evidence for the gate ahead; -log(chance) is enough: 3.0 at 0.05", "dim"))
    ended = [life for life in reversed(report.lives) if life.fate != "alive"]
    for life in [*(life for life in report.lives if life.fate == "alive"), *ended[:ENDED]]:
        stage = f", {life.stage.name.lower()}" if life.fate == "alive" else ""
        page.head(f"{life.slot} {life.blueprint}, {life.fate}{stage}")
        looks = life.of("contribution")
        if not looks:
            page.add("not looked at yet")
        for look in looks[-8:]:
            page.add(
                f"{at(look):<19}look ",
                Shown(from_event(look, "look"), ".0f"),
                " this ",
                Shown(from_event(look, "contribution", "value"), "+.4f"),
                " all ",
                Shown(from_event(look, "running", "value"), "+.4f"),
                " ± ",
                Shown(from_event(look, "running", "se"), ".4f"),
                " e ",
                Shown(from_event(look, "log_evidence"), ".2f"),
                " at ",
                Shown(from_event(look, "chance"), ".2g"),
            )
        for told in life.of("gate")[-1:]:
            result = told["payload"]["result"]
            verdict = Word("passed", "green") if result["passed"] else Word("refused", "red")
            page.add(f"{at(told)} {result['gate']}: ", verdict)
            for check in result["checks"]:
                if not check["passed"]:
                    page.add(f"  {check['name']}: {check['detail']}")
    if not report.lives:
        page.add("no seed was born yet")
    return page


_DECIDED = ("command", "refusal", "veto", "order", "orders_refused", "stage")


def decisions(report: RunReport, width: int) -> Page:
    """What was asked, and what came of it; the newest first."""
    page = Page()
    told = [r for r in report.of(*_DECIDED) if r["kind"] != "stage" or not r["payload"]["proposal"]]
    for record in reversed(told[-MOST:]):
        words, style = _decision(record)
        page.add(Word(f"{at(record):<20} ", "dim"), Word(words, style))
    if not told:
        page.add("nothing was decided yet")
    return page


def _decision(record: Record) -> tuple[str, str]:
    kind, payload = record["kind"], record["payload"]
    if kind in ("command", "refusal"):
        command = payload["command"]
        blueprint = f" {command['blueprint']}" if command["blueprint"] else ""
        sign = "✓" if payload["applied"] else "✗ refused"
        words = f"{command['slot']} {command['op']}{blueprint} {sign}: {payload['reason']}"
        return words, "" if payload["applied"] else "yellow"
    if kind == "veto":
        birth = f"{payload['slot']} birth of {payload['blueprint']}"
        return f"{birth} vetoed by rank {payload['rank']}: {payload['reason']}", "red"
    if kind == "order":
        done = "applied" if payload["applied"] else "refused"
        order = f"order {payload['number']} of {payload['sender']}: {payload['words']}"
        return f"{order}: {done}: {payload['reason']}", "cyan"
    if kind == "orders_refused":
        return f"{payload['count']} orders {payload['refusal']}: {payload['words']}", "red"
    return f"{payload['slot']} {payload['source']} → {payload['target']} by {payload['cause']}", "dim"


_COURSES = (
    ("throughput", "samples a second", ">10,.0f"),
    ("speed", "FLOPs a second", ">10.3g"),
    ("mfu", "MFU %", ">10.1f"),
    ("data_wait", "waits for data %", ">10.1f"),
    ("own", "own work %", ">10.1f"),
    ("steps_ms", "between ticks, ms", ">10,.1f"),
    ("tick_ms", "a tick, ms", ">10,.1f"),
    ("digest_ms", "its digests, ms", ">10,.1f"),
    ("gradient", "gradient of the host", ">10.4g"),
)


def health(report: RunReport, width: int) -> Page:
    """Breaker, rates and times with their course, gradients, memory, births that shook the loss, alarms."""
    page = Page()
    breaker = report.of("breaker")
    phase = breaker[-1]["payload"]["target"] if breaker else "ALLOWED"
    page.add("breaker of growth: ", Word(str(phase), "green" if phase == "ALLOWED" else "yellow"))
    for key, name, form in _COURSES:
        series = report.series[key]
        if series.values:
            course = Word(spark(series, width - 38), "cyan")
            page.add(f"{name:<22}", Shown(series.values[-1], form), "  ", course)
    for index, life in enumerate(report.lives):
        ratio = report.ratio[index]
        if life.fate == "alive" and ratio.values:
            page.add(f"{'its ' + life.slot + ' over it':<22}", Shown(ratio.values[-1]))
    for rank, (host, device) in report.memory.items():
        of_device: list[Piece] = [", of its device ", Shown(device, ".1f", 100.0)]
        page.add(f"{f'memory of {rank} %':<22}", Shown(host, ".1f", 100.0), *(of_device if device.value else []))
    for record in report.of("settled"):
        slot, after, back, height = (record["payload"][key] for key in ("slot", "after", "recovery", "height"))
        rise: list[Piece] = [f"{slot}, its {after}: the loss rose by ", Shown(from_event(record, "height"), "+.3g")]
        steps: list[Piece] = [", back after ", Shown(from_event(record, "recovery"), ".0f"), " steps"]
        if height > 0:
            page.add(*rise, *(steps if back is not None else [", not back yet"]))
    kinds = [kind for kind, event in EVENTS.items() if event.priority and kind not in _DECIDED]
    troubles = [*report.of(*kinds), *report.digest.others]
    page.head(f"Alarms and recoveries: {len(troubles) + report.records.left_out(*kinds)}")
    for record in sorted(troubles, key=lambda r: (r["attempt"], r["time"]))[-MOST:]:
        rank = f"rank {record['rank']} " if record["rank"] else ""
        page.add(Word(f"{at(record):<20} ", "dim"), rank, _told(record) or record["kind"])
    return page


def _told(record: Record) -> str:
    """A record in words, without the step that stands in front of them."""
    words, path = describe(record).removeprefix(f"step {record['step']}").strip(), record["payload"].get("path")
    return words.replace(str(path), str(path).rpartition("/")[2]) if path else words


def log(report: RunReport, width: int) -> Page:
    """All that was told; the newest last."""
    page = Page()
    told = [(record, _told(record)) for record in report.newest[-4 * MOST :]]
    for record, words in [pair for pair in told if pair[1]][-MOST:]:
        page.add(Word(f"{at(record):<20} ", "dim"), shorten(words, 4 * width))
    return page


PAGES: dict[str, Callable[[RunReport, int], Page]] = {
    "overview": overview,
    "slots": slots,
    "evidence": evidence,
    "decisions": decisions,
    "health": health,
    "log": log,
}
