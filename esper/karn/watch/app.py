"""The terminal page: one of six views of one of several runs; keys are shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Static

from esper.karn.report.write import name_runs
from esper.karn.store.listing import STYLES, visible
from esper.karn.watch.lines import Page, Word
from esper.karn.watch.pages import PAGES
from esper.karn.watch.reading import Watched

NAMES = tuple(PAGES)
KEYS = "1-6 view  n next run  p previous  ↑↓ PgUp PgDn scroll  r read now  q quit"


class WatchApp(App[None]):
    """`esper watch`.

    Args:
        runs: run directories.
        every_s: seconds between two looks at their files.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #runs, #views, #keys { height: 1; padding: 0 1; }
    #runs { background: $boost; }
    #keys { dock: bottom; color: $text-muted; }
    #body { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"view({number - 1})", name) for number, name in enumerate(NAMES, 1)),
        Binding("n,right", "turn(1)", "next run"),
        Binding("p,left", "turn(-1)", "previous run"),
        Binding("r", "read", "read now"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, runs: Sequence[Path], *, every_s: float = 1.0) -> None:
        super().__init__()
        self.runs = [Watched(path, name) for path, name in zip(runs, name_runs(runs))]
        self.chosen, self.view, self._every_s = 0, NAMES[0], every_s
        self.page = Page()

    def compose(self) -> ComposeResult:
        """Runs, views, the page, keys."""
        yield Static(id="runs")
        yield Static(id="views")
        with VerticalScroll(id="body"):
            yield Static(id="page")
        yield Static(KEYS, id="keys")

    def on_mount(self) -> None:
        """Reads for the first time, and goes on reading."""
        for run in self.runs:
            run.refresh(now=True)
        self.show()
        self.query_one("#body").focus()
        self.set_interval(self._every_s, self.look)

    def on_resize(self) -> None:
        """Lines follow the width."""
        self.show()

    def look(self) -> None:
        """Shows what is new."""
        news = [run.refresh() for run in self.runs]  # each of them, not up to the first
        if any(news):
            self.show()

    def show(self) -> None:
        """Draws all of it."""
        run = self.runs[self.chosen]
        self.query_one("#runs", Static).update(self._runs_line())
        views = [f"{number} {name}" for number, name in enumerate(NAMES, 1)]
        text = Text()
        for name, words in zip(NAMES, views):
            text.append(f"{words}  ", "reverse" if name == self.view else "")
        self.query_one("#views", Static).update(text)
        self.page = Page()
        if run.report is not None:
            self.page = PAGES[self.view](run.report, max(40, self.size.width - 4))
        if run.problem:
            self.page.lines.insert(0, [Word(run.problem, "red")])
        self.query_one("#page", Static).update(self.page.render())

    def _runs_line(self) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis")
        for index, run in enumerate(self.runs):
            state = run.report.facts.state if run.report else "nothing yet"
            text.append(f" {visible(run.name)} ", "reverse bold" if index == self.chosen else "")
            text.append(f"{state}  ", STYLES.get(state, "dim"))
        return text

    def action_view(self, index: int) -> None:
        """Shows another view, from its top; the log from its end."""
        self.view = NAMES[index]
        self.show()
        body = self.query_one("#body", VerticalScroll)
        if self.view == "log":
            body.scroll_end(animate=False)
        else:
            body.scroll_home(animate=False)

    def action_turn(self, by: int) -> None:
        """Shows another run."""
        self.chosen = (self.chosen + by) % len(self.runs)
        self.show()

    def action_read(self) -> None:
        """Reads the run now."""
        self.runs[self.chosen].refresh(now=True)
        self.show()
