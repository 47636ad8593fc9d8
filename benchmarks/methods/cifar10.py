"""Six leading methods on classes of CIFAR-10 that the frozen backbone has never seen.

``python -m benchmarks.methods.cifar10 --data FOLDER --vit FOLDER --out FOLDER`` reads
``image/cifar10_train.parquet`` and ``cifar10_test.parquet`` under ``--data`` and the backbone that
``benchmarks/pretrain_vit.py`` wrote, and writes ``benchmarks/results/methods-cifar10.json``.
Four classes, Dirichlet(0.3) over 12 clients, ranks 1, 2 and 8, eight seeds.
"""

from pathlib import Path

from benchmarks.methods import grid, side_by_side
from benchmarks.methods.digits import (
    EIGHT_SEEDS,
    FINE_RATES,
    LEADING,
    MIXES,
    SHARED,
    SPLITS,
    THREE_SPLITS,
)
from benchmarks.methods.grid import Grid, Setting
from benchmarks.tasks import held_out


def cifar10_grid(data: Path, vit: Path) -> Grid:
    """The comparison, over the held-out classes as :func:`benchmarks.tasks.held_out` wrote them."""
    parts = (
        *SHARED, f"model.source={vit}", f"data.source={data}", "data.train-samples=2400",
        "data.test-samples=500", "server.evaluate-every=4", *SPLITS["dirichlet-0.3"],
        *MIXES["1-2-8"],
    )  # fmt: skip
    return Grid(
        name="cifar10",
        methods=LEADING,
        settings=(Setting("cifar10/dirichlet-0.3/1-2-8", parts),),
        validation={"cifar10": Setting("cifar10-validation", (*parts, "data.test="))},
        rates=FINE_RATES,
        runner=side_by_side.run,
        seeds=EIGHT_SEEDS,
        validation_seeds=THREE_SPLITS,
    )


def main() -> None:
    """Carry out the comparison."""
    folders = (("--data", "folder with image/"), ("--vit", "the backbone"))
    asked = grid.arguments(str(__doc__), folders)
    work = asked.out.resolve()
    if not (work / "held-out" / "test.parquet").exists():
        held_out(asked.data.resolve() / "image", work, asked.vit.resolve())
    grid.carry_out(cifar10_grid(work / "held-out", asked.vit.resolve()), asked)


if __name__ == "__main__":
    main()
