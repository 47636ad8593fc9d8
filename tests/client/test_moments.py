"""Second moments that a client keeps from round to round."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rankfit.adapters.names import Rates, a_name, b_name, head_name
from rankfit.client.trainer import kept_moments, recall
from rankfit.configs.settings import ConfigError
from rankfit.server.run_directory import WEIGHTS
from rankfit.tasks.optimizers import build_optimizer
from tests.server.federation import run, settings_for

A, B, H = a_name("m"), b_name("m"), head_name("classifier.weight")


def parameters() -> dict[str, nn.Parameter]:
    """Made after the seed is set, so that two calls give the same."""
    return {A: nn.Parameter(torch.randn(2, 5)), B: nn.Parameter(torch.randn(4, 2))}


def adamw(found: dict[str, nn.Parameter], *, fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(found.values(), lr=0.01, fused=fused)


def step(optimizer: torch.optim.Optimizer, found: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_round_goes_on_as_one_optimizer_whose_first_moments_are_set_to_zero(fused: bool) -> None:
    torch.manual_seed(0)
    one = parameters()
    whole = adamw(one, fused=fused)
    for seed in (1, 2, 3):
        step(whole, one, seed)
    kept = {name: t.clone() for name, t in kept_moments(whole, one).items()}
    two = {name: nn.Parameter(p.detach().clone()) for name, p in one.items()}
    for state in whole.state.values():
        state["exp_avg"].zero_()
    anew = adamw(two, fused=fused)
    recall(anew, two, kept)
    for seed in (4, 5):
        step(whole, one, seed)
        step(anew, two, seed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert float(kept["steps/" + A]) == 3.0, "what is kept is a copy: later steps do not change it"


def test_the_first_step_is_gentle_where_a_new_adamw_moves_by_the_whole_rate() -> None:
    torch.manual_seed(0)
    found = parameters()
    first = adamw(found)
    for seed in range(4):
        step(first, found, seed)
    moved = []
    for kept in ({}, kept_moments(first, found)):
        own = {name: nn.Parameter(p.detach().clone()) for name, p in found.items()}
        optimizer = adamw(own)
        recall(optimizer, own, kept)
        step(optimizer, own, 9)
        moved.append(float((own[A] - found[A]).detach().abs().mean()))
    assert moved[0] == pytest.approx(0.01, rel=0.1) and moved[1] < 0.3 * moved[0]


def test_another_rank_begins_anew_and_a_resting_factor_is_kept() -> None:
    torch.manual_seed(0)
    found = parameters()
    optimizer = adamw(found)
    found[A].grad = torch.ones(2, 5)
    optimizer.step()
    kept = kept_moments(optimizer, found)
    assert set(kept) == {A, "steps/" + A}, "B did not move"
    smaller = {A: nn.Parameter(torch.randn(1, 5)), B: nn.Parameter(torch.randn(4, 1))}
    other = adamw(smaller)
    recall(other, smaller, kept)
    assert not other.state


def test_a_head_with_one_moment_goes_on_with_it_and_not_with_another_ones() -> None:
    found = {H: nn.Parameter(torch.ones(3, 2))}

    def built(whole: bool) -> torch.optim.Optimizer:
        return build_optimizer(
            "adamw", Rates(whole_head=whole).groups(found.items(), 0.1), rate=0.1
        )

    kept = {}
    for whole in (True, False):
        optimizer = built(whole)
        found[H].grad = torch.full((3, 2), 2.0)
        optimizer.step()
        kept[whole] = kept_moments(optimizer, found)
        assert kept[whole][H].shape == (() if whole else (3, 2))
    for begun in (True, False):
        for whole in (True, False):
            optimizer = built(whole)
            recall(optimizer, found, kept[begun])
            assert bool(optimizer.state) == (begun == whole)


KEPT = (
    "train.moments=kept", "simulation.clients=2", "server.clients-per-round=2",
    "server.min-clients=2", "train.steps=2", "server.diagnostics=false",
    "partition.min-samples=16",
)  # fmt: skip


def test_a_resumed_run_goes_on_from_the_moments_of_its_checkpoint(tmp_path: Path) -> None:
    whole = run(settings_for(tmp_path, "whole", *KEPT, "run.rounds=3"))
    files = sorted(str(f.relative_to(whole)) for f in (whole / "moments").glob("*/*.safetensors"))
    assert len(files) == 6 and files[0] == "moments/partition-0/round-00001.safetensors"
    steps = load_file(whole / files[2])
    assert {float(t) for name, t in steps.items() if name.startswith("steps/")} == {6.0}
    run(settings_for(tmp_path, "cut", *KEPT, "run.rounds=2"))
    # A round that was trained and lost: its moments are not those that the next attempt finds.
    lost = tmp_path / "cut" / "moments" / "partition-0" / "round-00003.safetensors"
    lost.write_bytes((whole / files[0]).read_bytes())
    cut = run(settings_for(tmp_path, "cut", *KEPT, "run.rounds=3", "run.resume=true"))
    one, other = (load_file(folder / "checkpoint" / WEIGHTS) for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_the_setting_nothing_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "plain", *KEPT, "run.rounds=1", "train.moments=reset")
    assert not (run(settings) / "moments").exists()


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.moments kept.*sgd"):
        settings_for(tmp_path, "bad", *KEPT, "train.optimizer=sgd")
