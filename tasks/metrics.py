"""Figures of classifiers and regressions, pooled over groups and clients, with intervals."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankfit.configs.protocol import Metric

#: Of a classifier, unless ``task.metrics`` names others.
DEFAULT = ("accuracy", "macro-f1", "micro-f1")

Figure = Callable[[NDArray[Any], NDArray[Any]], float]


def classification_metrics(
    logits: Tensor, labels: Tensor, names: Sequence[str] = DEFAULT
) -> dict[str, float]:
    """Figures of a classifier, and its mean cross entropy as ``loss``.

    Macro F1 is the mean over the classes that occur among labels or predictions; a class that is
    never predicted counts 0. ``f1`` is that of class 1 of two (GLUE's MRPC and QQP), ``mcc``
    Matthews' correlation (CoLA); both are 0 where they are not defined.

    Parameters
    ----------
    logits
        Shape (n, classes).
    labels
        Shape (n,), int64.

    Raises
    ------
    ValueError
        If there is no example, or the shapes do not fit.
    """
    _check(logits, labels)
    if "f1" in names and logits.shape[1] != 2:
        raise ValueError(f"f1 is of two classes, here are {logits.shape[1]}; use macro-f1")
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    predicted = logits.argmax(dim=1)  # (n,)
    figures = {name: _CLASSES[name](labels.numpy(), predicted.numpy()) for name in names}
    return figures | {"loss": float(torch.nn.functional.cross_entropy(logits, labels))}


def regression_metrics(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Figures of a regression, and its mean squared error as ``loss``.

    ``pearson`` and ``spearman`` (GLUE's STS-B) are 0 where predictions or labels are all alike.

    Parameters
    ----------
    logits
        Shape (n, 1).
    labels
        Shape (n,), floating.

    Raises
    ------
    ValueError
        If there is no example, or the shapes do not fit.
    """
    _check(logits, labels)
    predicted = logits.detach().float().cpu().squeeze(1).numpy()  # (n,)
    wanted = labels.float().cpu().numpy()
    figures = {name: _NUMBERS[name](wanted, predicted) for name in names}
    return figures | {"loss": _mse(wanted, predicted)}


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (n, classes) "
            "and (n,) with n above 0"
        )


def _f1(average: str) -> Figure:
    def figure(labels: NDArray[Any], predicted: NDArray[Any]) -> float:
        from sklearn.metrics import f1_score

        value: Any = f1_score(labels, predicted, average=average, zero_division=0.0)
        return float(value)

    return figure


def _mcc(labels: NDArray[Any], predicted: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(wanted: NDArray[Any], predicted: NDArray[Any]) -> float:
    if len(wanted) < 2 or wanted.std() == 0 or predicted.std() == 0:
        return 0.0
    return float(np.corrcoef(wanted.astype(np.float64), predicted.astype(np.float64))[0, 1])


def _spearman(wanted: NDArray[Any], predicted: NDArray[Any]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(wanted), rankdata(predicted))


def _mse(wanted: NDArray[Any], predicted: NDArray[Any]) -> float:
    return float(np.square(wanted.astype(np.float64) - predicted).mean())


_CLASSES: dict[str, Figure] = {
    "accuracy": lambda labels, predicted: float((labels == predicted).mean()),
    "macro-f1": _f1("macro"),
    "micro-f1": _f1("micro"),
    "f1": _f1("binary"),
    "mcc": _mcc,
}
_NUMBERS: dict[str, Figure] = {"pearson": _pearson, "spearman": _spearman, "mse": _mse}


_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927); it stays inside [0, 1], also at 0 and 1.

    Raises
    ------
    ValueError
        If ``total`` is 0, or ``right`` is not between 0 and it.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}; expected 0 to {total}, of at least 1")
    share = right / total
    scale = 1 + _Z**2 / total
    middle = (share + _Z**2 / (2 * total)) / scale
    half = _Z / scale * (share * (1 - share) / total + _Z**2 / (4 * total**2)) ** 0.5
    # At 0 and 1 the ends are exact; rounding must not leave them a hair outside.
    return (max(0.0, middle - half) if right else 0.0), (
        min(1.0, middle + half) if right < total else 1.0
    )


def of_mean(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Interval of the mean of independent shares, each (right, total).

    The halves of the parts' Wilson intervals are joined as independent errors (MOVER, Zou and
    Donner 2008), so that one part gives Wilson's own interval.

    Raises
    ------
    ValueError
        If there is no part, or one is no share.
    """
    if not parts:
        raise ValueError("no parts; expected at least one (right, total)")
    shares = [right / total for right, total in parts]
    ends = [wilson(right, total) for right, total in parts]
    mean = sum(shares) / len(parts)
    low = sum((s - end[0]) ** 2 for s, end in zip(shares, ends, strict=True)) ** 0.5
    high = sum((end[1] - s) ** 2 for s, end in zip(shares, ends, strict=True)) ** 0.5
    return max(0.0, mean - low / len(parts)), min(1.0, mean + high / len(parts))


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
    usable = [metrics for metrics in replies if metrics.get(Metric.NUM_EXAMPLES, 0) > 0]
    if not usable:
        return {}
    total = sum(float(metrics[Metric.NUM_EXAMPLES]) for metrics in usable)
    keys = set.intersection(*(set(metrics) for metrics in usable)) - {Metric.NUM_EXAMPLES}
    mean = {
        key: sum(float(m[key]) * float(m[Metric.NUM_EXAMPLES]) for m in usable) / total
        for key in sorted(keys)
    }
    groups = {
        key.rpartition(".")[0] for m in usable for key in m if key.endswith(Metric.GROUP_EXAMPLES)
    }
    if groups:
        parts = {
            group: _part(usable, f"{group}.accuracy", f"{group}{Metric.GROUP_EXAMPLES}")
            for group in groups
        }
    elif {"accuracy", "low", "high"} <= keys:
        parts = {"": _part(usable, "accuracy", Metric.NUM_EXAMPLES)}
    else:
        return mean
    return mean | _figures(parts, several=bool(groups))


def _part(replies: Iterable[Mapping[str, int | float]], accuracy: str, examples: str) -> Part:
    having = [metrics for metrics in replies if examples in metrics]
    right = sum(round(float(metrics[accuracy]) * float(metrics[examples])) for metrics in having)
    return right, sum(int(metrics[examples]) for metrics in having)


def _figures(parts: Mapping[str, Part], *, several: bool) -> dict[str, float]:
    """Wilson's interval for a group, :func:`rankfit.tasks.metrics.of_mean` for the mean."""
    low, high = of_mean(list(parts.values()))
    accuracy = sum(right / total for right, total in parts.values()) / len(parts)
    figures = {"accuracy": accuracy, "low": low, "high": high}
    for group, (right, total) in sorted(parts.items()) if several else ():
        ends = wilson(right, total)
        figures |= {
            f"{group}.accuracy": right / total,
            f"{group}.low": ends[0],
            f"{group}.high": ends[1],
            f"{group}{Metric.GROUP_EXAMPLES}": total,
        }
    return figures
