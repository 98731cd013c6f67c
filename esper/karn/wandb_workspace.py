"""``esper wandb-workspace``: one page of panels in wandb for all runs of a project.

    Growth             what lives in each slot, how far it is blended in, how large the network is
    Evidence           what each seed is worth with its error, and every decision with its reason
    Health             losses, gradients, and what went wrong
    Cost               time of steps and ticks, FLOPs
    Sweep comparison   runs grouped by their controller: quality against size and cost

The panels are data (`SECTIONS`); wandb's library makes of them what is sent, and its server is needed only to save it.
"""

import json
import warnings
from dataclasses import dataclass
from typing import Any

from esper.leyline.errors import ConfigError, EsperError, one_line

STEP = "train/step"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Fields:
        title: above it.
        metrics: names of rows' values, a line each; or of summary numbers, for `kind` bar.
        regex: instead of names: every value whose name matches, a line each.
        table: instead of both: the table of this name.
        kind: ``line``, ``bar`` or ``scatter`` (x, y of the summary).
        by_controller: runs of one controller are drawn as their mean and standard error.
    """

    title: str
    metrics: tuple[str, ...] = ()
    regex: str | None = None
    table: str | None = None
    kind: str = "line"
    by_controller: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Growth": (
        Panel("Stage of each slot", regex="slots/.*/stage"),
        Panel("Alpha of each slot", regex="slots/.*/alpha"),
        Panel("Parameters", ("parameters",)),
        Panel("Seeds alive", ("live_seeds",)),
        Panel("Changes of stage", table="growth"),
        Panel("Births: size and cost", table="births"),
    ),
    "Evidence": (
        Panel("Contribution of each seed", regex="slots/.*/contribution"),
        Panel("Its standard error", regex="slots/.*/contribution_se"),
        Panel("Refusals, vetoes, births so far", ("counts/refusals", "counts/vetoes", "counts/births")),
        Panel("Decisions: proposal, verdict, reason, outcome", table="decisions"),
    ),
    "Health": (
        Panel("Loss", ("train/loss", "validation/loss")),
        Panel("Metrics of validation", regex="validation/.*"),
        Panel("Gradient norm of the host", ("host_gradient_norm",)),
        Panel("Gradient norm of seeds over the host's", regex="slots/.*/gradient_ratio"),
        Panel("Faults, panics, rollbacks so far", ("counts/faults", "counts/panics", "counts/rollbacks")),
        Panel("Incidents", table="incidents"),
    ),
    "Cost": (
        Panel("Milliseconds of steps, tick and digests", ("time/steps_ms", "time/tick_ms", "time/digest_ms")),
        Panel("Training FLOPs", ("training_flops",)),
        Panel("Learning rate", ("lr",)),
    ),
    "Sweep comparison": (
        Panel("Validation loss by controller", ("validation/loss",), by_controller=True),
        Panel("Metrics of validation by controller", regex="validation/.*", by_controller=True),
        Panel("Validation loss against parameters", ("parameters", "validation_loss"), kind="scatter"),
        Panel("Validation loss against training FLOPs", ("training_flops", "validation_loss"), kind="scatter"),
        Panel("Fossils", ("fossils",), kind="bar", by_controller=True),
    ),
}


def library() -> tuple[Any, Any]:
    """Imports wandb's library for workspaces; returns its modules of workspaces and of panels.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses pydantic as one did before its version 2
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ConfigError("this needs wandb-workspaces, which is not installed: pip install 'esper[wandb]'") from None
    return workspaces, panels


def _build(panel: Panel, panels: Any) -> Any:
    """One panel as the library has it."""
    group = panels.Config("controller.kind") if panel.by_controller else None
    if panel.table is not None:
        return panels.WeavePanelSummaryTable(table_name=f"tables/{panel.table}")
    if panel.kind == "scatter":
        x, y = (panels.SummaryMetric(name) for name in panel.metrics)
        return panels.ScatterPlot(title=panel.title, x=x, y=y)
    if panel.kind == "bar":
        found = [panels.SummaryMetric(name) for name in panel.metrics]
        return panels.BarPlot(title=panel.title, metrics=found, groupby=group)
    how = {"groupby": group, "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"} if group is not None else {}
    if panel.regex is not None:
        return panels.LinePlot(title=panel.title, x=STEP, metric_regex=panel.regex, **how)
    return panels.LinePlot(title=panel.title, x=STEP, y=list(panel.metrics), **how)


def make_workspace(entity: str, project: str, name: str) -> Any:
    """Makes the workspace; nothing is sent.

    Args:
        entity: user or team in wandb.
        project: its project.
        name: what the view is called.

    Raises:
        ConfigError: the library is not installed.
    """
    workspaces, panels = library()
    sections = [
        workspaces.Section(name=title, panels=[_build(panel, panels) for panel in section], is_open=True)
        for title, section in SECTIONS.items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def specification(workspace: Any) -> dict[str, Any]:
    """What would be sent to wandb's server, as plain data."""
    found: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    return found


def save_workspace(workspace: Any) -> str:
    """Sends a workspace to wandb; returns its address.

    Raises:
        EsperError: wandb does not take it.
    """
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:  # the library has errors of its own, and lets the network's through
        raise EsperError(
            f"wandb did not take the workspace: {one_line(error)}; `wandb login`, and see that the project exists"
        ) from None
