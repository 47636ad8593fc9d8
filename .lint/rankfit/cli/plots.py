"""Plots of an estimate: rank against memory and link speed, and memory over the step's events."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankfit.configs.settings import ConfigError
from rankfit.estimator.report import DeviceReport

if TYPE_CHECKING:
    from rankfit.estimator.fit import Estimator

MIB = 2**20
#: Devices of a curve.
POINTS = 120
_FORMS = (".svg", ".png", ".pdf")


def plot(estimator: "Estimator", report: DeviceReport, path: Path) -> None:
    """Draw what a device of this kind can train, as HRALoRA's figure 4 does, and its step.

    Raises
    ------
    ConfigError
        For a file that is no .svg, .png or .pdf.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    if path.suffix not in _FORMS:
        raise ConfigError(f"--plot {path}: expected a file that ends in {', '.join(_FORMS)}")
    figure = Figure(figsize=(7, 9), layout="constrained")
    memory, link, line = figure.subplots(3)
    sizes, ranks = rank_by_memory(estimator, report)
    memory.step([size / MIB for size in sizes], ranks, where="post")
    memory.set(xlabel="memory of the device (MiB)", ylabel="rank, by memory alone")
    speeds, most = rank_by_link(estimator)
    link.step(speeds, most, where="post")
    seconds = estimator.settings.plan.upload_seconds or 1.0
    link.set(xlabel="upload (Mbps)", ylabel=f"rank, by {seconds:g} s of upload")
    for name, live in time_line(estimator, report).items():
        line.plot(np.asarray(live) / MIB, linewidth=0.8, label=name)
    line.set(xlabel="event of two optimizer steps", ylabel="live bytes (MiB)")
    line.legend()
    for axes in (memory, link, line):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def rank_by_memory(estimator: "Estimator", report: DeviceReport) -> tuple[list[int], list[int]]:
    """Memory sizes in bytes, and the largest rank that each allows; links and time set apart."""
    from rankfit.estimator.fit import Estimate

    cap, least = estimator.settings.lora.rank, min(estimator.needs(report).values())
    most = estimator.footprint(report, estimator.steps[0]).expected(cap, 0, 2**62)
    sizes = np.linspace(0.97 * least, 1.03 * most, POINTS).astype(int).tolist()
    ranks = []
    for size in sizes:
        fit = estimator.fit(
            replace(
                report, total_bytes=size, free_bytes=size, reserved_bytes=0,
                upload_mbps=0.0, download_mbps=0.0,
            )
        )  # fmt: skip
        ranks.append(fit.plan.rank if isinstance(fit, Estimate) else 0)
    return sizes, ranks


def rank_by_link(estimator: "Estimator") -> tuple[list[float], list[int]]:
    """Upload speeds in Mbps, and the largest rank that each allows within ``plan.upload-seconds``.

    Where that is not set, within one second.
    """
    payload, cap = estimator.payload, estimator.settings.lora.rank
    seconds = estimator.settings.plan.upload_seconds or 1.0
    enough = (payload.head_bytes + cap * payload.bytes_per_rank()) * 8e-6 / seconds
    speeds = np.linspace(0, 1.1 * enough, POINTS)[1:].tolist()
    bounds = [payload.upload_bound(seconds, mbps, estimator.phases) or 0 for mbps in speeds]
    return speeds, [min(cap, bound) for bound in bounds]


def time_line(estimator: "Estimator", report: DeviceReport) -> dict[str, Any]:
    """Live bytes after each event of the search's first step, at the least rank and at the cap."""
    footprint = estimator.footprint(report, estimator.steps[0])
    trace, settings = footprint.traces[0], estimator.settings
    ranks = sorted({settings.plan.min_rank, settings.lora.rank})
    return {
        f"rank {rank}": trace.live(trace.point(rank, 0, footprint.calibration)) for rank in ranks
    }
