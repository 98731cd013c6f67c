"""The page of all features, made from their tables: ``python -m esper.tamiyo.policy.reference > docs/features.md``."""

from esper.tamiyo.policy.features import FEATURES, KINDS, LAYOUT, LEFT_OUT

_HEAD = f"""# What a policy sees

The features of a learned controller, layout version {FEATURES}. Made from `esper/tamiyo/policy/` by
`python -m esper.tamiyo.policy.reference`; write there, not here.

All numbers are of the order of one and cut at ±10. What is not there is 0 beside a flag of its own (`known`, `absent`),
for which a network learns a weight, so an absent number is never taken for a measured 0. A reading is measured, stale
or absent; a stale one keeps its value.

| unit | numbers in it |
|---|---|
| first loss | losses and what seeds save: `level` = (first − loss) / first, `of_start` = asinh(100 value / first) |
| noise of the loss about its trend | `fall` = asinh(last fall / noise) |
| standard error | `of_error` = asinh(value / standard error) |
| the bare host | parameters and FLOPs: log2(1 + 100 part / host) / 4 |
| ticks and counts | log(1 + n) / 3 |

A checkpoint names each feature with its version. A feature that came later is left out for it; one with another version
is refused by name.
"""
_TITLES = {
    "run": ("Of the run", "the observation"),
    "slot": ("Of a slot", "a slot's observation"),
    "entry": ("Of a blueprint on offer", "an entry of the catalogue"),
}


def page() -> str:
    """The whole page as Markdown."""
    lines = [_HEAD]
    for kind in KINDS:
        title, source = _TITLES[kind]
        lines += [f"## {title}", "", f"{LAYOUT.width(kind)} columns.", ""]
        lines += ["| feature | version | of | meaning | columns |", "|---|---|---|---|---|"]
        for feature in getattr(LAYOUT, kind):
            reads = ", ".join(f"`{name}`" for name in feature.reads)
            columns = ", ".join(feature.columns)
            lines.append(f"| `{feature.name}` | {feature.version} | {reads} | {feature.meaning} | {columns} |")
        lines += ["", f"Left out of {source}:", ""]
        lines += [f"- `{name}`: {why}." for name, why in LEFT_OUT[kind].items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
