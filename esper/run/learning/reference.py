"""The page of a policy's settings: ``python -m esper.run.learning.reference > docs/policy-configuration.md``."""

from esper.config.reference import table
from esper.leyline.fields import as_markdown, field_docs
from esper.run.learning.config import SECTIONS, PolicyRunConfig
from esper.run.learning.kinds import AGENTS, ENVIRONMENTS

_HEAD = """# Configuration of the training of a policy

Every setting of `python launch/policy.py train`, which is the same as `esper policy train`. Made from the config
classes by `python -m esper.run.learning.reference`; write there, not here. `conf/policy.yaml` holds what differs from
them, and `--cfg job` shows all. [policy.md](policy.md) says what is trained, and what the numbers mean.

`run`, `world` and `telemetry` are those of any run: [configuration.md](configuration.md).
"""


def page() -> str:
    """The whole page as Markdown."""
    lines = [_HEAD]
    for name, meaning in field_docs(PolicyRunConfig).items():
        if name in ("run", "world", "telemetry"):
            continue
        text = as_markdown(meaning)
        lines += [f"## {name}", "", text, ""]
        if name in SECTIONS:
            lines += table(SECTIONS[name], text)
        for section, kinds in (("env", ENVIRONMENTS), ("agent", AGENTS)):
            if name == section:
                for key, kind in kinds.items():
                    lines += [f"### {name}.kind = {key}", "", *table(kind.config)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
