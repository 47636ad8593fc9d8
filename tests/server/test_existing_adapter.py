"""A run that begins with an adapter that PEFT saved: the product is kept, whatever the rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from rankfit.adapters.adapter import Adapter, initial
from rankfit.cli.preflight import check_run
from rankfit.configs.compose import compose, from_here, without_places
from rankfit.configs.settings import ConfigError, RunSettings
from rankfit.server.loop import build
from rankfit.strategies.methods import methods
from rankfit.tasks import load_task
from rankfit.tasks.base_model import load_base
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.peft_adapter import start_from
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines

QUICK = ("run.rounds=1", "train.steps=1", "server.diagnostics=false")


def base_of(settings: RunSettings) -> Any:
    task = load_task(settings)
    return load_base(settings, task.labels, task.output_names)


def save(folder: Path, settings: RunSettings, rank: int, **config: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of random weights; return the change of each module's weight."""
    base = base_of(settings)
    before = {name: module.weight.detach().clone() for name, module in linear(base)}
    targets = config.pop("target_modules", ["q_proj", "v_proj"])
    model: Any = get_peft_model(base, LoraConfig(r=rank, target_modules=targets, **config))
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            tensor.data.normal_(std=0.1)
    model.save_pretrained(folder)
    merged = PeftModel.from_pretrained(base_of(settings), str(folder)).merge_and_unload()
    after = dict(linear(merged))
    return {
        name: change
        for name, weight in before.items()
        if (change := after[name].weight.detach() - weight).abs().max() > 1e-6
    }


def linear(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def products(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: adapter.scale * own.product() for name, own in adapter.factors.items()}


def own(tmp_path: Path, name: str, *more: str) -> RunSettings:
    return settings_for(tmp_path, name, *QUICK, f"lora.start={tmp_path / 'given'}", *more)


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 2, "lora_alpha": 3},
        {"rank": 4, "lora_alpha": 8, "use_rslora": True},
        {"rank": 3, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 7, "0.*v_proj": 2}},
    ],
    ids=["smaller", "the same", "of several ranks"],
)
def test_a_product_is_kept_in_a_larger_rank(tmp_path: Path, config: dict[str, Any]) -> None:
    settings = own(tmp_path, "run", "lora.rank=4", "lora.targets=q_proj,v_proj")
    changes = save(tmp_path / "given", settings, config.pop("rank"), **config)
    start = build(settings).start
    assert set(start.ranks.values()) == {4} and set(changes) == set(start.factors)
    for name, product in products(start).items():
        torch.testing.assert_close(product, changes[name], atol=1e-5, rtol=1e-5)
        strength = start.factors[name].b.norm(dim=0) * start.factors[name].a.norm(dim=1)
        assert (strength.diff() <= 1e-6).all()
        assert start.factors[name].a.norm(dim=1).min() > 0  # all directions can learn


def test_the_strongest_directions_are_kept_in_a_smaller_rank(tmp_path: Path) -> None:
    settings = own(tmp_path, "run", "lora.rank=2", "lora.targets=q_proj,v_proj")
    changes = save(tmp_path / "given", settings, 8, lora_alpha=16)
    for name, product in products(build(settings).start).items():
        u, values, vt = torch.linalg.svd(changes[name].double())
        best = (u[:, :2] * values[:2]) @ vt[:2]
        torch.testing.assert_close(product.double(), best, atol=1e-5, rtol=1e-4)


def test_modules_that_it_lacks_begin_anew(tmp_path: Path) -> None:
    settings = own(tmp_path, "run", "lora.rank=4", "lora.targets=q_proj,v_proj")
    changes = save(tmp_path / "given", settings, 4, target_modules=["q_proj"])
    for name, product in products(build(settings).start).items():
        assert torch.equal(product, torch.zeros_like(product)) == ("q_proj" not in name)
        assert (name in changes) == ("q_proj" in name)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_goes_on_from_it(tmp_path: Path, method: str) -> None:
    """Trained with next to no learning rate at the full rank, the global adapter is what it was."""
    kept = own(
        tmp_path, "run", f"method.name={method}", "lora.rank=4", "lora.targets=q_proj,v_proj",
        "train.learning-rate=1e-12", "fleet.memory-mib=", "fleet.upload-mbps=",
        "fleet.download-mbps=", "run.rounds=2",
    )  # fmt: skip
    if method == "lokr":
        with pytest.raises((ModelError, ConfigError), match="lora.form"):
            build(compose([*compose_parts(kept), "lora.form=kronecker"]))
        return
    changes = save(tmp_path / "given", kept, 3, modules_to_save=["classifier"])
    folder = run(kept)
    merged = PeftModel.from_pretrained(base_of(kept), str(folder / "checkpoint"))
    after = dict(linear(merged.merge_and_unload()))
    before = dict(linear(base_of(kept)))
    for name, change in changes.items():
        if name == "classifier":
            torch.testing.assert_close(after[name].weight, before[name].weight + change)
            continue
        found = after[name].weight.detach() - before[name].weight.detach()
        assert (found - change).norm() < 0.02 * change.norm(), name


def compose_parts(settings: RunSettings) -> list[str]:
    from rankfit.configs.settings import to_flat

    return [f"{key}={json.dumps(value)}" for key, value in to_flat(settings).items()]


def test_a_run_goes_on_from_the_checkpoint_of_another(tmp_path: Path) -> None:
    first = run(settings_for(tmp_path, "first", *QUICK, "train.steps=4", "run.rounds=2"))
    start = f"lora.start={first / 'checkpoint'}"
    second = run(settings_for(tmp_path, "second", *QUICK, start, "lora.rank=12"))
    last, begun = lines(first)[-1]["evaluation"], lines(second)[0]["evaluation"]
    assert begun["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert begun["accuracy"] == last["accuracy"]
    assert load_file(first / "checkpoint" / "adapter_model.safetensors")


def test_what_cannot_be_a_start_is_refused_in_a_line(tmp_path: Path) -> None:
    settings = own(tmp_path, "run", "lora.rank=4", "lora.targets=q_proj")
    given = tmp_path / "given"
    with pytest.raises(ModelError, match="there is no such folder"):
        check_run(settings)
    given.mkdir()
    with pytest.raises(ModelError, match="holds no adapter_config.json"):
        check_run(settings)
    save(given, settings, 2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(
        ModelError, match="which lora.targets does not: set lora.targets=q_proj,v_proj"
    ):
        check_run(settings)
    save(given, settings, 2, target_modules=["q_proj"], modules_to_save=["classifier"])
    with pytest.raises(ModelError, match="holds classifier.*set head.mode=trained"):
        check_run(own(tmp_path, "run", "lora.targets=q_proj", "head.mode=frozen"))
    with pytest.raises(ModelError, match="it is for other classes"):
        check_run(own(tmp_path, "run", "lora.targets=q_proj", "data.classes=4"))
    check_run(settings)
    file = given / "adapter_config.json"
    plain = json.loads(file.read_text())
    for change, message in (
        ({"use_dora": True}, "is DoRA.*merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "begun by 'pissa', which changes the base"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "cannot be loaded|expected LoRA"),
    ):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(ModelError, match=message):
            check_run(settings)
    file.write_text(json.dumps(plain))
    (given / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be loaded as an adapter"):
        check_run(settings)
    with pytest.raises(ConfigError, match="there is no DoRA.*lora.targets=all-linear"):
        compose(["quickstart", "lora.use-dora=true"])


def test_its_place_is_made_absolute_here_and_cut_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    settings = from_here(compose(["quickstart", "lora.start=given"]))
    assert settings.lora.start == str(tmp_path / "given")
    assert without_places(settings).lora.start == "./given"
    assert from_here(compose(["quickstart", "lora.start=o/x"])).lora.start == "o/x"


def test_nothing_named_is_a_fresh_start() -> None:
    fresh = initial({"m": (4, 6)}, 2, 1.0, {}, 0)
    assert start_from(compose(["quickstart"]), fresh) is fresh
