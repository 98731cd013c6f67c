"""Compares arms: a row of numbers for each, and the claims that the runs support. Pure functions of run records.

Each number is a mean over seeds with its 95 % t-interval; arms on the same seeds are compared by paired differences.
`esper.karn.rows` says what the numbers mean, `esper.karn.claims` what is claimed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from esper.karn.claims import Claim, choose_smaller_sizes, judge_claims
from esper.karn.rows import Metric, Row, Runs, equal_flops, make_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the table and the page show.

    Fields:
        name: of the experiment.
        metric: of its score.
        rows: one per arm, in the order given.
        equal_flops: the FLOPs of the column "equal FLOPs", for each seed that every arm but `none` has.
        informative: whether headroom is shown (True) or refuted (False: one refuted claim does); None while it is open.
        verdicts: the claims, in order.
        notes: what a reader must know beside the numbers, one line each.
    """

    name: str
    metric: Metric
    rows: tuple[Row, ...]
    equal_flops: dict[int, float]
    informative: bool | None
    verdicts: tuple[Claim, ...]
    notes: tuple[str, ...] = ()

    def row(self, arm: str) -> Row | None:
        """The row of an arm; None if it was not run."""
        return next((row for row in self.rows if row.arm == arm), None)


def compare(
    name: str,
    runs: Runs,
    metric: Metric,
    *,
    sizes: Sequence[str],
    subject: str,
    flops_share: float,
    margin: float,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compares all arms.

    Args:
        name: of the experiment.
        runs: finished runs by arm and seed; arms without a run are left out.
        metric: of the score.
        sizes: arms of fixed size between host and final.
        subject: the arm that the claims are about.
        flops_share: the share of `final`'s training FLOPs within which the subject should reach its loss.
        margin: how much worse than a fixed schedule, in units of the score, is too much; fixed before the runs.
        notes: the caller's notes, one line each, shown before those made here.
    """
    present = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    smaller, own_notes = choose_smaller_sizes(present, sizes)
    room, claims = judge_claims(present, metric, subject, smaller, flops_share=flops_share, margin=margin)
    holds = [verdict.holds for verdict in room]
    undecided = not smaller or None in holds
    at_equal, every = equal_flops(present), set[int]().union(*present.values())
    if len(at_equal) < len(every):
        own_notes.append(
            f"loss at equal FLOPs is over {len(at_equal)} of {len(every)} seeds: those of every arm but none"
        )
    return Comparison(
        name=name,
        metric=metric,
        rows=tuple(make_row(present, metric, arm) for arm in present),
        equal_flops=at_equal,
        informative=False if False in holds else None if undecided else True,
        verdicts=(*room, *claims),
        notes=(*notes, *own_notes),
    )
