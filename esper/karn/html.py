"""What every page of ours is made of: one style for light and dark, tables, and figures as SVG with text in it.

Plots are drawn by matplotlib (its licence is in the style of Python's, and nothing of it is in a page): static SVG
needs no script, opens offline, prints, and its text is text. Colours of ink and lines are stand-ins that become the
page's own, so that a plot follows light and dark.
"""

import html
import io
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from esper.leyline.errors import ConfigError

INK, LINE = "#010203", "#040506"  # stand-ins: matplotlib wants a colour, the page decides which
_PAGE = {INK: "var(--ink)", LINE: "var(--line)"}
WIDTH = 4.6  # inches of a figure: at 390 pixels its 9 point text is still 10 pixels high

# Okabe and Ito 2008: told apart by the colour-blind; on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STAGE_COLOURS = {
    "GERMINATED": "#bbbbbb",
    "TRAINING": "#e69f00",
    "BLENDING": "#56b4e9",
    "HOLDING": "#009e73",
    "FOSSILIZED": "#0072b2",
    "PRUNED": "#d55e00",
}

STYLE = """
:root { --ink: #1b1b1b; --soft: #555; --line: #ccc; --ground: #fff; --panel: #f5f5f2; --link: #0057a0; --good: #00695c;
  --bad: #b00020; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --soft: #aaa; --line: #555; --ground: #16171a;
  --panel: #222327; --link: #7ab8f5; --good: #5fd0b5; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 78rem; padding: 1rem; color: var(--ink);
  background: var(--ground); overflow-wrap: anywhere }
a { color: var(--link) } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { margin: 1.4rem 0 .4rem } code { background: var(--panel); padding: .1em .3em; border-radius: 3px }
.skip { position: absolute; left: -100rem } .skip:focus { position: static }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; white-space: nowrap }
thead th { white-space: pre-line; vertical-align: bottom } tbody th { font-weight: 600; white-space: normal;
  min-width: 7.5rem }
caption { text-align: left; color: var(--soft); padding: .6em 0 .3em }
.said td { white-space: normal }
th:first-child, td:first-child, .said td, .words, td.words { text-align: left }
td.words { min-width: 18rem; white-space: normal } .scroll { overflow-x: auto; max-width: 100% }
.no, .bad { color: var(--bad); font-weight: 600 } .yes, .good { color: var(--good); font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); gap: 1.5rem }
figure { margin: 0; min-width: 0 } figure svg { width: 100%; height: auto; display: block }
figcaption, .soft, summary, .events { color: var(--soft); font-size: .85rem } details { margin-top: .3rem }
.events { white-space: nowrap } summary { cursor: pointer }
@media (max-width: 40rem) { .cards thead { position: absolute; left: -100rem }
  .cards tr { display: block; padding: .5em 0; border-bottom: 1px solid var(--line) }
  .cards tbody th, .cards td, .cards td.words { display: block; text-align: left; border: 0; padding: .05em 0;
    white-space: normal; min-width: 0 } .cards td:empty { display: none }
  .cards td::before { content: attr(data-head) ": "; color: var(--soft) } }
@media print { details { display: none } }
"""


def matplotlib() -> Any:
    """Imports matplotlib, set up for our figures; a ConfigError says what to install."""
    try:
        module: Any = import_module("matplotlib")
        for part in ("figure", "ticker"):
            import_module(f"matplotlib.{part}")
    except ImportError:
        raise ConfigError("the page needs matplotlib: pip install 'esper[report]'") from None
    module.use("svg")
    module.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "esper",  # the same figures give the same bytes
            "font.size": 9,
            "axes.prop_cycle": module.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": LINE,
            "grid.linewidth": 0.4,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "lines.linewidth": 1.5,
            **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
            **{f"axes.{name}color": INK for name in ("edge", "label", "title")},
        }
    )
    return module


def engineering() -> Any:
    """Labels an axis with prefixes: 5 G."""
    return matplotlib().ticker.EngFormatter()


def new_figure(height: float = 2.7) -> Any:
    """An empty figure, `WIDTH` wide, height in inches; `svg` turns it into HTML.

    Margins are fixed, since a layout that is computed draws everything twice.
    """
    figure = matplotlib().figure.Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.135, right=0.975, bottom=0.44 / height, top=1 - 0.12 / height)
    return figure


def legend_above(figure: Any, entries: Sequence[Any] = (), names: Sequence[str] = ()) -> None:
    """Puts the legend of a figure of one plot above it, where it hides nothing; the figure grows by as much.

    Args:
        figure: of `new_figure`.
        entries: what is explained; by default all that have a label.
        names: of the entries.
    """
    axes = figure.axes[0]
    entries, names = (entries, names) if entries else axes.get_legend_handles_labels()
    columns = max(1, min(len(names), int(58 / (5 + max(map(len, names), default=1)))))
    rows, height = -(-len(names) // columns), figure.get_figheight()
    taller = height + 0.17 * rows
    figure.set_figheight(taller)
    figure.subplots_adjust(bottom=0.44 / taller, top=1 - (0.12 + 0.17 * rows) / taller)
    figure.legend(entries, names, loc="upper left", ncols=columns, handlelength=1.5, columnspacing=1.2, borderpad=0)


def svg(figure: Any, title: str, name: str) -> str:
    """A figure as an element of HTML that a screen reader calls by its title.

    Args:
        figure: of matplotlib.
        title: what it shows, in words.
        name: unique in the page; ids within the figure begin with it.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    whole = whole[whole.index("<svg") :]
    whole = re.sub(r"<metadata>.*?</metadata>", "", whole, flags=re.S)
    for stand_in, colour in _PAGE.items():
        whole = whole.replace(stand_in, colour)
    whole = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", whole)
    whole = re.sub(r'\bid="', f'id="{name}-', whole)
    whole = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", whole)
    return whole.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def plot(figure: Any, title: str, caption: str, name: str, more: str = "") -> str:
    """A figure with its heading, caption and what lies behind it.

    Args:
        figure: of matplotlib.
        title: its heading.
        caption: how to read it.
        name: unique in the page.
        more: HTML beneath, as the table of its figures.
    """
    drawn = svg(figure, f"{title}. {caption}", name)
    told = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure id="{name}"><h3>{html.escape(title)}</h3>{drawn}{told}{more}</figure>'


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    words: Sequence[int] = (),
    *,
    cards: bool = False,
) -> str:
    """A table that scrolls by itself, by keyboard too.

    Args:
        heads: heads of the columns, plain text.
        rows: cells as HTML; the first of each row is its head.
        caption: plain text.
        words: columns of running text.
        cards: on a phone, each row is a card with its cells beneath each other.
    """
    names = [f' data-head="{html.escape(text)}"' if cards else "" for text in heads]
    head = "".join(f'<th scope="col"{_words(i, words)}>{html.escape(text)}</th>' for i, text in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if i == 0 else f"<td{_words(i, words)}{names[i]}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    kind = ' class="cards"' if cards else ""
    label = html.escape(caption or ", ".join(filter(None, heads)))
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{kind}>{told}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _words(index: int, words: Sequence[int]) -> str:
    return ' class="words"' if index in words else ""


def page(title: str, body: str) -> str:
    """A whole page."""
    name = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>"
        f'<a class="skip" href="#main">To the content</a><h1>{name}</h1>{body}</body></html>\n'
    )
