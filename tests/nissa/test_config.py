"""Settings of telemetry compose under OmegaConf and refuse bad values together."""

import pytest
from omegaconf import OmegaConf

from esper.leyline.errors import ConfigError
from esper.nissa.config import ConsoleMode, Level, TelemetryConfig, WandbConfig, WandbMode


def test_overrides_reach_the_object():
    schema = OmegaConf.structured(TelemetryConfig)
    given = OmegaConf.create({"level": "LIFECYCLE", "wandb": {"mode": "ONLINE", "tags": ["a"], "group": "sweep"}})
    config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert config == TelemetryConfig(
        level=Level.LIFECYCLE,
        console=ConsoleMode.AUTO,
        wandb=WandbConfig(mode=WandbMode.ONLINE, tags=["a"], group="sweep"),
    )


def test_bad_values_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        WandbConfig(project="a/b", group="", name="x" * 129, tags=["a", "a", ""])
    assert [problem.split(" = ")[0] for problem in caught.value.problems] == [
        "project",
        "group",
        "name",
        "tags",
        "tags",
    ]
