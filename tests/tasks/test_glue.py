"""GLUE's presets on local stand-ins of its hub layout: columns, pairs, metrics, regression."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import RobertaConfig, RobertaModel

from benchmarks.tiny_lm import save_tokenizer
from rankfit.configs.compose import compose
from rankfit.configs.settings import RunSettings
from rankfit.tasks import load_task
from rankfit.tasks.base_model import load_base, target_modules
from rankfit.tasks.data import DataError
from rankfit.tasks.lora import fisher_scores, inject
from rankfit.tasks.metrics import classification_metrics, regression_metrics
from rankfit.tasks.partition import partition_of

#: Text columns, classes (0 = a number) and test split of each task on the hub.
LAYOUT = {
    "cola": (("sentence",), 2, "validation"),
    "sst2": (("sentence",), 2, "validation"),
    "mrpc": (("sentence1", "sentence2"), 2, "validation"),
    "qqp": (("question1", "question2"), 2, "validation"),
    "stsb": (("sentence1", "sentence2"), 0, "validation"),
    "mnli": (("premise", "hypothesis"), 3, "validation_matched"),
    "qnli": (("question", "sentence"), 2, "validation"),
    "rte": (("sentence1", "sentence2"), 2, "validation"),
    "wnli": (("sentence1", "sentence2"), 2, "validation"),
}
#: Training examples: as many as there are, where they are few.
SIZES = {"rte": 2490, "mrpc": 3668, "wnli": 635}
FIGURES = {
    "cola": {"mcc", "accuracy"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
}
PLAIN = {"accuracy", "macro-f1", "micro-f1"}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    generator = np.random.default_rng(0)
    words = [
        "a",
        "good",
        "film",
        "was",
        "seen",
        "by",
        "many",
        "people",
        "who",
        "liked",
        "it",
        "very",
        "much",
        "indeed",
    ]
    for task, (columns, classes, test) in LAYOUT.items():
        (root / "data" / task).mkdir(parents=True)
        for split, count in (("train", SIZES.get(task, 4000)), (test, 40)):
            rows = {
                column: [" ".join(row) for row in generator.choice(words, (count, 6))]
                for column in columns
            }
            labels = generator.integers(0, classes, count) if classes else None
            rows["label"] = generator.uniform(0, 5, count) if labels is None else labels
            names = [f"class {i}" for i in range(classes)]
            feature = ClassLabel(names=names) if classes else Value("float32")
            features = {column: Value("string") for column in columns} | {"label": feature}
            rows["idx"] = list(range(count))
            features["idx"] = Value("int32")
            file = root / "data" / task / f"{split}-00000-of-00001.parquet"
            Dataset.from_dict(rows, features=Features(features)).to_parquet(file)
    model = root / "roberta"
    tokenizer = save_tokenizer(model, words)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=len(tokenizer), intermediate_size=64, pad_token_id=1,
                           max_position_embeddings=140, **sizes)  # fmt: skip
    RobertaModel(config).save_pretrained(model)
    return root


def settings_for(glue: Path, task: str, *parts: str) -> RunSettings:
    preset = "glue-roberta" if task == "sst2" else f"glue-{task}"
    place = (f"model.source={glue / 'roberta'}", f"data.source={glue / 'data'}")
    return compose([preset, *place, *parts])


@pytest.mark.parametrize("name", LAYOUT)
def test_every_task_builds_learns_and_is_measured_by_its_own_figures(glue: Path, name: str) -> None:
    columns, classes, _ = LAYOUT[name]
    task = load_task(settings_for(glue, name))
    assert task.labels == max(1, classes)
    count = SIZES.get(name, 4000)
    assert len(task.train) == count and len(task.test) == 40
    parts = partition_of(task.train.examples, task.settings, 20)
    assert sum(len(part) for part in parts) == count
    base = load_base(task.settings, task.labels)
    batch = task.train.collate([0, 1, 2])
    example = task.example_batch(3)
    assert {k: v.dtype for k, v in batch.items()} == {k: v.dtype for k, v in example.items()}
    if len(columns) == 2:
        row = task.train.examples.inputs[0]
        tokenizer = task._tokenizer  # type: ignore[attr-defined]
        expected = tokenizer(*row)["input_ids"]
        assert batch["input_ids"][0, : len(expected)].tolist() == expected
    assert base(**batch).loss.requires_grad is False
    found = task.evaluate(base, task.test, range(40), torch.device("cpu"), 16)
    assert set(found) == FIGURES.get(name, PLAIN) | {"loss"}


def test_a_regressions_loss_is_the_squared_error_and_its_scores_are_measured(glue: Path) -> None:
    task = load_task(settings_for(glue, "stsb"))
    base = load_base(task.settings, 1)
    batch = task.test.collate(range(8))
    with torch.no_grad():
        output = base(**batch)
    error = (output.logits.squeeze(1) - batch["labels"]).square().mean()
    assert output.loss.item() == pytest.approx(error.item())
    found = task.evaluate(base, task.test, range(8), torch.device("cpu"), 3)
    assert found["loss"] == pytest.approx(error.item(), rel=1e-5)
    target = target_modules(base, "query")[0]
    peft = inject(base, {target: 2}, scale=1.0, dropout=0.0, heads=())
    assert set(fisher_scores(peft, task.train, np.arange(2), torch.device("cpu"))) == {target}


def test_figures_against_their_definitions() -> None:
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.normal(size=(50, 2)))
    labels = torch.from_numpy(generator.integers(0, 2, 50))
    predicted = logits.argmax(1).numpy()
    found = classification_metrics(logits, labels, ("accuracy", "f1", "mcc"))
    assert found["f1"] == pytest.approx(f1_score(labels, predicted))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(labels, predicted))
    numbers = torch.from_numpy(generator.normal(size=50)).float()
    outputs = (numbers + torch.from_numpy(generator.normal(size=50)).float())[:, None]
    found = regression_metrics(outputs, numbers, ("pearson", "spearman", "mse"))
    assert found["pearson"] == pytest.approx(pearsonr(outputs[:, 0], numbers).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(spearmanr(outputs[:, 0], numbers).statistic, abs=1e-6)
    assert found["loss"] == found["mse"]
    constant = regression_metrics(torch.ones(5, 1), numbers[:5], ("pearson", "spearman"))
    assert constant["pearson"] == constant["spearman"] == 0.0
    with pytest.raises(ValueError, match="f1 is of two classes, here are 3"):
        classification_metrics(torch.zeros(2, 3), torch.tensor([0, 1]), ("f1",))


def test_a_missing_column_is_named(glue: Path) -> None:
    with pytest.raises(DataError, match="no column 'hypothesis'; the columns are sentence1"):
        _ = load_task(settings_for(glue, "rte", "data.input-column=sentence1, hypothesis")).train
    with pytest.raises(DataError, match="no column 'target'.*set data.label-column"):
        _ = load_task(settings_for(glue, "rte", "data.label-column=target")).train
    natural = ("partition.kind=natural", "partition.column=hospital")
    with pytest.raises(DataError, match="no column 'hospital'.*set partition.column"):
        _ = load_task(settings_for(glue, "rte", *natural)).train


def test_a_natural_column_reaches_the_partition(glue: Path) -> None:
    natural = ("partition.kind=natural", "partition.column=idx")
    task = load_task(settings_for(glue, "rte", *natural))
    parts = partition_of(task.train.examples, task.settings, 4)
    assert sorted(len(part) for part in parts) == [622, 622, 623, 623]
