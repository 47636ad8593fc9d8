"""Settings: flat and nested, unknown keys, bad values, presets that compose."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfit.configs import compose as composing
from rankfit.configs.compose import compose, parse_override, preset_names, read_preset
from rankfit.configs.flower_defaults import commented, declared, schema
from rankfit.configs.flower_defaults import main as write_defaults
from rankfit.configs.settings import (
    RENAMED,
    ConfigError,
    RunSettings,
    derive,
    from_flat,
    known_keys,
    split_list,
    split_numbers,
    to_flat,
)
from tests.conftest import ROOT


def test_flat_and_nested_are_inverse() -> None:
    settings = compose(["quickstart", "run.seed=7", "wire.dtype=bfloat16"])
    assert from_flat(to_flat(settings)) == settings
    assert from_flat({}) == RunSettings()


def test_the_apps_config_is_a_products_defaults() -> None:
    """Flower refuses keys that pyproject does not list; nothing there is of a simulated device."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config == known_keys(), "run `python -m rankfit.configs.flower_defaults`"
    assert not RunSettings().simulated_keys()
    for key in ("plan.upload-seconds", "plan.download-seconds", "server.min-clients"):
        assert config[key] == 0, key


def test_what_is_made_from_the_settings_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    write_defaults(tmp_path)
    for name in ("pyproject.toml", "docs/settings.md"):
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert made == (ROOT / name).read_text(encoding="utf-8"), (
            f"{name}: run `python -m rankfit.configs.flower_defaults`"
        )


def test_every_setting_is_declared_whole() -> None:
    found = {own.key: own for own in declared()}
    assert list(found) == list(known_keys())
    for own in found.values():
        assert own.type in ("text", "true or false", "whole number", "number"), own
        assert own.description.endswith((".", ")")) and len(own.description) > 15, own
        if own.type in ("whole number", "number"):
            assert own.range, f"{own.key} has no range"
    assert found["run.rounds"].told() == "whole number ≥ 1, in rounds"
    assert found["plan.margin-mib"].unit == "MiB" and found["client.idle-seconds"].unit == "s"
    assert found["lora.dropout"].range == "≥ 0, < 1"
    assert found["wire.dtype"].choices == ("float32", "float16", "bfloat16", "int8")


@pytest.mark.parametrize("name", [*preset_names(), ""])
def test_printed_settings_are_read_back(name: str, tmp_path: Path) -> None:
    settings = compose([name] if name else [])
    file = tmp_path / "mine.toml"
    file.write_text(commented(settings), encoding="utf-8")
    assert compose([str(file)]) == settings


def test_the_schema_accepts_what_is_printed_and_refuses_what_is_not_there() -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    for name in preset_names():
        validator.validate(tomllib.loads(commented(compose([name]))))
        validator.validate(tomllib.loads((composing.PRESETS / f"{name}.toml").read_text()))
    for wrong in ({"train": {"batchsize": 4}}, {"train": {"batch-size": 0}}, {"trian": {}}):
        assert not validator.is_valid(wrong), wrong


def test_the_quickstart_is_a_model_and_data_and_a_fleet() -> None:
    assert compose(["quickstart"]) == compose(["digits", "small-devices", "run.name=quickstart"])
    alone = compose(["digits"])
    assert not alone.simulated_keys() and alone.plan == RunSettings().plan


@pytest.mark.parametrize("name", preset_names())
def test_a_deployment_leaves_simulated_devices_out(name: str) -> None:
    deployed, simulated = compose([name], deployed=True), compose([name])
    assert not deployed.simulated_keys(), "a preset of simulated devices is marked as one"
    for key in ("server.min-clients", "plan.upload-seconds", "plan.download-seconds"):
        assert to_flat(deployed)[key] == known_keys()[key], key
    assert deployed.train == simulated.train and deployed.lora == simulated.lora


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(old: str, tmp_path: Path) -> None:
    assert old not in known_keys() and RENAMED[old] in known_keys()
    table, _, key = old.partition(".")
    (tmp_path / "old.toml").write_text(f"[{table}]\n{key} = 1\n")
    for part in (f"{old}=1", str(tmp_path / "old.toml")):
        with pytest.raises(ConfigError, match=f"renamed: write '{RENAMED[old]}'"):
            compose([part])


def test_a_deployment_says_which_preset_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    compose(["quickstart"], deployed=True)
    assert [r.getMessage() for r in caplog.records] == [
        "preset small-devices describes simulated devices: left out of a deployment"
    ]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name: str) -> None:
    assert compose([name]) != RunSettings()


def test_no_two_presets_repeat_each_other() -> None:
    """What several presets share lies in one that they include."""
    own = {}
    for name in preset_names():
        tables = tomllib.loads((composing.PRESETS / f"{name}.toml").read_text())
        tables.pop("include", None)
        own[name] = {(t, k, str(v)) for t, keys in tables.items() for k, v in keys.items()}
    for one in own:
        for two in own:
            assert one == two or len(own[one] & own[two]) <= max(3, len(own[one]) // 2), (one, two)


def test_later_parts_win(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('include = ["quickstart"]\n[run]\nrounds = 3\n')
    settings = compose([str(own), "lora.rank=4"])
    assert (settings.run.rounds, settings.lora.rank) == (3, 4)
    assert settings.data.source == "sklearn:digits"


def test_hraloras_ranks_follow_from_the_links() -> None:
    """12 / 18 / 24 ranks in each of 24 modules: the published [288, 432, 576]."""
    settings = compose(["cifar100-deit"])
    per_rank = 24 * (384 + 384) * 4
    ranks = [
        int(settings.plan.upload_seconds * mbps * 1e6 / 8 // per_rank)
        for mbps in split_numbers(settings.fleet.upload_mbps, "fleet.upload-mbps")
    ]
    assert [24 * rank for rank in ranks] == [288, 432, 576]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["quikstart"], "did you mean 'quickstart'"),
        (["nothing-like-it"], "unknown preset 'nothing-like-it'.*presets: "),
        (["no/such.toml"], "unknown preset"),
        (["train.batchsize=4"], "did you mean 'train.batch-size'"),
        (["train.batch-size=many"], "train.batch-size: expected int, got 'many'"),
        (["train.batch-size=0"], "train.batch-size: .*greater than or equal to 1.*got 0"),
        (["train.learning-rate=-1.0"], "train.learning-rate: .*greater than 0"),
        (
            ["wire.dtype=float8"],
            "wire.dtype: .*'float32', 'float16', 'bfloat16' or 'int8'.*got 'float8'",
        ),
        (["plan.search=magic"], "plan.search: unknown step 'magic'"),
        (["fleet.memory-mib=2048,lots"], "fleet.memory-mib: expected comma-separated numbers"),
        (["fleet.memory-mib=2048,0"], "fleet.memory-mib: every figure must be above 0"),
        (["partition.kind=dirichlit"], "partition.kind"),
        (["server.evaluate=everywhere"], "server.evaluate"),
    ],
)
def test_bad_input_names_the_value_and_the_remedy(parts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml [", "not a TOML file"),
        ("rounds = 3", "'rounds' is not a table"),
        ('include = "quickstart"', "expected a list of presets"),
        ('include = ["mine"]', "includes itself"),
    ],
)
def test_a_bad_preset_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_preset(str(file))


def test_overrides_take_the_settings_type() -> None:
    assert parse_override("run.name=7") == {"run.name": "7"}
    assert parse_override('fleet.memory-mib="2,4"') == {"fleet.memory-mib": "2,4"}
    assert parse_override("method.remainder=true") == {"method.remainder": True}
    assert parse_override("train.learning-rate=1e-3") == {"train.learning-rate": 1e-3}


def test_every_default_is_a_plain_toml_value() -> None:
    assert all(isinstance(value, str | int | float | bool) for value in known_keys().values())


def test_one_scale_for_all_ranks() -> None:
    classic = compose(["lora.rank=16", "lora.alpha=32.0"])
    assert classic.lora.scale == 2.0
    assert compose(["lora.rank=16", "lora.alpha=32.0", "lora.scaling=rslora"]).lora.scale == 8.0


@given(st.lists(st.text(alphabet="abc-_.0", min_size=1)))
def test_lists_are_split_at_commas(items: list[str]) -> None:
    assert split_list(" , ".join(items)) == tuple(items)


def test_seeds_differ_by_purpose_round_and_client() -> None:
    draws = {derive(seed, *parts) for seed in (0, 1) for parts in (("a",), ("a", 1), ("a", 1, "b"))}
    assert len(draws) == 6 and all(0 <= draw < 2**40 for draw in draws)
    assert derive(3, "order", 2) == derive(3, "order", 2)
