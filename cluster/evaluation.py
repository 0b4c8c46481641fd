# SPDX-License-Identifier: Apache-2.0
"""What evaluation splits found, checked when it comes and merged at the end of an epoch. Pure.

Invariant: what passed ``check`` merges into metrics that are numbers or None; merging goes in order of split, so the metrics
do not depend on who evaluated what, or when.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from oarlock.data.scores import MAX_SAMPLES, METRICS, Scores
from oarlock.proto.errors import InvalidArgument

# The recipe's sums, [weight, metric sums...], or scores with labels as Scores.to_bytes gives them.
Found = list[float] | bytes
# None: what was evaluated leaves the metric without a meaning.
Metrics = dict[str, float | None]

# Sums beyond it could add up, or their means come out, as infinity, which no checkpoint can hold.
MAX_SUM = 1e100


class Evaluation(NamedTuple):
    """Metrics of an epoch by name; ``samples``: how many they were taken of, 0 if only the recipe knows."""

    metrics: Metrics
    samples: int


def check(split: int, sums: Sequence[float], scores: bytes, names: tuple[str, ...], splits: int) -> Found:
    """Return what a split is said to have found; raise unless ``splits`` of its kind merge into the metrics ``names``."""
    where = f"evaluation split {split}"
    if scores:
        if sums:
            raise InvalidArgument(f"{where}: scores and {len(sums)} sums came: give one of them")
        if unknown := [name for name in names if name not in METRICS]:
            raise InvalidArgument(
                f"{where}: scores came, and no metric {unknown[0]!r} is made of these: a recipe whose workload has labels() "
                f"plans metrics among {', '.join(METRICS)}"
            )
        samples, most = Scores.from_bytes(scores).samples, MAX_SAMPLES // splits
        if samples > most:
            raise InvalidArgument(
                f"{where}: scores of {samples} samples came; {splits} splits have at most {most} each"
            )
        return scores
    if len(sums) != 1 + len(names) or not all(abs(s) <= MAX_SUM for s in sums):
        raise InvalidArgument(f"{where}: {len(sums)} sums came, wanted {1 + len(names)} finite ones")
    if not (sums[0] == 0 or sums[0] >= 1 / MAX_SUM):
        raise InvalidArgument(f"{where}: its weight is {sums[0]}: give 0 or a positive number")
    return list(sums)


def check_alike(split: int, found: Found, others: Iterable[Found]) -> None:
    """Raise if splits of one epoch were evaluated in two ways, which do not merge."""
    other = next(iter(others), found)
    if isinstance(other, bytes) != isinstance(found, bytes):
        kinds = {True: "scores", False: "sums"}
        raise InvalidArgument(
            f"evaluation split {split}: {kinds[isinstance(found, bytes)]} came, and {kinds[isinstance(other, bytes)]} of the "
            "epoch's other splits: all workers must run the same recipe"
        )


def merge(found: Sequence[Found], names: tuple[str, ...]) -> Evaluation:
    """Return the metrics of all that was found, given in order of split; None where nothing was."""
    if not found:
        return Evaluation(dict.fromkeys(names), 0)
    if isinstance(found[0], bytes):
        scores = Scores.merge([Scores.from_bytes(one) for one in found if isinstance(one, bytes)])
        metrics = scores.metrics()
        return Evaluation({name: metrics[name] for name in names}, scores.samples)
    totals = [0.0] * (1 + len(names))
    for one in found:
        totals = [a + b for a, b in zip(totals, one, strict=True)]
    return Evaluation({m: (t / totals[0] if totals[0] else 0.0) for m, t in zip(names, totals[1:], strict=True)}, 0)
