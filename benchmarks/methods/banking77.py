"""Six leading methods on ten intents of banking77, over a frozen MiniLM.

``python -m benchmarks.methods.banking77 --data FOLDER --out FOLDER`` reads
``text/banking77_train.parquet`` and ``banking77_test.parquet`` under ``--data``, takes MiniLM from
the Python package that the extra ``text-demo`` installs, and writes
``benchmarks/results/methods-banking77.json``. Dirichlet(0.3) over 12 clients, ranks 1, 2 and 8.
"""

from pathlib import Path

from benchmarks.methods import grid, side_by_side
from benchmarks.methods.digits import LEADING, SPLITS
from benchmarks.methods.grid import Grid, Setting

#: Up to where methods of high rank diverge.
RATES = (0.01, 0.017, 0.03)


def banking77_grid(data: Path) -> Grid:
    """The comparison, over the parquet files of a folder."""
    parts = (
        "banking77-minilm", f"data.source={data}", "data.train=banking77_train",
        "data.test=banking77_test", "data.test-samples=300", "lora.dropout=0", "run.rounds=20",
        "server.evaluate-every=4", "simulation.clients=12", "server.clients-per-round=4",
        "server.min-clients=3", "train.batch-size=8", "train.steps=4", "method.warm-up-rounds=4",
        "method.renew-every=4", *SPLITS["dirichlet-0.3"],
        # One unit of rank in all modules is 36 KiB, the head 15 KiB; upload decides.
        'fleet.memory-mib="2048"', 'fleet.download-mbps="200"', 'fleet.upload-mbps="1, 1.6, 20"',
    )  # fmt: skip
    return Grid(
        name="banking77",
        methods=LEADING,
        settings=(Setting("banking77/dirichlet-0.3/1-2-8", parts),),
        validation={"banking77": Setting("banking77-validation", (*parts, "data.test="))},
        rates=RATES,
        runner=side_by_side.run,
        validation_seeds=(100, 101),
    )


def main() -> None:
    """Carry out the comparison."""
    asked = grid.arguments(str(__doc__), (("--data", "folder with text/"),))
    grid.carry_out(banking77_grid(asked.data.resolve() / "text"), asked)


if __name__ == "__main__":
    main()
