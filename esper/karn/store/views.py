"""The views that `esper query` has: name, columns with their meaning, and the SQL that makes them from ``events``.

``python -m esper.karn.store.views`` prints them as the tables of docs/store.md.
"""

from esper.karn.store.columns import WHERE, WHERE_COLUMNS, View, number_of, run_columns, select, text_of

VIEWS: dict[str, View] = {
    "runs": View(about="One run; a null where the record does not hold the figure.", columns=run_columns()),
    "events": View(
        about="One record of an event file, as in [events.md](events.md).",
        columns={
            **WHERE,
            "epoch": ("BIGINT", "passes over the training part begun"),
            "rank": ("INTEGER", "rank that said it"),
            "seq": ("BIGINT", "number of the record in its process"),
            "kind": ("VARCHAR", "kind of event"),
            "current": ("BOOLEAN", "false: a newer attempt, or a rollback, has repeated that part of the run"),
            "payload": ("JSON", "the event's own fields: `payload->>'$.slot'`"),
        },
    ),
    "ticks": View(
        about="One control tick (`telemetry.level=full`).",
        columns={
            **WHERE,
            "epoch": ("BIGINT", "passes over the training part begun"),
            "train_loss": ("DOUBLE", "mean since the last tick"),
            "train_accuracy": ("DOUBLE", "share since the last tick"),
            "validation_loss": ("DOUBLE", "the last that was measured"),
            "validation_loss_se": ("DOUBLE", "its standard error"),
            "validation_accuracy": ("DOUBLE", "the last that was measured, a share"),
            "validated": ("BOOLEAN", "validation was measured at this very tick"),
            "lr": ("DOUBLE", "learning rate of the host"),
            "gradient_norm": ("DOUBLE", "mean L2 norm of the host's gradient per step"),
            "parameters": ("BIGINT", "of the whole network"),
            "live_seeds": ("INTEGER", "seeds alive; fossils do not count"),
            "flops": ("BIGINT", "training FLOPs so far"),
            "steps_ms": ("DOUBLE", "milliseconds of training since the last tick"),
            "tick_ms": ("DOUBLE", "milliseconds that the tick took"),
            "digest_ms": ("DOUBLE", "milliseconds of it for digests"),
            "samples": ("BIGINT", "training samples since the last tick, of all ranks"),
            "samples_per_s": ("DOUBLE", "the same a second, ticks included"),
            "data_ms": ("DOUBLE", "milliseconds of `steps_ms` that rank 0 waited for data"),
            "own_ms": ("DOUBLE", "milliseconds of it for data and forward"),
        },
        sql=select(
            "tick",
            "epoch",
            f"{number_of('train_loss.value')} as train_loss",
            f"{number_of('train_accuracy.value')} as train_accuracy",
            f"{number_of('validation_loss.value')} as validation_loss",
            f"{number_of('validation_loss.se')} as validation_loss_se",
            f"{number_of('validation_accuracy.value')} as validation_accuracy",
            f"{number_of('validation_loss.tick', 'BIGINT')} is not distinct from tick as validated",
            f"{number_of('lr')} as lr",
            f"{number_of('host_gradient_norm.value')} as gradient_norm",
            f"{number_of('parameters', 'BIGINT')} as parameters",
            f"{number_of('live_seeds', 'INTEGER')} as live_seeds",
            f"{number_of('flops', 'BIGINT')} as flops",
            *(f"{number_of(name)} as {name}" for name in ("steps_ms", "tick_ms", "digest_ms")),
            f"{number_of('samples', 'BIGINT')} as samples",
            f"1000 * {number_of('samples')} / nullif({number_of('steps_ms')} + {number_of('tick_ms')}, 0) "
            "as samples_per_s",
            f"{number_of('data_ms')} as data_ms",
            f"{number_of('own_ms')} as own_ms",
        ),
    ),
    "slots": View(
        about="One slot at one tick at which it changed (`telemetry.level=full`).",
        columns={
            **WHERE,
            "slot": ("VARCHAR", "slot id"),
            "stage": ("VARCHAR", "stage of its life"),
            "alpha": ("DOUBLE", "how far the seed is blended in, 0 to 1"),
            "blueprint": ("VARCHAR", "of the seed; null without one"),
            "contribution": ("DOUBLE", "paired loss without minus with the seed; positive helps"),
            "contribution_se": ("DOUBLE", "its standard error"),
            "contribution_tick": ("BIGINT", "tick at which it was measured"),
            "gradient_norm": ("DOUBLE", "mean L2 norm of the seed's gradient per step"),
            "gradient_ratio": ("DOUBLE", "that over the host's"),
            "shapley": ("DOUBLE", "its share of what all seeds save, where it was measured"),
        },
        sql=f"""select {WHERE_COLUMNS}, slot->>'$.slot' as slot, slot->>'$.stage' as stage,
            try_cast(slot->>'$.alpha' as double) as alpha, slot->>'$.blueprint' as blueprint,
            try_cast(slot->>'$.contribution.value' as double) as contribution,
            try_cast(slot->>'$.contribution.se' as double) as contribution_se,
            try_cast(slot->>'$.contribution.tick' as bigint) as contribution_tick,
            try_cast(slot->>'$.gradient_norm.value' as double) as gradient_norm,
            try_cast(slot->>'$.gradient_ratio.value' as double) as gradient_ratio,
            try_cast(slot->>'$.worth.shapley.value' as double) as shapley
            from (select {WHERE_COLUMNS}, unnest(cast(payload->'$.slots' as json[])) as slot
                  from events where current and kind = 'tick')""",
    ),
    "stages": View(
        about="One move of a slot.",
        columns={
            **WHERE,
            "slot": ("VARCHAR", "slot id"),
            "generation": ("INTEGER", "births in the slot so far"),
            "source": ("VARCHAR", "stage before"),
            "target": ("VARCHAR", "stage from now on"),
            "cause": ("VARCHAR", "op of the command, or what nobody commanded"),
            "blueprint": ("VARCHAR", "of the seed"),
            "proposal": ("BIGINT", "id of the command behind it; 0: nobody commanded it"),
        },
        sql=select(
            "stage",
            f"{text_of('slot')} as slot",
            f"{number_of('generation', 'INTEGER')} as generation",
            *(f"{text_of(name)} as {name}" for name in ("source", "target", "cause", "blueprint")),
            f"{number_of('proposal', 'BIGINT')} as proposal",
        ),
    ),
    "decisions": View(
        about="One command of the controller: proposed, judged, and what came of it.",
        columns={
            **WHERE,
            "slot": ("VARCHAR", "slot id"),
            "op": ("VARCHAR", "what was asked for"),
            "blueprint": ("VARCHAR", "of a GERMINATE"),
            "proposal": ("BIGINT", "id that ties proposal, verdict and outcome"),
            "applied": ("BOOLEAN", "false: refused"),
            "reason": ("VARCHAR", "the controller's reason, or why it was refused"),
            "outcome": ("VARCHAR", "stage that the slot came to by it, or `vetoed: ` and why; null: it moved none"),
        },
        sql=f"""select d.*, coalesce(
                'vetoed: ' || (select any_value({text_of("reason")}) from events v where v.current and v.kind = 'veto'
                    and v.run = d.run and d.proposal > 0 and {number_of("proposal", "BIGINT")} = d.proposal),
                (select max_by({text_of("target")}, seq) from events s where s.current and s.kind = 'stage'
                    and s.run = d.run and d.proposal > 0 and {number_of("proposal", "BIGINT")} = d.proposal)) as outcome
            from ({
            select(
                "command refusal",
                f"{text_of('command.slot')} as slot",
                f"{text_of('command.op')} as op",
                f"{text_of('command.blueprint')} as blueprint",
                f"{number_of('command.proposal', 'BIGINT')} as proposal",
                f"{number_of('applied', 'BOOLEAN')} as applied",
                f"{text_of('reason')} as reason",
            )
        }) d""",
    ),
    "gates": View(
        about="One verdict of a gate.",
        columns={
            **WHERE,
            "slot": ("VARCHAR", "slot id"),
            "gate": ("VARCHAR", "G0 to G5"),
            "passed": ("BOOLEAN", "every binding check passed"),
            "enforced": ("BOOLEAN", "checks of evidence bind"),
            "score": ("DOUBLE", "share of checks that passed"),
            "failed": ("VARCHAR", "checks that failed, each with what was measured"),
        },
        sql=select(
            "gate",
            f"{text_of('slot')} as slot",
            f"{text_of('result.gate')} as gate",
            f"{number_of('result.passed', 'BOOLEAN')} as passed",
            f"{number_of('enforced', 'BOOLEAN')} as enforced",
            f"{number_of('result.score')} as score",
            """list_aggregate(list_transform(list_filter(cast(payload->'$.result.checks' as json[]),
                lambda c: (c->>'$.passed') = 'false'), lambda c: (c->>'$.name') || ': ' || (c->>'$.detail')),
                'string_agg', '; ') as failed""",
        ),
    ),
    "evidence": View(
        about="One look at a seed.",
        columns={
            **WHERE,
            "slot": ("VARCHAR", "slot id"),
            "stage": ("VARCHAR", "stage of the seed"),
            "look": ("INTEGER", "number of the look in its life"),
            "alpha": ("DOUBLE", "alpha at which it was measured"),
            "contribution": ("DOUBLE", "of this look; positive helps"),
            "contribution_se": ("DOUBLE", "its standard error"),
            "running": ("DOUBLE", "over all looks since alpha last moved"),
            "running_se": ("DOUBLE", "its standard error"),
            "log_evidence": ("DOUBLE", "log of the e-value of `running`"),
            "needed": ("DOUBLE", "log evidence that is enough: -log(chance)"),
            "counts": ("BOOLEAN", "added to `running`"),
        },
        sql=select(
            "contribution",
            f"{text_of('slot')} as slot",
            f"{text_of('stage')} as stage",
            f"{number_of('look', 'INTEGER')} as look",
            f"{number_of('alpha')} as alpha",
            f"{number_of('contribution.value')} as contribution",
            f"{number_of('contribution.se')} as contribution_se",
            f"{number_of('running.value')} as running",
            f"{number_of('running.se')} as running_se",
            f"{number_of('log_evidence')} as log_evidence",
            f"case when {number_of('chance')} > 0 then -ln({number_of('chance')}) end as needed",
            f"{number_of('counts', 'BOOLEAN')} as counts",
        ),
    ),
    "births": View(
        about="One seed, from its birth to its end.",
        columns={
            "run": WHERE["run"],
            "slot": ("VARCHAR", "slot id"),
            "generation": ("INTEGER", "births in the slot so far, from 1"),
            "blueprint": ("VARCHAR", "of the seed"),
            "proposal": ("BIGINT", "id of the command that asked for it"),
            "born_step": ("BIGINT", "step of its birth"),
            "born_tick": ("BIGINT", "tick of its birth"),
            "reason": ("VARCHAR", "why it was asked for"),
            "joined_step": ("BIGINT", "step at which it first reached the host; null: it never did"),
            "stage": ("VARCHAR", "the last stage that it reached"),
            "fate": ("VARCHAR", "`fossilised`, `pruned` or `alive`"),
            "ended_step": ("BIGINT", "step of its fossilising or pruning"),
            "end_cause": ("VARCHAR", "op of the command that ended it, or what nobody commanded"),
            "end_reason": ("VARCHAR", "the reason of that command"),
            "looks": ("INTEGER", "times that it was measured"),
            "contribution": ("DOUBLE", "over all looks since alpha last moved, at the last of them"),
            "contribution_se": ("DOUBLE", "its standard error"),
        },
    ),
    "checkpoints": View(
        about="One checkpoint that was committed.",
        columns={
            **WHERE,
            "saved_step": ("BIGINT", "step whose state it holds"),
            "path": ("VARCHAR", "its folder"),
            "bytes": ("BIGINT", "size of all files"),
            "save_ms": ("DOUBLE", "milliseconds of writing, beside training"),
            "stall_ms": ("DOUBLE", "milliseconds that training stood still"),
        },
        sql=select(
            "checkpoint",
            f"{number_of('saved_step', 'BIGINT')} as saved_step",
            f"{text_of('path')} as path",
            f"{number_of('bytes', 'BIGINT')} as bytes",
            f"{number_of('save_ms')} as save_ms",
            f"{number_of('stall_ms')} as stall_ms",
        ),
    ),
    "faults": View(
        about="One thing that went wrong, or was done about it, on any rank.",
        columns={
            **WHERE,
            "rank": ("INTEGER", "rank that said it"),
            "kind": ("VARCHAR", "fault, panic, rollback, breaker, shift, skipped, veto or degraded"),
            "place": ("VARCHAR", "a slot, a file, a sink or a phase"),
            "what": ("VARCHAR", "what happened, in words"),
        },
        sql=select(
            "fault panic rollback breaker shift skipped veto degraded",
            "rank",
            "kind",
            f"coalesce({text_of('where')}, {text_of('slot')}, {text_of('symptom')}, {text_of('blamed')}) as place",
            f"""coalesce({text_of("what")}, {text_of("words")}, {text_of("reason")},
                case kind when 'skipped' then {text_of("count")} || ' steps from step ' || {text_of("first_step")}
                          when 'rollback' then 'back to step ' || {text_of("to_step")} end) as what""",
        ),
    ),
}


def reference() -> str:
    """All views as Markdown."""
    text = []
    for name, view in VIEWS.items():
        text += [f"### {name}", view.about, "", "| column | type | meaning |", "|---|---|---|"]
        text += [f"| `{column}` | {kind} | {meaning} |" for column, (kind, meaning) in view.columns.items()]
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    print(reference(), end="")
