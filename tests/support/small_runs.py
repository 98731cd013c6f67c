"""Many small runs in one launch: each has process groups of its own and ends in an `Outcome`.

    def play_mine(rank, config, run_dir): return play_all(config, run_dir, {"name": script, ...})
    run_distributed(play_mine, 2, config, run_dir, groups=...)      # one a script

A script is ``script(engine)``, run once the engine has begun; it breaks something on some rank. The engine then trains
to its end, and how that went is the outcome.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.config.tree import EsperConfig
from esper.leyline.commands import Command
from esper.leyline.events import Event
from esper.leyline.observation import Observation
from esper.tolaria.training.engine import Engine
from tests.support.dist import use_group
from tests.support.tiny import bits, events, make_engine

Script = Callable[[Engine], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run went on one rank.

    Fields:
        error: class of the error that ended it, "" for none. text: its words.
        step, tick: where it ended. weights: digest per parameter there.
        events: what this rank's sink took. notes: what the script noted.
    """

    error: str
    text: str
    step: int
    tick: int
    weights: dict[str, str]
    events: list[Event] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: type) -> list[Any]:
        """Events of one class."""
        return [event for event in self.events if isinstance(event, kind)]


def train_on(engine: Engine, until: int | None = None) -> None:
    """Trains to optimizer step ``until``, or to the end, with ticks where they are due, without the closing test."""
    while engine.step < (until or engine.terms.total_steps):
        engine.train_step()
        if engine.tick_due():
            engine.tick()


def play(config: EsperConfig, run_dir: Path, script: Script, *, group: int = 0) -> Outcome:
    """One run: begins, runs the script, trains to its end.

    Args:
        group: which of the launch's groups to meet in.
    """
    use_group(group)
    engine = make_engine(config, run_dir)
    engine.notes = {}  # type: ignore[attr-defined]
    error, text = "", ""
    try:
        engine.begin(None)
        script(engine)
        train_on(engine)
    except Exception as caught:
        error, text = type(caught).__name__, str(caught)
        engine.heartbeat.mark("failed", text)
    finally:
        engine.growth.close()
        engine.world.close()
    return Outcome(
        error,
        text,
        engine.step,
        engine.state.tick,
        bits(engine.grown.model.named_parameters()),
        events(engine).events,
        engine.notes,  # type: ignore[attr-defined]
    )


def play_all(config: EsperConfig, run_dir: Path, scripts: Mapping[str, Script]) -> dict[str, Outcome]:
    """Every script in a run of its own, one after another in the same processes."""
    return {
        name: play(config, run_dir / name, script, group=group) for group, (name, script) in enumerate(scripts.items())
    }


def before(engine: Engine, method: str, act: Callable[[], None], *, at_step: int | None = None) -> None:
    """Calls ``act`` once, just before ``engine.method()`` (at optimizer step ``at_step``)."""
    own = getattr(engine, method)
    done: list[bool] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not done and (at_step is None or engine.step == at_step):
            done.append(True)
            act()
        return own(*args, **kwargs)

    setattr(engine, method, wrapped)


class Commands:
    """A controller that proposes given commands at given ticks, unchecked."""

    name = "commands"

    def __init__(self, due: Mapping[int, list[Command]]) -> None:
        self.due = due

    def decide(self, observation: Observation) -> list[Command]:
        return list(self.due.get(observation.tick, ()))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
