"""``report.html``: what a run did, on one page without scripts, from the files of its directory."""

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from rankfit.configs.compose import without_places
from rankfit.configs.protocol import Metric
from rankfit.configs.settings import RunSettings, known_keys, to_flat
from rankfit.server.best import where
from rankfit.server.reporting import (
    MIB,
    PARTITION,
    ClientSummary,
    Line,
    clients,
    drops,
    faults,
    scores,
    traffic,
)
from rankfit.strategies.fleet import natural

REPORT = "report.html"
_PACKAGES = ("rankfit", "torch", "transformers", "peft", "flwr")
#: Blue, orange and grey are told apart by the colour-blind too, and by their lightness.
_PLANNED, _MEASURED, _BUDGET = "#0072b2", "#e69f00", "#bbbbbb"
#: Devices that are drawn; the table has all.
_DRAWN = 40
#: Places where a run was: they differ from the defaults in every run, and say nothing of it.
_PLACES = ("run.name", "run.directory", "run.resume")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} – RankFit</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child, .text td { text-align: left; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; }
svg { max-width: 100%; height: auto; } .dropped { color: #b00; }
</style></head><body>
<h1>{{ name }}</h1>
<p>Method <b>{{ settings["method.name"] }}</b>, model {{ settings["model.source"] }}, data
{{ settings["data.source"] }}, {{ rounds }} rounds, {{ mib }} MiB of adapters sent and received.</p>
<p>Finished {{ finished }}; its rounds took {{ duration }}. Seed {{ settings["run.seed"] }};
{{ versions }}.</p>
{% if scores %}<div class="wide"><table><tr><th>test</th><th>final</th><th>best</th>
<th>mean of last 10</th></tr>
{% for s in scores %}
<tr><td>{{ s.name }}</td><td>{{ "%.4f"|format(s.final) }}</td><td>{{ "%.4f"|format(s.best) }}</td>
<td>{{ "%.4f"|format(s.mean_of_last) }}</td></tr>{% endfor %}</table></div>{% endif %}
{% if best %}<p>Best round by {{ settings["best.metric"] }} on {{ chosen_on }}: <b>{{ best }}</b>,
kept in <code>best</code>.</p>{% endif %}
{% for plot in plots %}{{ plot }}{% endfor %}
<h2>Devices</h2>
<p>{{ bottleneck }}</p>
{{ memory }}
<div class="wide"><table><tr><th>client</th><th>device</th><th>memory from</th><th>budget MiB</th>
<th>planned MiB</th><th>measured MiB</th><th>kept free MiB</th><th>rank</th><th>micro-batch</th>
<th>base</th><th>held back by</th></tr>
{% for d in devices %}<tr><td>{{ d.client }}</td><td>{{ d.device }}</td><td>{{ d.source }}</td>
<td>{{ mebi(d.budget) }}</td><td>{{ mebi(d.planned) }}</td><td>{{ mebi(d.measured) }}</td>
<td>{{ mebi(d.kept_free) }}</td><td>{{ d.rank }}</td><td>{{ d.batch }}</td>
<td>{{ d.precision }}</td><td>{{ d.binding }}</td></tr>{% endfor %}</table></div>
<h2>Clients</h2>
<div class="wide"><table><tr><th>client</th><th>rank</th><th>rounds</th><th>dropped</th>
<th>samples</th><th>up KiB</th><th>down KiB</th><th>train s</th></tr>
{% for c in clients %}<tr><td>{{ c.client }}</td><td>{{ c.ranks }}</td><td>{{ c.rounds }}</td>
<td>{{ c.dropped }}</td><td>{{ c.samples }}</td>
<td>{{ "%.0f"|format(c.upload_bytes / 1024) }}</td>
<td>{{ "%.0f"|format(c.download_bytes / 1024) }}</td>
<td>{{ "%.1f"|format(c.seconds) }}</td></tr>{% endfor %}</table></div>
{% if holdings %}<h2>What clients hold</h2>
<div class="wide"><table><tr><th>client</th><th>examples</th><th>classes held</th>
<th>most frequent class</th><th>tokens, median</th><th>tokens, longest</th></tr>
{% for h in holdings %}<tr><td>{{ h.client }}</td><td>{{ h.samples }}</td><td>{{ h.held }}</td>
<td>{{ h.most }}</td><td>{{ h.median }}</td><td>{{ h.longest }}</td></tr>
{% endfor %}</table></div>{% endif %}
<h2>Faults</h2>
{% if drops %}<p>Updates that were dropped: {% for kind, count in faults.items() %}{{ count }} ×
{{ kind }}{{ ", " if not loop.last }}{% endfor %}.</p>
<ul>{% for d in drops %}<li class="dropped">round {{ d[0] }}, {{ d[1] }}: {{ d[2] }}</li>
{% endfor %}</ul>{% else %}<p>None: every update was merged.</p>{% endif %}
<h2>Load the adapter</h2>
<p>In the folder of this report, where RankFit is installed. <code>rankfit export RUN --to
FOLDER</code> writes a folder that plain transformers and PEFT load.</p>
<pre><code id="load">{{ snippet }}</code></pre>
<h2>Settings that differ from the defaults</h2>
<div class="wide"><table class="text">{% for key, value in changed.items() %}<tr><td>{{ key }}</td>
<td>{{ value }}</td></tr>{% endfor %}</table></div>
<details><summary>All settings</summary>
<div class="wide"><table class="text">{% for key, value in settings.items() %}<tr><td>{{ key }}</td>
<td>{{ value }}</td></tr>{% endfor %}</table></div></details></body></html>
"""


def write_report(folder: Path, settings: RunSettings, rounds: Sequence[Line]) -> Path:
    """Write the report of a run from the lines of ``rounds.jsonl`` and the files beside it."""
    sent, flat = traffic(rounds), to_flat(without_places(settings))
    defaults = known_keys()
    own = _devices(folder, clients(rounds))
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        name=settings.run.name,
        settings=flat,
        changed={k: v for k, v in flat.items() if v != defaults[k] and k not in _PLACES},
        rounds=max((line["round"] for line in rounds), default=0),
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        duration=_duration(sum(line.get("seconds", 0.0) for line in rounds)),
        versions=", ".join(versions()),
        mib=f"{sent[-1][1] / MIB:.2f}" if sent else "0",
        mebi=lambda size: f"{size / MIB:.2f}" if size else "–",
        scores=scores(rounds),
        best=max((line.get("best", 0) for line in rounds[-1:]), default=0),
        chosen_on=where(settings.best),
        plots=[Markup(plot) for plot in _plots(rounds)],
        bottleneck=_bottleneck(own, clients(rounds)),
        memory=Markup(_memory_plot(own[:_DRAWN])) if own else "",
        devices=own,
        clients=clients(rounds),
        drops=drops(rounds),
        faults=faults(rounds),
        holdings=_balance(folder / PARTITION),
        snippet=snippet(settings),
    )
    file = folder / REPORT
    file.write_text(text, encoding="utf-8")
    return file


def versions() -> list[str]:
    """Names and versions of the packages that decide a run's figures."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def snippet(settings: RunSettings) -> str:
    """Python that loads the adapter of a run, to be run in its directory."""
    newest = 'run = SavedRun.open(".")'
    if settings.best.metric:
        newest = 'run = SavedRun.open(".", best=True)  # without best: the newest'
    return "\n".join(
        [
            "from rankfit.server.run_directory import SavedRun",
            "",
            newest,
            "model = run.evaluator().hold(run.adapter).eval()  # a PeftModel on its base",
            'print(f"round {run.round}, {len(run.adapter.ranks)} adapted modules")',
        ]
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _devices(folder: Path, own: Sequence[ClientSummary]) -> list[dict[str, Any]]:
    """Each client's device and its last plan, with the largest peak that it measured."""
    file, measured = folder / "plans.jsonl", {one.client: one for one in own}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    newest = {line["client"]: line for line in map(json.loads, lines)}
    rows = []
    for client in sorted(newest, key=natural):
        plan, device = newest[client]["plan"], newest[client]["device"]
        checkpointing = " + checkpointing" if plan["checkpointing"] else ""
        summary = measured.get(client)
        rows.append(
            {
                "client": client,
                "device": device["name"],
                "source": device["source"],
                "budget": plan["budget-bytes"],
                "planned": plan["peak-bytes"],
                "measured": summary.peak_bytes if summary else 0,
                "kept_free": summary.kept_free_bytes if summary else 0,
                "rank": max(plan["ranks"], default=0),
                "batch": f"{plan['micro-batch']} × {plan['accumulation']}{checkpointing}",
                "precision": plan["precision"],
                "binding": plan["binding"],
            }
        )
    return rows


def _bottleneck(devices: Sequence[Mapping[str, Any]], own: Sequence[ClientSummary]) -> str:
    """Which device trained the lowest rank and why, and which the rounds waited for."""
    if not devices:
        return "No device was planned."
    least = min(devices, key=lambda device: device["rank"])
    text = f"Lowest rank: {least['rank']}, {least['client']}, held back by {least['binding']}."
    trained = [one for one in own if one.seconds and one.rounds]
    if trained:
        slow = max(trained, key=lambda one: one.seconds / one.rounds)
        text += f" Slowest: {slow.client}, {slow.seconds / slow.rounds:.1f} s of training a round."
    return text


def _balance(file: Path) -> list[dict[str, Any]]:
    """What each client holds, of a run that divides one data set; [] of other runs."""
    if not file.is_file():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    names = record["classes"] if any(record["classes"]) else []
    rows = []
    for own in record["clients"]:
        counts, lengths = own["counts"], own.get("lengths", {})
        top = int(np.argmax(counts)) if names and own["samples"] else -1
        rows.append(
            {
                "client": f"partition-{own['partition']}",
                "samples": own["samples"],
                "held": sum(count > 0 for count in counts) if names else "–",
                "most": f"{names[top]} ({counts[top] / own['samples']:.0%})" if top >= 0 else "–",
                "median": lengths.get("median", "–"),
                "longest": lengths.get("longest", "–"),
            }
        )
    return rows


Points = list[tuple[float, float]]


def _plots(rounds: Sequence[Line]) -> list[str]:
    """Draw every figure of the evaluations over rounds and over bytes, and the losses."""
    sent = {number: size / MIB for number, size in traffic(rounds)}
    figures: dict[str, Points] = {}
    losses: dict[str, Points] = {}
    for line in rounds:
        for group, name in (("evaluation", "test"), ("holdout", "holdout")):
            for key, value in line.get(group, {}).items():
                kind = losses if key.endswith("loss") else figures
                kind.setdefault(f"{name} {key}", []).append((line["round"], value))
        if Metric.TRAIN_LOSS in line:
            losses.setdefault("training loss", []).append((line["round"], line[Metric.TRAIN_LOSS]))
    plots = []
    if figures:
        by_bytes = {name: [(sent[int(x)], y) for x, y in own] for name, own in figures.items()}
        plots.append(_line_plot(figures, "round", "figure of the evaluation"))
        plots.append(
            _line_plot(by_bytes, "MiB of adapters sent and received", "figure of the evaluation")
        )
    return [*plots, *([_line_plot(losses, "round", "loss")] if losses else [])]


def _line_plot(series: Mapping[str, Points], x: str, y: str) -> str:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no round 2.5
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _svg(figure)


def _memory_plot(devices: Sequence[Mapping[str, Any]]) -> str:
    """Draw each device's planned peak beside the measured one, before its budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.45 * len(devices)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(devices))
    sizes = {key: [own[key] / MIB for own in devices] for key in ("budget", "planned", "measured")}
    axes.barh(places, sizes["budget"], 0.84, color=_BUDGET, label="budget")
    axes.barh(places - 0.2, sizes["planned"], 0.36, color=_PLANNED, label="planned peak")
    axes.barh(places + 0.2, sizes["measured"], 0.36, color=_MEASURED, label="measured peak")
    axes.set_yticks(places, [own["client"] for own in devices])
    axes.set_xlabel("MiB")
    axes.set_ylabel("client")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    return _svg(figure)


def _svg(figure: Any) -> str:
    """A figure as an element of a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]
