"""The page of all settings, made from the config classes: ``python -m esper.config.reference > docs/configuration.md``.

What a setting means is the docstring under its field; what an option of a group sets is read from its file in conf/.
"""

import dataclasses
import typing
from typing import Any

import yaml

from esper.config.folder import conf_folder
from esper.config.strict import defaults_of, describe_hint, override_text
from esper.config.tree import FIXED_SECTIONS, KINDS, EsperConfig
from esper.leyline.fields import as_markdown, class_doc, field_docs

_HEAD = """# Configuration

Every setting of a run, group by group. Made from the config classes and `conf/` by
`python -m esper.config.reference`; write there, not here.

A setting is typed as `group.setting=value`, an option of a group as `group=option`, a whole run as `experiment=name`.
`python launch/train.py --cfg job` shows every setting of a command line, and RUN/config.yaml holds every setting of a
run. Defaults are those of the config classes; `???` means that there is none, and files in `conf/` hold what differs.
`launch=run` starts a run, `launch=prepare` only writes its directory, `launch=plan` only says what would be done.

The settings of the training of a policy stand in [policy-configuration.md](policy-configuration.md), those of a session
in your own loop stand in `esper/session/config.py`, those of a comparison
(`conf/compare/`) in `esper/compare/arms.py`.
"""


def _rows(cls: type, path: str = "") -> list[str]:
    """A table's rows of a config class; those of a class within it by their dotted path."""
    hints, docs, defaults = typing.get_type_hints(cls), field_docs(cls), defaults_of(cls)
    rows = []
    for name, hint in hints.items():
        if name not in defaults:  # a ClassVar
            continue
        if dataclasses.is_dataclass(hint):
            rows += _rows(typing.cast(type, hint), f"{path}{name}.")
            continue
        meaning = as_markdown(docs[name])
        rows.append(f"| `{path}{name}` | {describe_hint(hint)} | `{override_text(defaults[name])}` | {meaning} |")
    return rows


def table(cls: type, shown: str = "") -> list[str]:
    """The table of a config class beneath its docstring, unless that text is ``shown`` already."""
    text = as_markdown(class_doc(cls))
    head = [] if text == shown else [text, ""]
    return [*head, "| setting | type | default | meaning |", "|---|---|---|---|", *_rows(cls), ""]


def _settings(plain: Any, path: str = "") -> list[str]:
    """The settings of a file as they are typed in overrides."""
    if isinstance(plain, dict):
        return [line for key, value in plain.items() for line in _settings(value, f"{path}.{key}" if path else key)]
    return [f"`{path}={override_text(plain)}`"]


def _option(group: str, name: str, chosen: bool) -> str:
    """One option of a group: the comment in its file, the option it begins from, and the settings it sets."""
    text = (conf_folder() / group / f"{name}.yaml").read_text()
    plain = yaml.safe_load(text)
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    comment = " ".join(lines)
    sentences = [as_markdown(comment.removesuffix("."))] if comment else []
    sets, begins = [], "Sets"
    for entry in plain.pop("defaults"):
        if isinstance(entry, dict):  # an experiment chooses options of groups
            sets += [f"`{key.removeprefix('override /')}={option}`" for key, option in entry.items()]
        elif "_needs_" in entry:
            needed = entry.partition("_needs_")[2].partition("@")[0]
            sentences.append(f"You must set `{group}.{needed}`")
        elif entry[0] not in "/_":
            begins = f"As `{group}={entry}`, with"
    if plain.get("kind") == name:
        del plain["kind"]  # it is the option's name
    sets += _settings(plain, "" if group == "experiment" else group)
    if sets:
        sentences.append(f"{begins} {', '.join(sets)}")
    line = f"- `{group}={name}`" + (" (unless you choose another)" if chosen else "")
    return f"{line}: {'. '.join(sentences)}." if sentences else line


def _options(group: str, root: dict[str, Any]) -> list[str]:
    """The list of a group's options; empty if it has none."""
    names = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
    chosen = [entry[group] for entry in root["defaults"] if isinstance(entry, dict) and group in entry]
    return ["Options:", "", *(_option(group, name, name in chosen) for name in names), ""] if names else []


def page() -> str:
    """The whole page as Markdown."""
    root = yaml.safe_load((conf_folder() / "config.yaml").read_text())
    lines = [_HEAD]
    for name, meaning in field_docs(EsperConfig).items():
        text = as_markdown(meaning)
        lines += [f"## {name}", "", text, ""]
        if name in root:
            lines += [f"`conf/config.yaml` sets {', '.join(_settings(root[name], name))}.", ""]
        lines += _options(name, root)
        if name in FIXED_SECTIONS:
            lines += table(FIXED_SECTIONS[name], text)
        elif name in KINDS:
            find, kinds = KINDS[name]
            for kind in kinds():
                lines += [f"### {name}.kind = {kind}", "", *table(find(kind))]
    lines += ["## experiment", "", "Whole runs: options of several groups, and settings.", ""]
    lines += _options("experiment", root)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
