"""The worked examples of CONTRIBUTING.md, and the method of ``examples/``, do what they say."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfit.configs.flower_defaults import Setting
from rankfit.configs.settings import RunSettings
from tests.conftest import ROOT
from tests.server.test_loop import lines

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(heading: str) -> dict[str, Any]:
    """Names that the code under a heading defines."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, f"CONTRIBUTING.md: {heading}", "exec"), names)  # noqa: S102
    return names


def test_a_setting() -> None:
    pause = example("Add a setting")["Pause"]
    own = Setting.of("pause", "every", pause.model_fields["every"])
    assert (own.key, own.form()) == ("pause.every", "whole number ≥ 0, in rounds")
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        pause(every=-1)


def test_a_task() -> None:
    from rankfit.tasks.data import Examples

    task = example("Add a task")["LengthTask"](RunSettings())
    split = task._split(Examples(["a", "bcd"], np.array([0, 1]), None, None))
    batch = split.collate([1, 0])
    assert batch["length"].tolist() == [[3.0], [1.0]] and batch["labels"].tolist() == [1, 0]
    for name, spec in task.example_batch(2).items():
        assert batch[name].shape == spec.shape and batch[name].dtype == spec.dtype
    scores = task.metrics(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), batch["labels"])
    assert scores["accuracy"] == 1.0


def test_an_estimator_term(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfit.estimator import calibration

    monkeypatch.setattr(calibration, "TERMS", dict(calibration.TERMS))
    example("Add an estimator term")
    term = calibration.TERMS["my-kernel-scratch"]
    assert term.value == 16 * 2**20 and term.source


def test_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "new_method.py"))["main"]
    small = ("run.rounds=2", "simulation.clients=3", "method.warm-up-rounds=1", "train.steps=2")
    found = main(*small)
    assert set(found) == {"settled-a", "fedit", "rankfit"}
    for folder in found.values():
        assert [line["round"] for line in lines(tmp_path / folder)] == [0, 1, 2]
    first, second = lines(tmp_path / found["settled-a"])[1:]
    moved = [sum(c["parameters"] for c in line["clients"].values()) for line in (first, second)]
    assert moved[1] < moved[0], "A rests after the warm-up"


@pytest.mark.parametrize("name", re.findall(r"\]\(([\w./]+)\)", TEXT))
def test_what_it_links_to_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_the_architecture_names_files_and_functions_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900, "one page"
    files = set(re.findall(r"\b[a-z_]+/[a-z_]+\.py", text))
    assert len(files) > 15
    for name in files:
        assert (ROOT / name).is_file(), name
    for name, function in re.findall(r"`([\w/]+\.py): (\w+)`", text):
        assert f"def {function}(" in (ROOT / name).read_text(encoding="utf-8"), (name, function)
    owned = re.findall(r"`(?:(\w+)\.)?(\w+)` in `([\w/]+\.py)`", text)
    assert owned
    for owner, function, name in owned:
        code = (ROOT / name).read_text(encoding="utf-8")
        assert f"def {function}(" in code and f"class {owner}" * bool(owner) in code, name
