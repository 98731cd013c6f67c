"""Lines of a terminal page whose figures know where they come from, as those of the report do."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from esper.karn.report.traced import Figure, Series
from esper.karn.store.listing import visible

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure as it is shown.

    Fields:
        figure: the number and its place in the record.
        form: format specification.
        scale: factor on the number that is shown.
        style: of the text.
    """

    figure: Figure
    form: str = ".4g"
    scale: float = 1.0
    style: str = ""

    @property
    def text(self) -> str:
        """The figure as it stands on the page; a dash for None."""
        return "–" if self.figure.value is None else format(self.figure.value * self.scale, self.form)


@dataclass(frozen=True, slots=True)
class Word:
    """Text, with a style."""

    text: str
    style: str = ""


Piece = str | Word | Shown


@dataclass(slots=True)
class Page:
    """Lines from top to bottom."""

    lines: list[list[Piece]] = field(default_factory=list)

    def add(self, *pieces: Piece) -> None:
        """Adds one line."""
        self.lines.append(list(pieces))

    def add_wrapped(self, words: Sequence[Word], width: int) -> None:
        """Adds words with a gap between them, in as many lines as they need."""
        line: list[Piece] = []
        for word in words:
            if line and sum(len(piece.text) for piece in line if isinstance(piece, Word)) + len(word.text) > width:
                self.add(*line)
                line = []
            line += [word, Word("  ")]
        self.add(*line)

    def head(self, text: str) -> None:
        """Adds a heading, with a free line above it."""
        if self.lines:
            self.add()
        self.add(Word(text, "bold"))

    def figures(self) -> list[Shown]:
        """Every figure that is shown."""
        return [piece for line in self.lines for piece in line if isinstance(piece, Shown)]

    def render(self) -> Text:
        """The page for a terminal; what a record says cannot steer it."""
        text = Text()
        for line in self.lines:
            for piece in line:
                if isinstance(piece, str):
                    text.append(visible(piece))
                else:
                    text.append(visible(piece.text), piece.style or None)
            text.append("\n")
        return text


def spark(line: Series, width: int) -> str:
    """The course of a series in one line of bars, from its least to its greatest; empty without a point."""
    numbers = line.thinned(width).numbers
    if not numbers:
        return ""
    least, most = min(numbers), max(numbers)
    if not most > least:  # all equal, or one is not a number
        return BARS[0] * len(numbers)
    return "".join(BARS[min(7, int(8 * (number - least) / (most - least)))] for number in numbers)
