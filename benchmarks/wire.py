"""The quickstart with each wire type: accuracy, and bytes of adapter in its last round.

``python benchmarks/wire.py [--seeds 0 1 2]``, in one process. The links are unlimited, so that all
types train the same ranks.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.machine import machine, write_record  # noqa: E402
from rankfit.adapters.wire import WireType  # noqa: E402
from rankfit.cli.compare import here  # noqa: E402
from rankfit.configs.compose import compose  # noqa: E402

RESULT = Path(__file__).parent / "results" / "wire.json"


def run(seed: int, wire: str) -> dict[str, Any]:
    """Figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        place = (f"run.directory={folder}", "run.name=wire", f"run.seed={seed}")
        links = ("plan.upload-seconds=0", "plan.download-seconds=0", "server.diagnostics=false")
        here(compose(["quickstart", *place, *links, f"wire.dtype={wire}"]))
        text = (Path(folder) / "wire" / "rounds.jsonl").read_text(encoding="utf-8")
    rounds = [json.loads(line) for line in text.splitlines()]
    accuracy = [line["evaluation"]["accuracy"] for line in rounds]
    return {
        "seed": seed,
        "wire": wire,
        "final": accuracy[-1],
        "last-ten": statistics.mean(accuracy[-10:]),
        "upload-bytes": rounds[-1]["upload-bytes"],
        "download-bytes": rounds[-1]["download-bytes"],
    }


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [run(seed, wire) for seed in options.seeds for wire in get_args(WireType)]
    record = {"benchmark": "wire", **machine("torch", "flwr"), "results": results}
    write_record(options.output, record)
    table = Table("wire", "final", "mean of the last ten", "KiB up", "KiB down")
    for wire in get_args(WireType):
        own = [result for result in results if result["wire"] == wire]
        cells = [" ".join(f"{result[key]:.4f}" for result in own) for key in ("final", "last-ten")]
        bytes_ = [f"{own[0][key] / 1024:.1f}" for key in ("upload-bytes", "download-bytes")]
        table.add_row(wire, *cells, *bytes_)
    Console().print(table)


if __name__ == "__main__":
    main()
