"""The learning rate schedule does what its setting says."""

import math

import pytest

from rankfit.configs.settings import from_flat, learning_rate


def rates(rounds: int = 10, **train: object) -> list[float]:
    flat = {f"train.{key.replace('_', '-')}": value for key, value in train.items()}
    run = from_flat({"train.learning-rate": 0.4, "run.rounds": rounds} | flat)  # type: ignore[operator]
    return [learning_rate(run, number) for number in range(1, rounds + 1)]


def test_constant() -> None:
    assert rates() == [0.4] * 10


def test_step_decays_at_its_rounds() -> None:
    """HRALoRA's ``t+1 % lr_step_size == 0`` never decays."""
    found = rates(schedule="step", schedule_step=3, schedule_factor=0.1)
    assert found == pytest.approx([0.4] * 3 + [0.04] * 3 + [0.004] * 3 + [0.0004])


def test_linear_and_cosine_end_at_the_floor() -> None:
    linear = rates(schedule="linear", schedule_floor=0.25)
    assert linear == pytest.approx([0.4 * (1 - 0.75 * t / 10) for t in range(10)])
    cosine = rates(schedule="cosine")
    assert cosine == pytest.approx([0.2 * (1 + math.cos(math.pi * t / 10)) for t in range(10)])
    longer = rates(12, schedule="linear", schedule_rounds=10, schedule_floor=0.25)
    assert longer[:10] == pytest.approx(linear) and longer[10:] == pytest.approx([0.1, 0.1])


def test_warm_up_rises_to_the_rate() -> None:
    assert rates(schedule_warm_up=3)[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
