"""The commands about memory: `rankfit memory-report` and `rankfit calibrate`."""

import datetime
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rankfit.cli.estimate import Format, write
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.estimator.device_report import DeviceReport
from rankfit.estimator.plan import Plan

if TYPE_CHECKING:
    from rankfit.estimator.calibration import Profile
    from rankfit.estimator.memory import Footprint


MIB = 2**20
_COLUMNS = ("client", "device", "round", "rank", "batch", "expected MiB", "measured MiB", "error")
_PARTS = ("parameters", "forward", "gradients", "optimizer", "overhead")


def memory_report(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    components: Annotated[
        bool, typer.Option(help="Split each estimate; loads the run's data, but no weights.")
    ] = True,
    measure: Annotated[
        bool,
        typer.Option(
            help="Also measure the components here: of any CPU, and of a GPU like this one."
        ),
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Compare estimated and measured memory of a run, client by client and part by part."""
    settings, rows = read_run(directory)
    if components or measure:
        add_components(settings, rows, measure)
    if form is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
        return
    write(form, rows, "estimated and measured peaks", _COLUMNS, [_total(row) for row in rows])
    split = [cells for row in rows for cells in _split(row)]
    if split:
        columns = ("client", "component", "estimated MiB", "measured here MiB", "error")
        write(form, rows, "components", columns, split)


def read_run(directory: Path) -> tuple[RunSettings, list[dict[str, Any]]]:
    """Settings of a run, and for each client its last round that trained a whole plan.

    Raises
    ------
    ConfigError
        If the folder holds no run, or no round with a measured peak.
    """
    try:
        tables = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8"))
        plans, rounds = (_lines(directory / f"{name}.jsonl") for name in ("plans", "rounds"))
    except OSError as error:
        raise ConfigError(f"{directory} holds no run: {error}") from error
    settings = from_flat({f"{t}.{k}": v for t, keys in tables.items() for k, v in keys.items()})
    rows: dict[str, dict[str, Any]] = {}
    for line in rounds:
        for client, own in line.get("clients", {}).items():
            made = [p for p in plans if p["client"] == client and p["round"] <= line["round"]]
            if not made or not own.get(Metric.PEAK_MEMORY_BYTES) or own.get(Metric.OUT_OF_MEMORY):
                continue
            rows[client] = {
                "client": client,
                "round": line["round"],
                "plan": made[-1]["plan"],
                "device": made[-1]["device"],
                "expected-bytes": made[-1]["plan"]["peak-bytes"],
                "measured-bytes": int(own[Metric.PEAK_MEMORY_BYTES]),
                "kept-free-bytes": int(own.get("kept-free-bytes", 0)),
            }
    if not rows:
        raise ConfigError(f"{directory}: no round has a client with a measured peak yet")
    return settings, list(rows.values())


def add_components(settings: RunSettings, rows: Sequence[dict[str, Any]], measure: bool) -> None:
    """Add ``components`` to each row: bytes by name, estimated, and measured where asked for.

    Raises
    ------
    ConfigError
        If the run's model or data cannot be read.
    """
    # Imported here: the other commands should not wait for torch.
    from rankfit.estimator.memory import remainder_ranks
    from rankfit.estimator.plan_search import Estimator, Step, inputs_of
    from rankfit.estimator.tracer import TraceCache
    from rankfit.tasks import load_task
    from rankfit.tasks.base_model import load_config

    try:
        task = load_task(settings)
        config = load_config(settings.model, labels=task.labels)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    inputs, traces = inputs_of(task.example_batch(1)), TraceCache()
    estimators: dict[tuple[str, bool], Estimator] = {}
    for row in rows:
        plan = Plan.from_dict(row["plan"])
        key = (plan.trainable, plan.rates.whole_head)
        if key not in estimators:
            estimators[key] = Estimator.for_run(
                settings, config, inputs, phases=(plan.trainable,),
                whole_head=plan.rates.whole_head, traces=traces,
            )  # fmt: skip
        report = DeviceReport.from_dict({"context-bytes": -1, **row["device"]})
        remainders = remainder_ranks(plan.ranks, plan.remainder_rank)
        remainder = remainders if any(remainders.values()) else None
        footprint = estimators[key].footprint(
            report, Step.of(plan), plan.ranks, remainder is not None
        )
        row["components"] = {"estimated": _estimated(footprint, plan, remainder)}
        if measure and _is_here(report):
            row["components"]["measured"] = _measured(footprint, report, plan, remainder)


def _estimated(
    footprint: "Footprint", plan: Plan, remainder: Mapping[str, int] | None
) -> dict[str, int]:
    """Bytes of the components of a plan's step, by name."""
    split = footprint.breakdown(plan.ranks, remainder or 0)
    found = {name: getattr(split, name) for name in _PARTS}
    if not footprint.reserves:
        return found
    reserved = max(replay.reserved for replay in footprint.replays(plan.ranks, remainder or 0))
    return found | {"unused": reserved - split.total, "context": footprint.calibration.outside}


def _is_here(report: DeviceReport) -> bool:
    """Whether a step of a client can be measured here: any CPU's, a GPU's on one of its kind."""
    if report.accelerator == "cpu":
        return True
    import torch

    if not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(0)
    return report.compute_capability == f"{properties.major}.{properties.minor}"


def _measured(
    footprint: "Footprint", report: DeviceReport, plan: Plan, remainder: Mapping[str, int] | None
) -> dict[str, int]:
    """Bytes of the components of the plan's step, trained here on real tensors."""
    from rankfit.estimator.components import measure_components

    # Of batches with and without padding the estimate is the larger: that one is trained.
    trace = max(
        footprint.traces,
        key=lambda trace: trace.peak_live(
            plan.ranks, remainder_ranks=remainder or 0, calibration=footprint.calibration
        ),
    )
    found = measure_components(trace.spec, plan.ranks, remainder)
    if report.accelerator == "cuda":
        from rankfit.client.memory_meter import own_memory
        from rankfit.tasks.lora import training_device

        context = own_memory(training_device()).context_bytes
        found["context"] = context if context >= 0 else footprint.calibration.outside
    return found


def _total(row: Mapping[str, Any]) -> tuple[str, ...]:
    plan = Plan.from_dict(row["plan"])
    batch = f"{plan.micro_batch} × {plan.accumulation}"
    return (
        row["client"],
        row["device"]["name"],
        str(row["round"]),
        str(plan.rank),
        f"{batch}{' + checkpointing' if plan.checkpointing else ''}, {plan.precision}",
        f"{row['expected-bytes'] / MIB:.2f}",
        f"{row['measured-bytes'] / MIB:.2f}",
        _error(row["expected-bytes"], row["measured-bytes"]),
    )


def _split(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = row.get("components", {})
    measured = found.get("measured", {})
    return [
        (
            row["client"],
            name,
            f"{nbytes / MIB:.3f}",
            f"{measured[name] / MIB:.3f}" if measured else "–",
            _error(nbytes, measured[name]) if measured else "–",
        )
        for name, nbytes in found.get("estimated", {}).items()
    ]


def _error(estimated: int, measured: int) -> str:
    if estimated == measured:
        return "0"
    return f"{estimated / measured - 1:+.2%}" if measured else "–"


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


_TERM_COLUMNS = ("term", "value", "source")


def calibrate(
    out: Annotated[Path, typer.Option(help="Profile to write.")] = Path("calibration.toml"),
    form: Annotated[Format, typer.Option("--format", help="table, json or latex.")] = Format.TABLE,
) -> None:
    """Measure the calibration terms on this machine's GPU, and write a profile of them.

    Give it to a run or an estimate as ``plan.calibration=FILE``. Without a GPU it shows the table's
    terms and exits with 1.
    """
    import torch

    from rankfit.estimator.calibration import TERMS

    if not torch.cuda.is_available():
        rows = [(term.name, str(term.value), term.source) for term in TERMS.values()]
        write(
            form,
            [dict(zip(_TERM_COLUMNS, row, strict=True)) for row in rows],
            "terms",
            _TERM_COLUMNS,
            rows,
        )
        Console(stderr=True, markup=False).print(
            "No GPU is here, so nothing was measured and nothing was written: these are the terms "
            "that estimates use.",
            highlight=False,
        )
        raise typer.Exit(1)
    profile = measured()
    profile.save(out)
    rows = [(term.name, str(term.value), term.source) for term in profile.terms.values()]
    write(
        form,
        [dict(zip(_TERM_COLUMNS, row, strict=True)) for row in rows],
        "measured",
        _TERM_COLUMNS,
        rows,
    )


def measured() -> "Profile":
    """Measure the terms on the first GPU that torch shows; some seconds.

    The context is what NVML counts for this process beside torch's reserved bytes; a cuBLAS
    workspace is what the first product of matrices leaves allocated.

    Raises
    ------
    ConfigError
        If NVML does not tell the memory of this process.
    """
    import torch

    from rankfit.client.nvml import process_bytes
    from rankfit.estimator.calibration import Profile, Term

    properties = torch.cuda.get_device_properties(0)
    matrix = torch.ones(512, 512, device="cuda")
    before = torch.cuda.memory_allocated()
    product = matrix @ matrix
    torch.cuda.synchronize()
    workspace = torch.cuda.memory_allocated() - before - product.untyped_storage().nbytes()
    held = process_bytes(f"GPU-{properties.uuid}", os.getpid())
    if held is None:
        raise ConfigError(
            "NVML does not tell what this process holds of the GPU (a container without the host's "
            "process ids, or WSL): run rankfit calibrate outside of it"
        )
    context = held - torch.cuda.memory_reserved()
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    source = f"measured by rankfit calibrate on {today}, torch {torch.__version__}"
    name = "cublas-workspace-sm90" if properties.major == 9 else "cublas-workspace"
    terms = {
        name: Term(name, max(0, workspace), source),
        "cuda-context": Term("cuda-context", max(0, context), source),
    }
    capability = f"{properties.major}.{properties.minor}"
    return Profile(properties.name, capability, terms)
