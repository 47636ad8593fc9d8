"""Every method on digits at equal budgets: IID and not, three mixes of ranks, three seeds.

``python -m benchmarks.methods.digits --out FOLDER`` runs what is not done, about two hours on one
core, and writes ``benchmarks/results/methods-digits.json``.

Two tasks over the small ViT that was pretrained on rendered fonts. ``shuffled``: the sixteen
patches of every picture change places and black and white are exchanged, the same way for all
pictures, so that the frozen backbone fits badly and rank matters; all methods, all settings.
``upright``: the pictures as they are; non-IID with one mix. ``straggler`` is left out: on such a
fleet ``fedit`` falls back to the weakest client's rank, and the two are the same run.
"""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from numpy.typing import NDArray
from PIL import Image as Pillow
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.methods import grid, side_by_side
from benchmarks.methods.grid import Grid, Setting
from rankfit.strategies.methods import methods

#: 12 clients, 4 a round, 4 steps of 16 samples. The global rank is 8; upload decides the ranks.
SHARED = (
    "quickstart", "run.rounds=20", "server.evaluate-every=2", "server.clients-per-round=4",
    "server.min-clients=3", "train.batch-size=16", "train.steps=4", "partition.min-samples=16",
    'fleet.memory-mib="64"', 'fleet.download-mbps="200"', "plan.download-seconds=0.02",
    "method.warm-up-rounds=4", "method.renew-every=4",
)  # fmt: skip
SPLITS = {
    "dirichlet-0.3": ("partition.kind=dirichlet", "partition.alpha=0.3"),
    "iid": ("partition.kind=iid",),
}
#: Upload in Mbps that leads to the ranks in the name, dealt in turn: one unit of rank in all
#: modules is 4 KiB. Where one factor is trained, the same bytes carry twice the rank.
MIXES = {
    "1-2-8": ('fleet.upload-mbps="3, 5, 20"',),
    "1-1-1-8": ('fleet.upload-mbps="3, 3, 3, 20"',),
    "2-4-8": ('fleet.upload-mbps="5, 8, 20"',),
}
RATES = (0.003, 0.01, 0.03)
#: Where neighbours in the table are to be told apart: a method whose best rate lies between two of
#: the three would lose by that more than by its merge.
FINE_RATES = (0.003, 0.0055, 0.01, 0.017, 0.03)
EIGHT_SEEDS = tuple(range(8))
#: One split is one draw: on a single one ``rankfit`` chose a rate of three times its best.
THREE_SPLITS = (100, 101, 102)
#: Rows that need a setting beside their name.
NEEDS = {"lokr": "lokr+lora.form=kronecker"}
#: The methods that the slower comparisons are between.
LEADING = ("fedit", "flexlora", "fslora", "hetlora", "hralora", "rankfit")
#: Rows beside the catalogue, in one setting.
ABLATIONS = (
    "rankfit+method.without=remainder", "rankfit+method.without=unit-rows",
    "rankfit+method.without=damping", "rankfit+method.without=slow-rows",
    "rankfit+method.without=rank-rates", "rankfit+method.without=whole-head",
    "alternating+method.remainder=true", "rankfit+train.moments=kept", "flora+train.moments=kept",
    "ffa-lora+train.moments=kept",
)  # fmt: skip


def digits_grid(data: Path) -> Grid:
    """The comparison, over pictures that :func:`write_pictures` wrote."""

    def setting(task: str, split: str, mix: str) -> Setting:
        parts = (*SHARED, f"data.source={data / task}", *SPLITS[split], *MIXES[mix])
        return Setting(f"{task}/{split}/{mix}", parts)

    columns = [setting("shuffled", split, mix) for split in SPLITS for mix in MIXES]
    validation = {}
    for task in ("shuffled", "upright"):
        # Without a test set, a quarter of the training pictures is held out.
        parts = (*setting(task, "dirichlet-0.3", "1-2-8").parts, "data.test=")
        validation[task] = Setting(f"{task}-validation", parts)
    return Grid(
        name="digits",
        methods=tuple(NEEDS.get(name, name) for name in sorted(set(methods()) - {"straggler"})),
        settings=(*columns, setting("upright", "dirichlet-0.3", "1-2-8")),
        validation=validation,
        rates=RATES,
        runner=side_by_side.run,
        validation_seeds=THREE_SPLITS,
        more={"shuffled/dirichlet-0.3/1-2-8": ABLATIONS},
    )


def write_pictures(folder: Path) -> None:
    """Write both tasks as parquet, with one test set for all seeds."""
    digits = load_digits()
    pictures = np.round(digits.images * 255 / 16).astype(np.uint8)  # (n, 8, 8)
    parts = train_test_split(
        np.arange(len(pictures)), test_size=0.25, random_state=0, stratify=digits.target
    )
    names = ClassLabel(names=[str(name) for name in digits.target_names])
    features = Features({"image": Image(), "label": names})
    for task, shown in (("upright", pictures), ("shuffled", shuffled(pictures))):
        for part, rows in zip(("train", "test"), parts, strict=True):
            file = folder / task / f"{part}.parquet"
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            images = [Pillow.fromarray(shown[row]) for row in rows]
            columns = {"image": images, "label": digits.target[rows].tolist()}
            Dataset.from_dict(columns, features=features).to_parquet(file)


def shuffled(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exchange the 2 × 2 patches of all pictures in one drawn order, and black with white."""
    order = np.random.default_rng(0).permutation(16)
    patches = pictures.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 2, 2)
    moved = patches[:, order].reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4)
    return 255 - moved.reshape(-1, 8, 8)


def main() -> None:
    """Carry out the comparison."""
    asked = grid.arguments(str(__doc__))
    data = asked.out.resolve() / "data"
    if not asked.table:
        write_pictures(data)
    grid.carry_out(digits_grid(data), asked)


if __name__ == "__main__":
    main()
