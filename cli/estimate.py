"""``rankfit probe`` and ``rankfit estimate``: what a device has, and what it can train."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rankfit.configs.compose import compose, preset_names
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.estimator.device_report import DeviceReport

if TYPE_CHECKING:
    from rankfit.estimator.plan_search import Estimator


MIB = 2**20


class Format(StrEnum):
    """How the result is written."""

    TABLE = "table"
    JSON = "json"
    LATEX = "latex"


class Kind(StrEnum):
    """Kinds of model; the last two can be estimated before there is a task for them."""

    IMAGE = "image-classification"
    TEXT = "text-classification"
    CAUSAL = "causal-lm"
    SEQ2SEQ = "seq2seq-lm"


def probe(
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Show what this device would report to a server."""
    from rankfit.client.device import device_report

    record = device_report({}, RunSettings(), node_id=0).to_dict()
    rows = [(key, str(value)) for key, value in record.items()]
    write(form, record, "device report", ("field", "value"), rows)


def estimate(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|PRESET… [KEY=VALUE…]",
            help="A model (hub id, folder, config:FILE.json) or presets, and settings.",
        ),
    ],
    fleet: Annotated[
        Path | None, typer.Option(help="TOML file with one [[device]] table per device.")
    ] = None,
    memory_mib: Annotated[
        float | None, typer.Option(help="Memory of the device (default: this machine's).")
    ] = None,
    compute_capability: Annotated[
        str, typer.Option(help="Of a GPU, e.g. 9.0; without it the device is a CPU.")
    ] = "",
    upload_mbps: float = 0.0,
    download_mbps: float = 0.0,
    kind: Annotated[Kind | None, typer.Option(help="Default: the preset's task.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the first device: .svg, .png or .pdf.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Plan what devices can train: memory by component, largest rank, prices. Loads no weights."""
    settings = compose(_with_model(parts))
    if fleet is not None:
        reports = read_fleet(fleet)
    elif memory_mib is not None:
        entry = {
            "memory-mib": memory_mib,
            "compute-capability": compute_capability,
            "upload-mbps": upload_mbps,
            "download-mbps": download_mbps,
        }
        reports = [_report("device", entry)]
    else:
        from rankfit.client.device import device_report

        reports = [device_report({}, settings, node_id=0)]
    try:
        estimator = make_estimator(settings, None if kind is None else kind.value)
        records = plan_records(estimator, reports)
        if plot is not None:
            plot_ranks(estimator, reports[0], plot)
    except ValueError as error:  # a model or a step that cannot be estimated
        raise ConfigError(str(error)) from error
    write(form, records, "plans", _COLUMNS, [_row(record) for record in records])
    if form is Format.TABLE and len(records) == 1:
        for line in why(records[0]):
            Console(markup=False).print(line, highlight=False)
        if "breakdown-bytes" in records[0]:
            _breakdown(records[0])


def _with_model(parts: Sequence[str]) -> list[str]:
    """Read a first part that is no preset, file or setting as the model."""
    first = parts[0]
    if "=" in first or first in preset_names() or first.endswith(".toml"):
        return list(parts)
    return [f"model.source={first}", *parts[1:]]


def read_fleet(path: Path) -> list[DeviceReport]:
    """Devices of a fleet file: ``[[device]]`` with ``name``, ``memory-mib`` and what else is known.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a device lacks its memory or has an unknown key.
    """
    try:
        entries = tomllib.loads(path.read_text()).get("device", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"fleet file {path}: {error}") from error
    if not entries:
        raise ConfigError(f"fleet file {path} holds no [[device]] table")
    return [_report(str(e.get("name", f"device-{i}")), e) for i, e in enumerate(entries)]


_KEYS = ("name", "memory-mib", "compute-capability", "upload-mbps", "download-mbps")


def _report(name: str, entry: Mapping[str, Any]) -> DeviceReport:
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{name}: unknown key {key!r}; expected {', '.join(_KEYS)}")
    memory = entry.get("memory-mib", 0)
    if not isinstance(memory, int | float) or memory <= 0:
        raise ConfigError(f"{name}: memory-mib is {memory!r}; expected a number above 0")
    capability = str(entry.get("compute-capability", ""))
    total = int(memory * MIB)
    try:
        return DeviceReport(
            client=name,
            accelerator="cuda" if capability else "cpu",
            name="declared",
            uuid="",
            compute_capability=capability,
            total_bytes=total,
            free_bytes=total,
            reserved_bytes=0,
            processes=-1,
            source="declared",
            upload_mbps=float(entry.get("upload-mbps", 0.0)),
            download_mbps=float(entry.get("download-mbps", 0.0)),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_estimator(settings: RunSettings, kind: str | None = None) -> "Estimator":
    """Estimator of a run from the model's config alone; its traces are kept on disk."""
    # Imported here: the other commands should not wait for torch.
    from rankfit.estimator.plan_search import Estimator
    from rankfit.estimator.tracer import TraceCache, TraceStore
    from rankfit.strategies.methods import configured, find
    from rankfit.tasks.base_model import load_config

    rates = configured(find(settings.method.name), settings).rates
    config = load_config(settings.model, labels=settings.data.classes or 2)
    of = kind or settings.task.kind
    return Estimator.for_run(
        settings,
        config,
        _inputs(of, config.to_dict(), settings.data.max_length),
        whole_head=rates.whole_head,
        traces=TraceCache(TraceStore()),
        kind=of,  # type: ignore[arg-type]
    )


def plan_records(estimator: "Estimator", reports: Sequence[DeviceReport]) -> list[dict[str, Any]]:
    """Plan for each device as a record with kebab-case keys; figures in bytes."""
    from rankfit.estimator.plan_search import Estimate, Step

    records: list[dict[str, Any]] = []
    for report in reports:
        fit = estimator.fit(report)
        if not isinstance(fit, Estimate):
            records.append(
                {
                    "device": report.client,
                    "reason": fit.reason,
                    "binding": fit.binding,
                    "needs-bytes": fit.needs_bytes,
                    "budget-bytes": fit.budget_bytes,
                    "rejected": _rejected(estimator, report, estimator.steps_on(report))
                    if fit.binding == "memory"
                    else [],
                }
            )
            continue
        footprint = estimator.footprint(report, Step.of(fit.plan), fit.plan.ranks)
        records.append(
            {
                "device": report.client,
                "rank": fit.plan.rank,
                "binding": fit.plan.binding,
                "micro-batch": fit.plan.micro_batch,
                "accumulation": fit.plan.accumulation,
                "checkpointing": fit.plan.checkpointing,
                "precision": fit.plan.precision,
                "rejected": _rejected(estimator, report, fit.rejected),
                "peak-bytes": fit.plan.peak_bytes,
                "budget-bytes": fit.plan.budget_bytes,
                "breakdown-bytes": vars(fit.breakdown),
                "bounds": vars(fit.bounds),
                "prices-bytes": footprint.traces[0].prices(
                    fit.plan.ranks, calibration=footprint.calibration
                ),
                "upload-bytes-per-rank": estimator.payload.bytes_per_rank(),
            }
        )
    return records


def _rejected(estimator: Any, report: DeviceReport, steps: Sequence[Any]) -> list[dict[str, Any]]:
    """Steps of the search that were too large, with the bytes that the least rank takes there."""
    needs = estimator.needs(report) if steps else {}
    return [{"step": str(step), "needs-bytes": needs[step]} for step in steps]


def _inputs(kind: str, config: Mapping[str, Any], length: int) -> tuple[Any, ...]:
    """Batch of one sample, from the model's config alone."""
    from rankfit.estimator.step_spec import InputSpec

    language = kind in ("causal-lm", "seq2seq-lm")
    labels = InputSpec("labels", (length,) if language else (), "int64")
    if kind == "image-classification":
        size = config.get("image_size")
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) != 2:
            raise ConfigError("the model's config has no image_size: is task.kind right?")
        shape = (int(config.get("num_channels", 3)), *sides)
        return (InputSpec("pixel_values", shape, "float32"), labels)
    names = ("input_ids", "attention_mask")
    return (*(InputSpec(name, (length,), "int64") for name in names), labels)


_COLUMNS = (
    "device", "rank", "binds", "micro-batch", "checkpointing", "base", "peak MiB", "budget MiB"
)  # fmt: skip


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "reason" in record:
        return (record["device"], "–", record["binding"], record["reason"], "", "", "", "")
    return (
        record["device"],
        str(record["rank"]),
        record["binding"],
        f"{record['micro-batch']} × {record['accumulation']}",
        "yes" if record["checkpointing"] else "no",
        record["precision"],
        f"{record['peak-bytes'] / MIB:.1f}",
        f"{record['budget-bytes'] / MIB:.1f}",
    )


def why(record: Mapping[str, Any]) -> list[str]:
    """How the search came to a plan, a line for each step that it tried."""
    lines = [
        f"{each['step']}: the least rank needs {each['needs-bytes'] / MIB:.1f} MiB, too much"
        for each in record["rejected"]
    ]
    if "reason" in record:
        return [*lines, f"Nothing that is allowed fits: {record['reason']}."]
    step = f"micro-batch {record['micro-batch']}"
    step += " with checkpointing" if record["checkpointing"] else ""
    step += f", {record['precision']} base"
    kept = {
        "memory": "the next rank does not fit in memory",
        "cap": "lora.rank is the cap",
        "upload": "the next rank takes longer than plan.upload-seconds",
        "download": "the next rank takes longer than plan.download-seconds",
    }
    return [*lines, f"{step}: rank {record['rank']}, {kept[record['binding']]}"]


def _breakdown(record: Mapping[str, Any]) -> None:
    table = Table("at the peak", "MiB")
    for name, value in record["breakdown-bytes"].items():
        table.add_row(name, f"{value / MIB:.2f}")
    table.add_row("total", f"{sum(record['breakdown-bytes'].values()) / MIB:.2f}")
    Console(markup=False).print(table)
    total = sum(record["prices-bytes"].values())
    Console(markup=False).print(
        f"One unit of rank in all {len(record['prices-bytes'])} modules costs {total} bytes of "
        f"memory and {record['upload-bytes-per-rank']} bytes of upload.",
        highlight=False,
    )


def write(
    form: Format,
    record: object,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    """Write a result: a table on the console, its record as JSON, or the table in LaTeX."""
    if form is Format.JSON:
        typer.echo(json.dumps(record, indent=2))
    elif form is Format.LATEX:
        typer.echo(latex(columns, rows))
    else:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        Console(markup=False).print(table)


_SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "×": r"$\times$", "–": "--"}


def latex(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in LaTeX, for booktabs."""

    def line(cells: Sequence[str]) -> str:
        text = " & ".join("".join(_SPECIAL.get(c, c) for c in cell) for cell in cells)
        return text + r" \\"

    head = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
    body = [line(row) for row in rows]
    return "\n".join(
        [head, r"\toprule", line(columns), r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    )


MIB = 2**20
#: Devices of a curve.
POINTS = 120
_FORMS = (".svg", ".png", ".pdf")


def plot_ranks(estimator: "Estimator", report: DeviceReport, path: Path) -> None:
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
        line.plot([size / MIB for size in live], linewidth=0.8, label=name)
    line.set(xlabel="event of two optimizer steps", ylabel="live bytes (MiB)")
    line.legend()
    for axes in (memory, link, line):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def rank_by_memory(estimator: "Estimator", report: DeviceReport) -> tuple[list[int], list[int]]:
    """Memory sizes in bytes, and the largest rank that each allows; links and time set apart."""
    from rankfit.estimator.plan_search import Estimate

    cap, least = estimator.settings.lora.rank, min(estimator.needs(report).values())
    most = estimator.footprint(report, estimator.steps[0]).expected(cap, 0, 2**62)
    import numpy as np

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
    import numpy as np

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
