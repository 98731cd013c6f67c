"""Data of two phases: what is new, what is replayed, what is held out, and the losses apart."""

import pytest
import torch
import torch.nn.functional as F

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import Bundle, DigitsPhasesConfig, TextPhasesConfig, load_data
from esper.tolaria.data.phases.config import Phase
from esper.tolaria.tasks.bind import task_of

PARTS = ("train", "validation", "probe", "test")


def digits(**changes: object) -> Bundle:
    return load_data(DigitsPhasesConfig(**changes))


def everything(bundle: Bundle, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, (y, new) = getattr(bundle, part).fetch(torch.arange(len(getattr(bundle, part))))
    return x, y, new


def rows_of(x: torch.Tensor) -> set[bytes]:
    return {one.numpy().tobytes() for one in x}


def test_the_old_phase_has_old_classes_alone_and_the_new_one_holds_out_both() -> None:
    old, new = digits(), digits(phase=Phase.NEW)
    for part in PARTS:
        _, labels, flags = everything(old, part)
        assert labels.max() < 5
        assert not flags.any()
        _, labels, flags = everything(new, part)
        assert torch.equal(flags, labels >= 5)
    assert [len(getattr(new, part)) for part in PARTS[1:]] == [300, 300, 200]
    for part in PARTS[1:]:
        x, _, flags = everything(new, part)
        assert rows_of(x[~flags]) == rows_of(everything(old, part)[0]), "the same old samples are held out"


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.5])
def test_the_replay_share_is_that_of_the_training_part(replay: float) -> None:
    bundle, old = digits(phase=Phase.NEW, replay=replay), digits()
    x, _, flags = everything(bundle, "train")
    assert float((~flags).double().mean()) == pytest.approx(replay, abs=0.002)
    assert rows_of(x[~flags]) <= rows_of(everything(old, "train")[0]), "what was held out is not replayed"


def test_more_replay_than_there_is_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="there are"):
        digits(phase=Phase.NEW, replay=0.9)
    with pytest.raises(ConfigError, match="replay"):
        digits(replay=1.0)


def test_text_changes_from_python_to_headers() -> None:
    sizes = {"max_bytes": 200_000, "validation": 32, "probe": 32, "test": 32}
    bundle = load_data(TextPhasesConfig(phase=Phase.NEW, **sizes))
    x, y, flags = everything(bundle, "train")
    assert torch.equal(x[:, 1:], y[:, :-1])
    texts = ["".join(map(chr, x[mask].flatten().tolist())) for mask in (flags, ~flags)]
    assert texts[0].count("#include") > 10 * (texts[1].count("#include") + 1)
    assert texts[1].count("def ") > 10 * (texts[0].count("def ") + 1)
    assert bundle.record["new"]["files"][0]["path"].endswith(".h")
    assert len(bundle.record["new"]["xxh3_64"]) == 16
    again = load_data(TextPhasesConfig(phase=Phase.NEW, **sizes))
    assert bundle.digest == again.digest != load_data(TextPhasesConfig(**sizes)).digest


def test_losses_of_old_and_new_are_told_apart() -> None:
    task = task_of(digits(phase=Phase.NEW))
    torch.manual_seed(0)
    logits, labels, new = torch.randn(7, 10), torch.randint(0, 10, (7,)), torch.tensor([True, False] * 3 + [True])
    scores = task.scored(logits, (labels, new))
    rows = task.rows(scores)
    assert rows is not None
    sums = {name: float(rows[:, index].sum()) for index, name in enumerate(task.columns)}
    values = task.values({**sums, "count": 7.0})
    assert values["loss_new"] == pytest.approx(float(F.cross_entropy(logits[new], labels[new])))
    assert values["loss_old"] == pytest.approx(float(F.cross_entropy(logits[~new], labels[~new])))
    assert "loss_new" not in task.values({"new": 0.0, "loss_old": 1.0, "loss_new": 0.0, "count": 2.0})
    assert not task.learns_otherwise
