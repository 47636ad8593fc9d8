"""Accuracies over groups of examples (the tasks of a suite), of one client or of many."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rankfit.tasks import intervals

#: Right and all examples of a group.
Part = tuple[int, int]


def scores(right: Sequence[bool], groups: Sequence[str], *, several: bool) -> dict[str, float]:
    """Accuracy of each group and their mean, with 95 % intervals.

    Parameters
    ----------
    right : Sequence[bool]
        Of each example.
    groups : Sequence[str]
        Of each example.
    several : bool
        The data has more groups than one, though these examples may not.
    """
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for group, one in zip(groups, right, strict=True):
        found[group].append(one)
    return _figures({g: (sum(own), len(own)) for g, own in found.items()}, several=several)


def pooled(replies: Iterable[Mapping[str, int | float]]) -> dict[str, float]:
    """Metrics over clients, as if their examples lay in one place where that can be told.

    Accuracies of groups are added up by group, and intervals are those of all examples; any other
    metric that all clients have is its mean weighted by ``num-examples``.
    """
    usable = [metrics for metrics in replies if metrics.get("num-examples", 0) > 0]
    if not usable:
        return {}
    total = sum(float(metrics["num-examples"]) for metrics in usable)
    keys = set.intersection(*(set(metrics) for metrics in usable)) - {"num-examples"}
    mean = {
        key: sum(float(m[key]) * float(m["num-examples"]) for m in usable) / total
        for key in sorted(keys)
    }
    groups = {key.rpartition(".")[0] for m in usable for key in m if key.endswith(".examples")}
    if groups:
        parts = {group: _part(usable, f"{group}.accuracy", f"{group}.examples") for group in groups}
    elif {"accuracy", "low", "high"} <= keys:
        parts = {"": _part(usable, "accuracy", "num-examples")}
    else:
        return mean
    return mean | _figures(parts, several=bool(groups))


def _part(replies: Iterable[Mapping[str, int | float]], accuracy: str, examples: str) -> Part:
    having = [metrics for metrics in replies if examples in metrics]
    right = sum(round(float(metrics[accuracy]) * float(metrics[examples])) for metrics in having)
    return right, sum(int(metrics[examples]) for metrics in having)


def _figures(parts: Mapping[str, Part], *, several: bool) -> dict[str, float]:
    """Wilson's interval for a group, :func:`rankfit.tasks.intervals.of_mean` for the mean."""
    low, high = intervals.of_mean(list(parts.values()))
    accuracy = sum(right / total for right, total in parts.values()) / len(parts)
    figures = {"accuracy": accuracy, "low": low, "high": high}
    for group, (right, total) in sorted(parts.items()) if several else ():
        ends = intervals.wilson(right, total)
        figures |= {
            f"{group}.accuracy": right / total,
            f"{group}.low": ends[0],
            f"{group}.high": ends[1],
            f"{group}.examples": total,
        }
    return figures
