"""What of a run's events wandb gets as rows of its history.

Values logged at a tick:

    train/step, tick, epoch            axes: optimizer steps, control ticks, passes over the training part
    train/loss, train/accuracy         mean since the last tick (the task's unit, per sample; share)
    validation/loss, validation/accuracy                  accuracy where the task knows right and wrong
    train/<metric>, validation/<metric>                   the task's own
    lr, host_gradient_norm, parameters, live_seeds, training_flops
    host_gradient_vanishing, _exploding, _nans, _infs     shares of the host's parameters; tensors of its gradient
    time/steps_ms, time/tick_ms, time/digest_ms
    throughput/samples_per_s, throughput/flops_per_s      since the last tick, of all ranks, ticks included
    throughput/mfu                     the second as a share of telemetry.health.peak_flops times ranks
    throughput/data_wait               share of the steps' time that rank 0 waited for data
    slots/<slot>/stage                 `Stage.code`: 0 EMPTY, 1 GERMINATED, 2 TRAINING, 3 BLENDING, 4 HOLDING, ...
    slots/<slot>/alpha
    slots/<slot>/effective_alpha       alpha times gate_mean, where the operator is gated
    slots/<slot>/gate_mean, gate_std   openness of the gate, over the training samples since the last tick
    slots/<slot>/contribution          paired loss without minus with the seed (nats; positive helps), with _se
    slots/<slot>/solo, leave_one_out, shapley             what the seed is worth (nats), with _se; with
                                       control.attribute_every alone
    all_seeds                          the same of all blended seeds together, with _se
    slots/<slot>/gradient_norm, gradient_ratio            the ratio is to the host's norm
    slots/<slot>/gradient_parity, update_parity           RMS of gradient and of update, over the host's
    slots/<slot>/gradient_vanishing, _exploding, _nans, _infs

Values logged at an update of a policy: the axes (optimizer steps of the policy, steps of each environment, updates),
the numbers that docs/policy.md explains, time/collect_ms and time/update_ms.

A reading that is absent or stale is left out of the row, since it is neither zero nor of this tick.
"""

from esper.leyline.events import PolicyUpdated, TickDone
from esper.leyline.evidence import GradientHealth, Reading


def tick_row(event: TickDone) -> dict[str, float]:
    """Returns the values of one tick under their wandb names, as listed in the module."""
    row: dict[str, float] = {
        "train/step": event.step,
        "tick": event.tick,
        "epoch": event.epoch,
        "lr": event.lr,
        "parameters": event.parameters,
        "live_seeds": event.live_seeds,
        "time/steps_ms": event.steps_ms,
        "time/tick_ms": event.tick_ms,
        "time/digest_ms": event.digest_ms,
    }

    if event.flops is not None:
        row["training_flops"] = event.flops
    seconds = (event.steps_ms + event.tick_ms) / 1e3
    if seconds > 0:
        row["throughput/samples_per_s"] = event.samples / seconds
        row["throughput/data_wait"] = event.data_ms / event.steps_ms if event.steps_ms > 0 else 0.0
        if event.interval_flops is not None:
            row["throughput/flops_per_s"] = event.interval_flops / seconds

    def add(name: str, reading: Reading, *, with_se: bool = False) -> None:
        if reading.is_measured and reading.value is not None:
            row[name] = reading.value
            if with_se and reading.se is not None:
                row[f"{name}_se"] = reading.se

    add("train/loss", event.train_loss)
    add("train/accuracy", event.train_accuracy)
    add("validation/loss", event.validation_loss)
    add("validation/accuracy", event.validation_accuracy)
    for name, reading in event.metrics.items():
        if reading.tick == event.tick:
            add(name.replace("_", "/", 1), reading)
    add("all_seeds", event.together, with_se=True)
    add("host_gradient_norm", event.host_gradient_norm)

    def add_health(name: str, health: GradientHealth) -> None:
        add(f"{name}_vanishing", health.vanishing)
        add(f"{name}_exploding", health.exploding)
        row[f"{name}_nans"], row[f"{name}_infs"] = health.nans, health.infs

    add_health("host_gradient", event.host_health)
    for line in event.slots:
        name = f"slots/{line.slot}"
        row[f"{name}/stage"] = line.stage.code
        row[f"{name}/alpha"] = line.alpha
        add(f"{name}/effective_alpha", line.effective_alpha)
        add(f"{name}/gate_mean", line.gate_mean)
        add(f"{name}/gate_std", line.gate_std)
        add(f"{name}/contribution", line.contribution, with_se=True)
        for kind in ("solo", "leave_one_out", "shapley"):
            add(f"{name}/{kind}", getattr(line.worth, kind), with_se=True)
        add(f"{name}/gradient_norm", line.gradient_norm)
        add(f"{name}/gradient_ratio", line.gradient_ratio)
        add(f"{name}/gradient_parity", line.gradient_parity)
        add(f"{name}/update_parity", line.update_parity)
        if line.stage.has_seed:
            add_health(f"{name}/gradient", line.health)
            add(f"{name}/moved", line.health.moved)
    return row


def update_row(event: PolicyUpdated) -> dict[str, float]:
    """Returns the values of one update of a policy under their wandb names: those of docs/policy.md, axes and times."""
    axes = {"train/step": event.step, "tick": event.tick, "epoch": event.epoch}
    return {**axes, **event.numbers, "time/collect_ms": event.collect_ms, "time/update_ms": event.update_ms}
