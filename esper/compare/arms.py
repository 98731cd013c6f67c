"""The arms of a comparison: each becomes a whole config here; the engine does not know which arm it runs.

conf/compare/NAME.yaml holds the Hydra overrides that all arms share, the seeds, and for each arm:

    overrides   Hydra overrides of this arm alone
    flops       the name of an arm: train for as many FLOPs as that arm's run with the same seed, times `share`
    resume_from the name of an arm: begin with the network that its run with the same seed has come to
    topology    the name of an arm: plant the final network of its run with the same seed from the first step on

So an arm may wait for another arm's runs; a circle is an error. Lengths for equal FLOPs come from the same cost table
as the run's own account (`esper.accord.account`).
"""

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.compare.lengths import DataCache, flops_per_sample, steps_for
from esper.compare.trained import MarksConfig, SearchConfig, fill_claims
from esper.config.strict import Reader, defaults_of
from esper.config.tree import EsperConfig, build_config
from esper.launcher.compose import conf_folder, plain_of
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.fields import Checks
from esper.leyline.files import RunDir
from esper.tolaria.tasks.bind import bind
from esper.tolaria.training.length import plan_batches

_COMPOSING = threading.Lock()  # Hydra has one state per process, and jobs are derived in threads


@dataclass(kw_only=True, slots=True)
class Arm:
    """What one arm has of its own."""

    overrides: list[str] = field(default_factory=list)
    """Hydra overrides, on top of the shared ones; empty: none."""

    flops: str | None = None
    """The arm whose training FLOPs it spends, seed by seed; null: the shared number of steps."""

    share: float = 1.0
    """How much of them. An arm that grows spends more: its length is counted for its host alone."""

    resume_from: str | None = None
    """The arm whose trained host it begins with, seed by seed (``host.weights``): what validation chose of a run whose
    network has not grown. Its own account begins at 0, so that what the host had cost is not in it.
    """

    search: bool = True
    """Whether it searches its own rate, where the comparison has a ``search``."""

    topology: str | None = None
    """The arm whose final topology it has from the start, seed by seed; null: its own host, empty slots."""

    size: bool = False
    """A network of a fixed size; the headroom verdict asks about those that are smaller than `final`."""

    @property
    def waits_for(self) -> set[str]:
        """Arms whose run with the same seed must have ended first."""
        return {arm for arm in (self.flops, self.topology, self.resume_from) if arm is not None}

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("share", 0 < self.share <= 100, "must be above 0, to 100")


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """One comparison."""

    base: list[str]
    """Hydra overrides of every arm."""

    seeds: list[int]
    """Seeds of the runs, one or more, each once."""

    metric: str
    """What a score is, on the test part: ``accuracy``, ``loss`` (minus it), or a metric of the task by its name
    (minus it, where lower is better)."""

    subject: str
    """The arm that the claims are about."""

    flops_share: float | None
    """Share of the FLOPs of `final`, above 0 to 10, within which the subject is to reach its loss; null with ``marks``.
    """

    margin: float | None
    """How far behind a fixed schedule is too far, above 0, in units of the score: a share of 1 of test accuracy, or
    the unit of the loss or the metric. Choose it before the runs: the claim is that the subject is not behind by so
    much. null with ``marks``.
    """

    arms: dict[str, Arm]
    """What each arm has of its own, by name."""

    search: SearchConfig | None = None
    """How each arm finds its own rate, on seeds of their own; null: rates are as they are written."""

    marks: MarksConfig | None = None
    """Arms are read at these shares of what one of them has cost, and not by the score of their last checkpoint."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "one or more, each once")
            check("subject", self.subject in self.arms, f"must be an arm: {', '.join(self.arms)}")
            if self.marks is None:
                check("flops_share", 0 < (self.flops_share or 0) <= 10, "must be above 0, to 10")
                check("margin", 0 < (self.margin or 0) < math.inf, "must be above 0")
            else:
                check("flops_share", self.flops_share is None, "null with marks")
                check("margin", self.margin is None, "null with marks")
                check("metric", self.metric == "loss", "loss with marks; marks.apart names what is shown beside it")
                named = self.marks.arms()
                check("marks", named <= set(self.arms), f"names {', '.join(sorted(named - set(self.arms)))}, no arm")
            if self.search is not None:
                check("search", self.marks is not None, "needs marks, at which rates are judged")
                apart = not set(self.search.seeds) & set(self.seeds)
                check("search", apart, "its seeds must be others than those of the comparison")
        problems = []
        for name, arm in self.arms.items():
            unknown = sorted(arm.waits_for - set(self.arms))
            problems += [f"arms.{name}: waits for {other}, which is no arm" for other in unknown]
            if self._in_circle(name):
                problems.append(
                    f"arms.{name}: waits for itself; name an arm in flops, topology or resume_from that does not"
                )
        if problems:
            raise ConfigError(problems)

    def _in_circle(self, name: str) -> bool:
        """Whether an arm waits for itself, over any number of others."""
        seen: set[str] = set()
        ahead = set(self.arms[name].waits_for)
        while ahead:
            seen |= ahead
            ahead = {n for other in ahead & set(self.arms) for n in self.arms[other].waits_for} - seen
        return name in seen

    def in_order(self) -> list[str]:
        """Arm names: those that others wait for first, otherwise in the order of the file."""
        done: list[str] = []
        while len(done) < len(self.arms):
            done += [n for n, arm in self.arms.items() if n not in done and arm.waits_for <= set(done)][:1]
        return done


def read_compare(name: str, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """Reads conf/compare/NAME.yaml as plain data; returns its path, too.

    Args:
        name: name of a shipped comparison, or the path of a file that ends in .yaml.
        overrides: ``key=value`` for its settings, for example ``seeds=[1,2]``.

    Raises:
        ConfigError: there is no such comparison, or it is no YAML.
    """
    folder = conf_folder() / "compare"
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        have = ", ".join(sorted(entry.stem for entry in folder.glob("*.yaml")))
        raise ConfigError(f"compare {name!r}: no such comparison; there are {have}, or name a file of your own, X.yaml")
    try:
        tree = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return path, {str(key): value for key, value in plain.items()}


def load_compare(name: str, overrides: list[str]) -> CompareConfig:
    """Reads conf/compare/NAME.yaml; arguments as in `read_compare`.

    Raises:
        ConfigError: there is no such comparison, or it has problems; the text lists all of them.
    """
    path, plain = read_compare(name, overrides)
    arms = plain.get("arms") or {}
    fill_claims(plain)
    if not isinstance(arms, dict):
        raise ConfigError(f"{path}: compare.arms = {arms!r}: must be a mapping of names to arms")
    wrong = {name: arm for name, arm in arms.items() if not isinstance(arm, dict | None)}
    if wrong:
        raise ConfigError([f"{path}: compare.arms.{name} = {arm!r}: must be a mapping" for name, arm in wrong.items()])
    plain["arms"] = {name: {**defaults_of(Arm), **(arm or {})} for name, arm in arms.items()}
    reader = Reader()
    config = reader.section(CompareConfig, plain, "compare")
    if reader.problems:
        raise ConfigError(reader.problems)
    assert isinstance(config, CompareConfig)
    return config


def read_result(folder: Path) -> dict[str, Any]:
    """Reads RUN/result.json of a run that has finished.

    Raises:
        RunDirError: it cannot be read, or lacks a key that other arms are derived from, or the digest of the data.
    """
    path = RunDir(folder).result
    again = f"remove {folder}, and the same command runs it again"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: not readable ({error}); {again}") from None
    lacking = [key for key in ("data", "flops", "topology") if not isinstance(result, dict) or key not in result]
    if lacking:
        raise RunDirError(f"{path}: no result of a run, {', '.join(lacking)} missing; {again}")
    return result


def derive(
    compare: CompareConfig, arm_name: str, seed: int, runs: Mapping[str, Path], data: DataCache
) -> tuple[EsperConfig, dict[str, Any]]:
    """Derives the whole config of one run; returns it and its plain data.

    Args:
        compare: the comparison.
        arm_name: the arm.
        seed: the run's seed.
        runs: folders of the finished runs of this seed that the arm waits for, by arm.
        data: loads the data that the run's length depends on.

    Raises:
        ConfigError: the overrides do not compose, or do not fit each other.
        RunDirError: a run that this one is derived from cannot be read.
    """
    arm = compare.arms[arm_name]
    overrides = [*compare.base, *arm.overrides, f"seed={seed}"]
    if arm.topology is not None:
        grown = read_result(runs[arm.topology])["topology"]
        joined = sorted({entry["operator"] for entry in grown.values()} - {"ADD"})
        if joined:
            raise ConfigError(
                f"compare: arm {arm_name}: seeds planted from the start are joined by ADD, not {joined[0]}"
            )
        planted = {slot: entry["blueprint"] for slot, entry in grown.items()}
        text = ",".join(f"{slot}:{blueprint}" for slot, blueprint in planted.items())
        overrides.append(f"slots.planted={{{text}}}")
    if arm.resume_from is not None:
        overrides.append(f"host.weights={runs[arm.resume_from]}")
    where = f"compare: arm {arm_name}"
    try:
        with _COMPOSING, initialize_config_dir(str(conf_folder()), version_base="1.3"):
            plain = plain_of(compose("config", overrides))
    except ConfigError:
        raise
    except Exception as error:  # Hydra's errors have no common class
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    plain.pop("launch", None)
    config = build_config(plain)
    if arm.flops is not None:
        spent = read_result(runs[arm.flops])["flops"]
        bundle = bind(data(config.data), config.task)
        plan = plan_batches(config.trainer, bundle, seed)
        plain["trainer"]["steps"] = steps_for(arm.share * spent / flops_per_sample(config, bundle), plan)
        config = build_config(plain)
    return config, plain
