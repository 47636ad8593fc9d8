import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rankfit.cli.estimate import (
    latex,
    make_estimator,
    plot,
    rank_by_link,
    rank_by_memory,
    read_fleet,
)
from rankfit.cli.main import app
from rankfit.configs.compose import compose
from rankfit.configs.settings import ConfigError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_probe_is_the_device_report():
    record = json.loads(run("probe", "--format", "json"))
    assert record["total-bytes"] > 0 and record["source"]


def test_estimate_of_a_preset_for_one_device():
    records = json.loads(run("estimate", "quickstart", "--memory-mib", "5", "--format", "json"))
    assert records[0]["rank"] >= 1
    assert records[0]["peak-bytes"] <= records[0]["budget-bytes"] == 5 * 2**20
    assert sum(records[0]["breakdown-bytes"].values()) == records[0]["peak-bytes"]
    assert "One unit of rank" in run("estimate", "quickstart", "--memory-mib", "5")


def test_estimate_of_a_causal_model_and_a_fleet(tmp_path: Path):
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 101,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[[device]]\nname = "big"\nmemory-mib = 4096\ncompute-capability = "9.0"\n'
        '[[device]]\nname = "small"\nmemory-mib = 0.1\n'
    )
    source = f"config:{tmp_path / 'tiny.json'}"
    arguments = ("estimate", source, "data.max-length=16", "--kind", "causal-lm")
    big, small = json.loads(run(*arguments, "--fleet", str(fleet), "--format", "json"))
    assert big["rank"] == 16 and small["binding"] == "memory" and "needs" in small["reason"]
    text = run(*arguments, "--fleet", str(fleet), "--format", "latex")
    assert text.startswith(r"\begin{tabular}") and "big & 16 & cap" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no .*device"),
        ("[[device]]\nname='a'", "memory-mib is 0"),
        ("[[device]]\nmemory-mib=-1", "memory-mib is -1"),
        ("[[device]]\nmemory-mib=1\nmemroy=2", "unknown key 'memroy'"),
        ("[[device", "fleet file"),
    ],
)
def test_a_bad_fleet_file_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_fleet(path)


def test_the_reason_of_each_step_of_the_search_is_shown():
    text = run("estimate", "quickstart", "--memory-mib", "2.5")
    assert "micro-batch 32, fp32 base: the least rank needs" in text and "too much" in text
    (record,) = json.loads(run("estimate", "quickstart", "--memory-mib", "2.5", "--format", "json"))
    assert record["rejected"][0]["step"] == "micro-batch 32, fp32 base"
    assert record["rejected"][0]["needs-bytes"] > record["budget-bytes"] >= record["peak-bytes"]
    nothing = run("estimate", "quickstart", "--memory-mib", "0.2")
    assert "Nothing that is allowed fits: needs" in nothing.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quickstart", "--memory-mib", "-1"), "memory-mib is -1"),
        (("quickstart", "--memory-mib", "0"), "memory-mib is 0"),
        (("quickstart", "lora.targets=nothing", "--memory-mib", "5"), "nothing"),
        (("quickstart", "model.precision=fp8", "--memory-mib", "5"), "model.precision"),
        (("no/such-model", "--memory-mib", "5"), "no/such-model"),
    ],
)
def test_what_cannot_be_estimated_is_one_clear_error(arguments: tuple[str, ...], message: str):
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_latex_escapes():
    assert r"a\_b & 50\% \\" in latex(("x", "y"), [("a_b", "50%")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_calibrate_without_a_gpu_says_so_and_shows_the_terms(tmp_path: Path):
    out = tmp_path / "calibration.toml"
    result = CliRunner().invoke(app, ["calibrate", "--out", str(out), "--format", "json"])
    assert result.exit_code == 1 and not out.exists()
    assert "No GPU is here" in result.output and "cublas-workspace-sm90" in result.output


def test_a_profile_of_terms_changes_the_estimate(tmp_path: Path):
    profile = tmp_path / "own.toml"
    profile.write_text("[terms.cuda-context]\nvalue = 0\n")
    device = ("--memory-mib", "1024", "--compute-capability", "9.0", "--format", "json")
    plain, changed = (
        json.loads(run("estimate", "quickstart", *extra, *device))[0]["peak-bytes"]
        for extra in ((), (f"plan.calibration={profile}",))
    )
    assert plain - changed == 470 * 2**20


def test_plots_of_rank_and_memory(tmp_path: Path):
    out = tmp_path / "plots" / "quickstart.svg"
    run("estimate", "quickstart", "--memory-mib", "5", "--plot", str(out))
    assert out.read_text().count("<g") > 20
    estimator = make_estimator(compose(["quickstart", "plan.search="]))
    sizes, ranks = rank_by_memory(estimator, read_fleet(_fleet(tmp_path))[0])
    assert sorted(ranks) == ranks and {ranks[0], ranks[-1]} == {0, 8}
    speeds, bounds = rank_by_link(estimator)
    assert sorted(bounds) == bounds and bounds[-1] == 8 and len(speeds) == len(bounds)
    with pytest.raises(ConfigError, match="expected a file that ends in .svg"):
        plot(estimator, read_fleet(_fleet(tmp_path))[0], tmp_path / "plot.txt")


def _fleet(folder: Path) -> Path:
    path = folder / "one.toml"
    path.write_text("[[device]]\nmemory-mib = 16\n")
    return path
