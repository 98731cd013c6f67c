"""An auxiliary head and a penalty of the model, added up by `Task.learn`: torch's own step; FLOPs count them.

And a loss that is one number for each sample of some batches alone.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.leyline.errors import ConfigError, LockstepError
from tests.support.tiny import custom_host, make_engine
from tests.support.toy_tasks import toy_config

WIDTH, HEAD = 6, 5


class Two(nn.Module):
    """A head for the classes, one for the symbol, and the mean square of the features as a penalty."""

    def __init__(self, inputs: int, classes: int, heads: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, classes)
        self.other = nn.Linear(WIDTH, HEAD) if heads == 2 else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(x)
        found = {"logits": self.head(hidden), "penalty": hidden.square().mean(1)}
        return found if self.other is None else {**found, "aux": self.other(hidden)}


def build(input_shape: tuple[int, ...], classes: int, heads: int = 2) -> nn.Module:
    return Two(input_shape[0], classes, heads)


class Aided(esper.Task):
    graded = True

    def score(self, output: Any, target: Any) -> esper.Scores:
        logits = output["logits"]
        return esper.Scores(F.cross_entropy(logits, target, reduction="none"), (logits.argmax(1) == target).double())

    def learn(self, output: Any, target: Any) -> Tensor:
        loss = self.score(output, target).loss + 0.1 * output["penalty"]
        if "aux" in output:
            loss = loss + 0.5 * F.cross_entropy(output["aux"], target, reduction="none")
        return loss


class Odd(esper.Task):
    """Right for the few samples that are tried beforehand; for more it is a mean, or a column."""

    def __init__(self, how: str) -> None:
        self.how = how

    def score(self, output: Any, target: Any) -> esper.Scores:
        loss = F.cross_entropy(output["logits"], target, reduction="none")
        if self.how == "measured":
            return esper.Scores(loss if torch.is_grad_enabled() or len(loss) < 3 else loss.mean())
        return esper.Scores(loss[:, None] if self.how == "trained" and len(loss) > 2 else loss)

    def learn(self, output: Any, target: Any) -> Tensor:
        loss = self.score(output, target).loss
        return loss.mean() if self.how == "learned" and len(loss) > 2 else loss


def engine_of(folder: Path, heads: int, task: str = "Aided", options: dict[str, Any] | None = None) -> Any:
    name = "tests.tolaria.tasks.test_several_losses"
    settings = {"optim__kind": "sgd", "optim__momentum": 0.0, "optim__clip_norm": None, "optim__warmup_steps": 0}
    config = toy_config(
        "classification",
        task={"kind": "custom", "path": f"{name}:{task}", "options": options},
        host=custom_host(f"{name}:build", {"r0c0": "hidden"}, options={"heads": heads}),
        controller={"kind": "none"},
        optim__schedule="constant",
        **settings,
    )
    engine = make_engine(config, folder)
    engine.begin(None)
    return engine


def test_what_is_learned_is_their_sum_and_what_is_judged_is_not(tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "two", 2)
    model = engine.grown.model
    x, y = engine.bundle.train_batch(engine.plan.indices(0), seed=engine.seed, epoch=0)
    output = model(x)
    wanted = F.cross_entropy(output["logits"], y) + 0.1 * output["penalty"].mean()
    wanted = wanted + 0.5 * F.cross_entropy(output["aux"], y)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, list(named.values()))
    after = {name: p.detach() - 0.1 * g for (name, p), g in zip(named.items(), gradients, strict=True)}
    reported = F.cross_entropy(output["logits"], y).item()
    engine.train_step()
    for name, value in after.items():
        torch.testing.assert_close(named[name], value, rtol=0, atol=1e-12)
    sums = engine.window.values([])[0]
    assert abs(sums["train_loss"] / sums["train_count"] - reported) < 1e-12
    bare = engine_of(tmp_path / "one", 1)
    flops = [one.terms.host.flops for one in (engine, bare)]
    assert flops[0] - flops[1] == 2 * WIDTH * HEAD


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("trained", r"task Odd: score is \[44, 1\] for 44 samples, need one number for each, \[44\]; correct"),
        ("learned", r"task Odd: learn is \[\] for 44 samples, .*: not their mean; correct Task\.score"),
        ("measured", r"task Odd: score is \[\] for 44 samples, .*: not their mean; correct Task\.score"),
    ],
)
def test_a_loss_that_is_none_for_each_sample_is_told_at_any_batch(
    how: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(tmp_path, 1, "Odd", {"how": how})
    with pytest.raises((ConfigError, LockstepError), match=text) as error:
        engine.run()
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
