"""Whether task, data and host can fit each other, as far as their kinds say it. Parts of a user's own say nothing here:
they are tried on a few samples before ranks start (`esper.run.fitting.asking`).
"""

from collections.abc import Mapping
from typing import Any

CLASS, TOKENS, PIXELS, LABELS, NUMBERS = (
    "a class of each sample",
    "tokens in a row",
    "a class of each pixel",
    "0 or 1 for each label",
    "numbers of each sample",
)
GIVEN: Mapping[str, str] = {
    **dict.fromkeys(("digits", "digits_phases", "cifar10", "images"), CLASS),
    **dict.fromkeys(("pysource", "text", "text_phases", "recall", "tokens"), TOKENS),
}
OF_TARGET_KIND: Mapping[str, str] = {"class": CLASS, "number": NUMBERS, "labels": LABELS}
NEEDED: Mapping[str, str] = {
    "classification": CLASS,
    "language": TOKENS,
    "masked_language": TOKENS,
    "seq2seq": TOKENS,
    "segmentation": PIXELS,
    "multilabel": LABELS,
    "regression": NUMBERS,
}
ONE_OUTPUT = ("cnn", "resnet20", "gpt")  # hosts that give logits of each sample, and nothing else


def targets_of(data: Any) -> str | None:
    """What the targets of some data are; None if only the data know."""
    if getattr(data, "text", None) is not None and not data.target:
        return TOKENS
    kind = getattr(data, "target_kind", None)
    return GIVEN.get(data.kind) if kind is None else OF_TARGET_KIND[str(kind)]


def task_fits_data(data: Any, task: Any) -> list[str]:
    """The data have targets of the kind that the task learns."""
    given, needed = targets_of(data), NEEDED.get(task.kind)
    if given is None or needed is None or given == needed:
        return []
    fitting = [kind for kind, wanted in NEEDED.items() if wanted == given]
    return [
        f"task.kind = {task.kind!r}: learns {needed}, and data={data.kind} gives {given}; set task={fitting[0]}, or "
        "choose other data"
    ]


def host_fits_task(host: Any, data: Any, task: Any) -> list[str]:
    """A built-in host has inputs and outputs of the kind that data and task need."""
    if host.kind not in ONE_OUTPUT or task_fits_data(data, task):
        return []
    if task.kind == "contrastive":
        return [f"task.kind = 'contrastive': learns two views, and host={host.kind} gives one; set host=custom"]
    if data.kind == "table":
        return [f"host.kind = {host.kind!r}: data=table has rows of numbers, which it does not take; set host=custom"]
    pixels = {"segmentation": "pixel", "seq2seq": "place"} if host.kind != "gpt" else {"segmentation": "pixel"}
    if task.kind in pixels:
        return [
            f"task.kind = {task.kind!r}: learns from logits of each {pixels[task.kind]}, and host={host.kind} gives "
            "others; set host=custom"
        ]
    return []
