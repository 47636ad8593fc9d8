"""Every method on digits at equal budgets, with and without drift controls.

``python -m benchmarks.methods.digits`` runs what is not done of the whole grid, hours on a CPU;
``--methods``, ``--splits``, ``--mixes``, ``--controls``, ``--seeds`` and ``--rounds`` choose.
It stops and goes on at any round. Results: ``benchmarks/results/methods-digits.json``.

Every method has the quickstart's learning rate; choosing one for each on a validation split is
still to be done.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from rankfit.cli.compare import here, run_all
from rankfit.cli.comparison import Entry
from rankfit.configs.compose import compose
from rankfit.strategies.catalogue import methods

SPLITS = {
    "iid": ("partition.kind=iid",),
    "dirichlet-0.3": ("partition.kind=dirichlet", "partition.alpha=0.3"),
}
#: Upload in Mbps that leads to the ranks in the name, dealt in turn: one unit of rank in all
#: modules is 4 KiB.
MIXES = {
    "1-2-8": "3, 5, 20",
    "1-1-1-8": "3, 3, 3, 20",
    "2-4-8": "5, 8, 20",
}
CONTROLS = {"plain": (), "average-0.8": ("server.average=0.8",)}
RESULTS = Path(__file__).resolve().parents[1] / "results" / "methods-digits.json"


def main() -> None:
    """Run the chosen part of the grid; the JSON is written after each setting."""
    arguments = _arguments()
    torch.set_num_threads(1)
    for split in arguments.splits:
        for mix in arguments.mixes:
            for control in arguments.controls:
                _setting(split, mix, control, arguments)


def _setting(split: str, mix: str, control: str, arguments: argparse.Namespace) -> None:
    name = f"{split}/{mix}/{control}/{arguments.rounds}"
    base = compose(
        [
            "quickstart", *SPLITS[split], *CONTROLS[control], f"run.rounds={arguments.rounds}",
            f'fleet.upload-mbps="{MIXES[mix]}"', 'fleet.memory-mib="64"',
            'fleet.download-mbps="200"', "plan.download-seconds=0.02",
        ]
    )  # fmt: skip
    entries = [Entry.parse(method) for method in arguments.methods]
    out = arguments.out / name.replace("/", "-")
    results = run_all(base, entries, arguments.seeds, out, "accuracy", here)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"settings": {}}
    known["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    known["settings"][name] = [asdict(r) | {"curve": [c[2] for c in r.curve]} for r in results]
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{name}\n")
    for label in dict.fromkeys(r.label for r in results):
        own = [r for r in results if r.label == label]
        best, last = (_spread(getattr(r, field) for r in own) for field in ("best", "last"))
        sys.stdout.write(f"  {label}: best {best}, mean of the last ten {last}\n")


def _spread(values: Iterable[float]) -> str:
    listed = list(values)
    spread = statistics.stdev(listed) if len(listed) > 1 else 0.0
    return f"{statistics.mean(listed):.4f} ± {spread:.4f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=sorted(methods()))
    parser.add_argument("--splits", nargs="*", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--mixes", nargs="*", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=list(CONTROLS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("comparison-digits"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
