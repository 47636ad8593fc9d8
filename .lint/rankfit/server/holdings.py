"""Who holds what: the partition of a run, saved with it and drawn."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: Files in the run directory.
PARTITION, PLOT = "partition.json", "partition.svg"
#: Classes that the plot tells apart; the others are drawn as one.
_SHOWN = 20


@dataclass(frozen=True)
class Holdings:
    """Which training examples each client holds.

    Attributes
    ----------
    parts : sequence of NDArray
        Indices into the training set, by client.
    labels : NDArray
        Class of every training example, (n,).
    class_names : sequence of str
        Empty where labels are no classes.
    """

    parts: Sequence[NDArray[np.int64]]
    labels: NDArray[np.int64]
    class_names: Sequence[str]

    def counts(self) -> NDArray[np.int64]:
        """Examples by client and class, (clients, classes)."""
        first = int(self.labels.min(initial=0))
        classes = max(len(self.class_names), int(self.labels.max(initial=0)) + 1 - first)
        return np.stack(
            [np.bincount(self.labels[part] - first, minlength=classes) for part in self.parts]
        )

    def save(self, folder: Path) -> None:
        """Write the indices, the counts and the plot into a run directory."""
        record = {
            "examples": len(self.labels),
            "classes": list(self.class_names),
            "clients": [
                {"partition": number, "samples": len(part), "counts": row, "indices": part.tolist()}
                for number, (part, row) in enumerate(
                    zip(self.parts, self.counts().tolist(), strict=True)
                )
            ],
        }
        (folder / PARTITION).write_text(json.dumps(record), encoding="utf-8")
        self.draw(folder / PLOT)

    def draw(self, file: Path) -> None:
        """Draw one bar a client, its classes stacked; the ending of the name is the format."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: no display, no global state

        counts = self.counts()
        names = list(self.class_names) or [str(i) for i in range(counts.shape[1])]
        if counts.shape[1] > _SHOWN:
            rest = counts[:, _SHOWN - 1 :].sum(axis=1, keepdims=True)
            names = [*names[: _SHOWN - 1], f"{counts.shape[1] - _SHOWN + 1} others"]
            counts = np.concatenate([counts[:, : _SHOWN - 1], rest], axis=1)
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(counts)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(counts))
        for number, name in enumerate(names):
            width = counts[:, number]
            colour = colormaps["tab20"](number)
            axes.barh(range(len(counts)), width, left=left, color=colour, label=name)
            left += width
        axes.set_xlabel("training examples")
        axes.set_ylabel("partition")
        axes.invert_yaxis()
        if len(names) > 1:
            figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(file)
