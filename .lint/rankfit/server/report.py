"""``report.html``: one self-contained page with the plots and tables of a run."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from rankfit.configs.settings import RunSettings, to_flat
from rankfit.server import summary
from rankfit.server.summary import Line

MIB = 2**20

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }} – RankFit</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } .dropped { color: #b00; }
</style></head><body>
<h1>{{ name }}</h1>
<p>Method <b>{{ settings["method.name"] }}</b>, model {{ settings["model.source"] }}, data
{{ settings["data.source"] }}, {{ rounds }} rounds, {{ mib }} MiB of adapters sent and received.</p>
{% if scores %}<table><tr><th>test</th><th>final</th><th>best</th><th>mean of last 10</th></tr>
{% for s in scores %}
<tr><td>{{ s.name }}</td><td>{{ "%.4f"|format(s.final) }}</td><td>{{ "%.4f"|format(s.best) }}</td>
<td>{{ "%.4f"|format(s.mean_of_last) }}</td></tr>{% endfor %}</table>{% endif %}
{% for plot in plots %}{{ plot }}{% endfor %}
<h2>Clients</h2>
<table><tr><th>client</th><th>rank</th><th>rounds</th><th>dropped</th><th>samples</th>
<th>expected peak MiB</th><th>measured peak MiB</th><th>kept free MiB</th><th>train s</th></tr>
{% for c in clients %}<tr><td>{{ c.client }}</td><td>{{ c.ranks }}</td><td>{{ c.rounds }}</td>
<td>{{ c.dropped }}</td><td>{{ c.samples }}</td>
<td>{{ "%.2f"|format(c.expected_bytes / mebi) }}</td>
<td>{{ "%.2f"|format(c.peak_bytes / mebi) }}</td>
<td>{{ "%.2f"|format(c.kept_free_bytes / mebi) }}</td>
<td>{{ "%.1f"|format(c.seconds) }}</td></tr>{% endfor %}</table>
{% if drops %}<h2>Updates that were dropped</h2>
<ul>{% for d in drops %}<li class="dropped">round {{ d[0] }}, {{ d[1] }}: {{ d[2] }}</li>
{% endfor %}</ul>{% endif %}
<h2>Settings</h2>
<table>{% for key, value in settings.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></body></html>
"""


def write_report(folder: Path, settings: RunSettings, rounds: Sequence[Line]) -> Path:
    """Write the report of a run from the lines of ``rounds.jsonl``."""
    sent = summary.traffic(rounds)
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        name=settings.run.name,
        settings=to_flat(settings),
        rounds=max((line["round"] for line in rounds), default=0),
        mib=f"{sent[-1][1] / MIB:.2f}" if sent else "0",
        scores=summary.scores(rounds),
        plots=[Markup(plot) for plot in _plots(rounds)],
        clients=summary.clients(rounds),
        mebi=MIB,
        drops=summary.drops(rounds),
    )
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def _plots(rounds: Sequence[Line]) -> list[str]:
    """Draw evaluation over rounds and over bytes, and the training loss, as inline SVG."""
    measured = [line for line in rounds if line.get("evaluation")]
    sent = dict(summary.traffic(rounds))
    plots = []
    names = [n for n in ("accuracy", "macro-f1") if measured and n in measured[-1]["evaluation"]]
    for label, position in (
        ("round", lambda line: line["round"]),
        ("MiB of adapters sent and received", lambda line: sent[line["round"]] / MIB),
    ):
        series = {n: [(position(line), line["evaluation"][n]) for line in measured] for n in names}
        plots += [_line_plot(series, label, "test")] if series else []
    losses = [(line["round"], line["train-loss"]) for line in rounds if "train-loss" in line]
    plots += [_line_plot({"train-loss": losses}, "round", "training loss")] if losses else []
    return plots


def _line_plot(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]
