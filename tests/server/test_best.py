"""The best round: chosen on a holdout, kept, exported; early stopping; and an exact resume."""

import json
import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankfit.cli.main import app
from rankfit.configs.compose import compose
from rankfit.configs.settings import Best, ConfigError
from rankfit.server.best import BestRound
from rankfit.server.run_directory import BEST, STATE, SavedRun, kept_rounds
from rankfit.tasks import load_task
from tests.server.federation import run, settings_for
from tests.server.test_loop import figures, lines
from tests.server.test_rundir import flip

#: Accuracy rises in every round of so short a run, so its least is that of the first.
FIRST_IS_BEST = ("best.metric=accuracy", "best.mode=min", "best.patience=2", "run.rounds=9")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of at most nine rounds whose first is the best, with a patience of two."""
    return run(settings_for(tmp_path_factory.mktemp("runs"), "stopped", *FIRST_IS_BEST))


def test_the_best_is_the_largest_or_of_a_loss_the_least() -> None:
    found = {}
    for rules in (Best(metric="accuracy"), Best(metric="loss"), Best(metric="loss", mode="max")):
        best = BestRound()
        for number, value in enumerate((0.5, 0.9, 0.1, 0.9), 1):
            best = best.after(number, {rules.metric: value}, rules)
        found[rules.metric, rules.mode] = (best.round, best.waited)
    assert found == {
        ("accuracy", "auto"): (2, 2),
        ("loss", "auto"): (3, 1),
        ("loss", "max"): (2, 2),
    }


def test_a_figure_that_is_missing_is_waited_for_and_never_the_best() -> None:
    rules = Best(metric="loss", patience=2)
    best = BestRound().after(1, {}, rules)
    assert best.round == 0 and best.waited == 1 and not best.stops(rules)
    assert best.after(2, {}, rules).stops(rules)
    assert BestRound.of(best.state()) == best and BestRound.of({}) == BestRound()


def test_a_run_without_a_better_round_stops_and_keeps_the_best(stopped: Path) -> None:
    rounds = lines(stopped)
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert [line.get("best") for line in rounds] == [None, 1, 1, 1]
    names = [folder.name for folder in kept_rounds(stopped)]
    assert names == ["round-00003", "round-00002", "round-00001"]
    assert (stopped / BEST).resolve().name == "round-00001"
    assert (stopped / "checkpoint").resolve().name == "round-00003"


@pytest.mark.parametrize("split", ["test", "holdout"])
def test_the_exported_best_gives_the_best_rounds_figure(
    stopped: Path, tmp_path: Path, split: str
) -> None:
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(
        app, ["evaluate", str(stopped), "--best", "--split", split, "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    found, line = json.loads(file.read_text()), lines(stopped)[1]
    own = line["evaluation" if split == "test" else "holdout"]
    assert found["round"] == 1
    assert found["figures"][split]["accuracy"] == own["accuracy"]
    assert own["accuracy"] != lines(stopped)[3]["evaluation"]["accuracy"]


def test_the_exported_best_is_that_rounds_adapter(stopped: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(stopped), "--best", "--to", str(to)])
    assert done.exit_code == 0, done.output
    name = "adapter_model.safetensors"
    assert (to / name).read_bytes() == (stopped / "checkpoints" / "round-00001" / name).read_bytes()
    assert "round 1 of 9" in (to / "README.md").read_text()


def test_the_holdout_is_apart_from_what_clients_train_on_and_from_the_test_set(
    tmp_path: Path,
) -> None:
    with_one = load_task(settings_for(tmp_path, "r", "best.metric=accuracy"))
    without = load_task(settings_for(tmp_path, "r"))
    parts = [with_one.train, with_one.holdout, with_one.test]
    images = [{image.tobytes() for image in part.examples.inputs} for part in parts]
    assert not images[0] & images[1] and not images[1] & images[2]
    assert images[0] | images[1] == {image.tobytes() for image in without.train.examples.inputs}
    assert len(with_one.holdout) == pytest.approx(0.1 * len(without.train), abs=1)
    assert list(with_one.test.labels) == list(without.test.labels)
    assert not len(without.holdout)


def test_a_resumed_run_chooses_and_stops_as_if_nothing_had_been(
    stopped: Path, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path, "cut", *FIRST_IS_BEST, "run.rounds=2")
    folder = run(settings)
    resume = "run.resume=true"
    run(settings_for(tmp_path, "cut", *FIRST_IS_BEST, resume))
    assert figures(folder) == figures(stopped)
    run(settings_for(tmp_path, "cut", *FIRST_IS_BEST, resume))  # its patience is at an end already
    assert figures(folder) == figures(stopped)
    run(settings_for(tmp_path, "cut", *FIRST_IS_BEST, "best.patience=3", resume))
    assert [line["round"] for line in lines(folder)] == [0, 1, 2, 3, 4]


def test_a_damaged_newest_checkpoint_does_not_lose_the_best_of_the_one_before(
    tmp_path: Path,
) -> None:
    """Accuracy's best moves every round: the newest two name different ones."""
    folder = run(settings_for(tmp_path, "r", "best.metric=accuracy"))
    newest, older, *others = kept_rounds(folder)
    named = {json.loads((f / STATE).read_text())["best"]["round"] for f in (newest, older)}
    assert named <= {int(f.name[-5:]) for f in (newest, older, *others)}
    flip(newest / "adapter_model.safetensors")
    logging.getLogger("rankfit").propagate = True
    assert SavedRun.open(folder, best=True).round == max(named - {3}, default=3)


def test_a_run_without_the_feature_is_as_before(tmp_path: Path) -> None:
    folder = run(settings_for(tmp_path, "plain", "run.rounds=1", "best.holdout=0.3"))
    for line in lines(folder):
        assert not {"best", "holdout"} & set(line)
    assert not (folder / BEST).exists() and "best" not in json.loads(
        (folder / "checkpoint" / STATE).read_text()
    )
    done = CliRunner().invoke(app, ["evaluate", str(folder), "--best"])
    assert isinstance(done.exception, ConfigError) and "no best round" in str(done.exception)


def test_a_metric_that_there_is_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best.metric 'bleu': an evaluation of this task gives"):
        run(settings_for(tmp_path, "r", "best.metric=bleu"))
    assert not (tmp_path / "r" / "config.toml").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["best.patience=3"], "best.metric"),
        (["best.metric=loss", "partition.kind=local"], "best.holdout to 0"),
        (["best.metric=loss", "best.holdout=0", "server.evaluate=none"], "nothing measures"),
        (["best.metric=loss", "head.mode=local", "server.evaluate=clients"], "best round would"),
        (["best.metric=loss", "best.holdout=1.0"], "less than 1"),
    ],
)
def test_what_cannot_choose_is_refused(parts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(parts)


def test_clients_can_choose_too(tmp_path: Path) -> None:
    own = ("best.metric=loss", "best.holdout=0", "server.evaluate=clients", "run.rounds=2")
    rounds = lines(run(settings_for(tmp_path, "r", *own)))
    losses = [line["evaluation"]["loss"] for line in rounds[1:]]
    assert [line["best"] for line in rounds[1:]] == [1, 1 + losses.index(min(losses))]
    assert "holdout" not in rounds[-1]
