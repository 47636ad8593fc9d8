"""Figures of classifiers and of regressions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
