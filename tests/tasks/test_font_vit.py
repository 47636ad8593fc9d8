"""The pretrained backbone: its file, its renderer, and what its features are worth."""

import base64
import json
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from transformers import ViTConfig, ViTForImageClassification

from rankfit.tasks.font_vit import WEIGHTS, WeightsError, load, store
from scripts.font_vit.glyphs import CHARACTERS, Glyphs, count_blocks, draw_glyphs, render
from scripts.font_vit.pretrain import (
    CONFIG,
    accuracy,
    build_model,
    handwriting,
    learning_rate_factor,
    pretrain,
)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return draw_glyphs()


@pytest.fixture
def document() -> dict[str, object]:
    content = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def loaded_model(labels: int = 10) -> ViTForImageClassification:
    config, state = load()
    model = ViTForImageClassification(ViTConfig(**config, num_labels=labels))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == {"classifier.weight", "classifier.bias"}
    assert unexpected == []
    return model.eval()


def test_file_fits_the_bundle() -> None:
    assert WEIGHTS.stat().st_size <= 900_000


def test_config_matches_shapes() -> None:
    config, state = load()
    assert config == CONFIG
    expected = {
        name: value.shape
        for name, value in build_model(10).state_dict().items()
        if name.startswith("vit.")
    }
    assert {name: value.shape for name, value in state.items()} == expected
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert sum(value.nbytes for value in state.values()) <= 600_000


@pytest.mark.parametrize("position", [0, 100, -1])
def test_tampered_bytes_are_refused(
    document: dict[str, object], tmp_path: Path, position: int
) -> None:
    payload = bytearray(base64.b64decode(str(document["safetensors"])))
    payload[position] ^= 1
    document["safetensors"] = base64.b64encode(payload).decode("ascii")
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(WeightsError, match=str(document["sha256"])):
        load(path)


def test_tampered_hash_is_refused(document: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({**document, "sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(WeightsError, match="changed or cut short"):
        load(path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"config": {}, "safetensors": "%", "sha256": ""}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match="not a readable weights file"):
        load(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="absent.json"):
        load(tmp_path / "absent.json")


def test_store_and_load_are_inverse(tmp_path: Path) -> None:
    config, state = load()
    digest = store(config, state, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == WEIGHTS.read_bytes()
    assert digest == json.loads(WEIGHTS.read_text(encoding="utf-8"))["sha256"]


def test_every_character_is_drawn(glyphs: Glyphs) -> None:
    assert len(CHARACTERS) == 62
    assert glyphs.images.shape[0] == 62
    assert bool((glyphs.images.amax(dim=(2, 3)) > 0.9).all())
    # No two characters share their drawings (a font without a glyph would draw one box for all).
    assert len(torch.unique(glyphs.images[:, 0].flatten(1), dim=0)) == 62


def test_block_counts() -> None:
    bitmap = torch.zeros(1, 1, 32, 32)
    bitmap[0, 0, :4, :4] = 1.0
    bitmap[0, 0, 31, 31] = 1.0
    counted = count_blocks(bitmap)
    assert counted.shape == (1, 1, 8, 8)
    assert counted[0, 0, 0, 0] == 16.0
    assert counted[0, 0, 7, 7] == 1.0
    assert counted.sum() == bitmap.sum()


def test_renderings_look_like_digits_data(glyphs: Glyphs) -> None:
    images, labels = render(glyphs, 500, torch.Generator().manual_seed(3))
    assert images.shape == (500, 1, 8, 8)
    assert labels.shape == (500,)
    assert labels.min() >= 0
    assert labels.max() < 62
    assert bool((images == images.round()).all())
    assert images.min() == 0.0
    assert images.max() == 16.0
    assert bool((images.amax(dim=(1, 2, 3)) > 0).all())


def test_renderings_depend_on_the_seed_alone(glyphs: Glyphs) -> None:
    images, labels = render(glyphs, 64, torch.Generator().manual_seed(7))
    again, labels_again = render(glyphs, 64, torch.Generator().manual_seed(7))
    other, _ = render(glyphs, 64, torch.Generator().manual_seed(8))
    assert torch.equal(draw_glyphs("a8").images[1], glyphs.images[8])
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(images, other)


def test_accuracy_lets_only_the_labels_compete() -> None:
    model = build_model(62)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.bias[61], model.classifier.bias[1] = 2.0, 1.0
    images = torch.rand(4, 1, 8, 8)
    assert accuracy(model, images, torch.tensor([1, 1, 0, 1])) == 0.75


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert max(factors) == 1.0
    assert factors[0] < factors[4]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0.0)


def test_pretraining_is_deterministic(glyphs: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "scripts.font_vit.pretrain"
    monkeypatch.setattr(f"{module}.IMAGES_PER_EPOCH", 256)
    monkeypatch.setattr(f"{module}.VALIDATION_IMAGES", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, _ = pretrain(5, 1, glyphs)
        second, _ = pretrain(5, 1, glyphs)
    finally:
        torch.set_num_threads(threads)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_frozen_features_read_real_handwriting() -> None:
    """A linear probe on the class token; measured .984, see the model card."""
    images, labels = handwriting()
    with torch.no_grad():
        features = loaded_model().vit(pixel_values=images).last_hidden_state[:, 0]  # (n, hidden)
    train, test, train_labels, test_labels = train_test_split(
        features.numpy(), labels.numpy(), test_size=0.25, random_state=0, stratify=labels.numpy()
    )
    probe = LogisticRegression(max_iter=1000).fit(train, train_labels)
    assert probe.score(test, test_labels) >= 0.96
