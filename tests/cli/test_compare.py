"""``rankfit compare``: real runs side by side, kept when done, resumed when begun."""

import json
import statistics
from pathlib import Path

import pytest

from rankfit.cli import compare as comparison
from rankfit.cli.compare import Entry, Result, here, run_all
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError, RunSettings

BASE = (
    "quickstart", "run.rounds=2", "simulation.clients=3", "server.min-clients=3",
    "server.clients-per-round=2", "partition.kind=iid",
)  # fmt: skip


def test_runs_side_by_side_are_kept_and_resumed(tmp_path: Path) -> None:
    entries = [Entry.parse("fedit"), Entry.parse("hralora+method.warm-up-rounds=0")]
    calls: list[str] = []

    def stopped(settings: RunSettings) -> None:
        calls.append(settings.run.name)
        if len(calls) == 2:
            here(settings.model_copy(update={"run": settings.run.model_copy(update={"rounds": 1})}))
            raise KeyboardInterrupt
        here(settings)

    def resumed(settings: RunSettings) -> None:
        assert settings.run.resume
        calls.append(settings.run.name)
        here(settings)

    with pytest.raises(KeyboardInterrupt):
        run_all(compose(BASE), entries, [3], tmp_path, "accuracy", stopped)
    results = run_all(compose(BASE), entries, [3], tmp_path, "accuracy", resumed)
    second = "hralora-method.warm-up-rounds-0-seed3"
    assert calls == ["fedit-seed3", second, second], "what was done is not done again"
    assert [r.label for r in results] == ["fedit", "hralora+method.warm-up-rounds=0"]
    for result in results:
        assert result.upload_bytes > 0 and result.trained_parameters > 0
        assert len(result.curve) == 2 and result.best >= result.final > 0.1
        assert result.aggregation_error >= 0
    raw = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["seed"] for r in raw["results"]] == [3, 3] and raw["metric"] == "accuracy"
    for name in ("comparison.md", "comparison.tex", "rounds.svg", "bytes.svg"):
        assert (tmp_path / name).stat().st_size > 100


def result(label: str, seed: int, last: float) -> Result:
    return Result(label, seed, last + 0.1, last, last, 2**20, 2**21, 10.0, 1.5, 0.2, [(1, 5, last)])


def test_tables_give_mean_and_standard_deviation_best_first() -> None:
    results = [result("weak", 0, 0.5), result("strong", 0, 0.8), result("strong", 1, 0.9)]
    first, second = comparison.rows(results)
    assert first[0] == "strong" and second[0] == "weak"
    spread = statistics.stdev([0.8, 0.9])
    assert first[3] == f"0.8500 ± {spread:.4f}" and second[3] == "0.5000"
    assert first[4:6] == ["1.00 ± 0.00", "2.00 ± 0.00"]
    assert comparison.markdown(results).count("\n") == 4
    assert r"0.8500 $\pm$ 0.0707" in comparison.latex(results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flexlore", "did you mean 'flexlora'"),
        ("fedit+method.remained=true", "did you mean 'method.remainder'"),
    ],
)  # fmt: skip
def test_bad_entries_are_refused_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Entry.parse(text)
