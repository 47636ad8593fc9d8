"""Labels: by what they say, the same on every node, and named where they cannot be used."""

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfit.configs.compose import compose, read_preset
from rankfit.configs.learning import join_names, split_names
from rankfit.configs.settings import ConfigError, RunSettings, from_flat
from rankfit.tasks.data import DataError, known_labels, read_data
from rankfit.tasks.records import Ids, RecordError

RATINGS = {"data.class-names": "1,2,3,4,5"}


def settings_for(folder: Path, **changes: object) -> RunSettings:
    flat = {"task.kind": "text-classification", "data.source": str(folder), "data.test": ""}
    return from_flat(flat | changes)  # type: ignore[operator]


def node(folder: Path, labels: list[Any], form: str = "jsonl", **changes: object) -> list[str]:
    """Names of the classes that a node gives its labels, row by row."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]
    if form == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    elif form == "csv":
        pandas.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    else:
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    changes = {"partition.kind": "local", **changes}
    data = read_data(settings_for(folder, **changes), data_path=str(folder))
    return [data.class_names[label] for label in data.train.labels]


def central(folder: Path, labels: list[Any], **changes: object) -> tuple[str, ...]:
    node(folder, labels, **{"partition.kind": "iid", **changes})
    changes = {"data.test-fraction": 0.4, **changes}
    data = read_data(settings_for(folder, **changes))
    return data.class_names


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "labels", [[1, 3, 5], ["1", "3", "5"], [1.0, 3.0, 5.0], ["1.0", "3.0", "5.0"]]
)
def test_declared_numbers_are_names_whatever_their_type(
    tmp_path: Path, form: str, labels: list[Any]
) -> None:
    assert node(tmp_path / "a", labels, form, **RATINGS) == ["1", "3", "5"]


def test_a_column_with_an_empty_cell_keeps_its_numbers(tmp_path: Path) -> None:
    """pandas makes floats of whole numbers where one is missing: 2 becomes 2.0."""
    for form in ("csv", "parquet"):
        with pytest.raises(RecordError, match="row 2 has no label"):
            node(tmp_path / "a", [0, 1, None, 2], form, **{"data.classes": 3})
        skip = {"data.classes": 3, "data.bad-records": "skip"}
        assert node(tmp_path / "a", [0, 1, None, 2], form, **skip) == ["0", "1", "2"]


@pytest.mark.parametrize("names", ["True,False", "False,True", "true,false"])
def test_truth_values(tmp_path: Path, names: str) -> None:
    declared = {"data.class-names": names}
    true = split_names(names)[0 if names.lower().startswith("true") else 1]
    for labels in ([True, False], ["True", "false"], [1, 0], [1.0, 0.0], ["TRUE", "FALSE"]):
        for form in ("jsonl", "csv", "parquet"):
            found = node(tmp_path / "a", labels, form, **declared)
            assert found[0] == true and found[1] != true, (labels, form)
    assert central(tmp_path / "b", [True, False] * 5) == ("False", "True")
    with pytest.raises(RecordError, match="row 0 has label 'True'; expected one of ham, spam"):
        node(tmp_path / "a", [True, False], **{"data.class-names": "ham,spam"})
    assert node(tmp_path / "a", [True, False], **{"data.class-names": "0,1"}) == ["1", "0"]


def test_ids_of_declared_words(tmp_path: Path) -> None:
    words = {"data.class-names": "cat,dog,bird"}
    for labels in ([0, 2], ["0", "2"], [0.0, 2.0], ["cat", "bird"], [" cat", "bird "]):
        assert node(tmp_path / "a", labels, **words) == ["cat", "bird"]
    with pytest.raises(RecordError, match="row 1 has label 3; expected 0 … 2"):
        node(tmp_path / "a", [0, 3], **words)
    with pytest.raises(RecordError, match="row 0 has label 0; expected one of 1, 2, 3, 4, 5"):
        node(tmp_path / "a", [0, 3], **RATINGS)


def test_codes_with_gaps_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.class-names=10,20,1000000"):
        central(tmp_path / "a", [10, 20, 1_000_000] * 4)
    codes = {"data.class-names": "10,20,1000000"}
    assert central(tmp_path / "a", [10, 20, 1_000_000] * 4, **codes) == ("10", "20", "1000000")
    assert central(tmp_path / "a", [1, 2, 3] * 4) == ("1", "2", "3")
    assert central(tmp_path / "a", [0, 1, 3] * 4) == ("0", "1", "2", "3")
    with pytest.raises(DataError, match="data.class-names=-1"):
        central(tmp_path / "a", [-1] * 8)
    with pytest.raises(RecordError, match="row 1 has label -1; expected 0 … 1 .-1 stands for none"):
        central(tmp_path / "a", [0, -1, 1] * 4)


def test_labels_that_name_no_class(tmp_path: Path) -> None:
    for labels, wrong in (
        ([0, [0, 1], 1], r"row 1 has the label \[0, 1\]; expected one label a record"),
        ([0, {"a": 1}, 1], "row 1 has the label .*expected one label"),
        ([0, 0.5, 1], "row 1 has label 0.5; expected a whole number or text"),
        (["a", "", "b"], "row 1 has no label"),
        (["a", None, "b"], "row 1 has no label"),
    ):
        with pytest.raises(RecordError, match=wrong) as caught:
            central(tmp_path / "a", labels)
        assert (caught.value.row, caught.value.fault) == (1, "label")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.row, again.fault) == (str(caught.value), 1, "label")


def test_numbers_and_text_together_are_text(tmp_path: Path) -> None:
    assert central(tmp_path / "a", [1, "b", 1, "b"] * 3) == ("1", "b")
    Dataset.from_dict({"text": ["a", "b"] * 4, "label": [Decimal(1), Decimal(0)] * 4}).to_parquet(
        tmp_path / "train.parquet"
    )
    assert read_data(settings_for(tmp_path)).class_names == ("0", "1")


def test_leading_zeros_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\na,007\nb,010\nc,007\nd,010\n")
    assert read_data(settings_for(folder, **{"data.test-fraction": 0.5})).class_names == (
        "007",
        "010",
    )


def test_parts_whose_label_types_differ(tmp_path: Path) -> None:
    """Shards of one data set, written by two programs."""
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(
        tmp_path / "train-00000-of-00003.parquet"
    )
    Dataset.from_dict({"text": ["c", "d"], "label": ["no", "yes"]}).to_parquet(
        tmp_path / "train-00001-of-00003.parquet"
    )
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    Dataset.from_dict({"text": ["e", "f"], "label": [0, 1]}, features=features).to_parquet(
        tmp_path / "train-00002-of-00003.parquet"
    )
    changes = {"data.class-names": "no,yes", "data.test-fraction": 0.34}
    data = read_data(settings_for(tmp_path, **changes))
    found = {
        data.train.inputs[row]: data.class_names[label]
        for row, label in enumerate(data.train.labels)
    } | {
        data.test.inputs[row]: data.class_names[label] for row, label in enumerate(data.test.labels)
    }
    assert found == {"a": "no", "b": "yes", "c": "no", "d": "yes", "e": "yes", "f": "no"}


def test_names_with_commas(tmp_path: Path) -> None:
    names = ["cat, small", 'the "big" one', "plain"]
    text = join_names(names)
    assert split_names(text) == tuple(names)
    preset = tmp_path / "classes.toml"
    preset.write_text('[data]\nclass-names = ["cat, small", "the \\"big\\" one", "plain"]\n')
    for part in (
        str(preset),
        f"data.class-names={text}",
        'data.class-names=["cat, small", "the \\"big\\" one", "plain"]',
    ):
        own = compose([part])
        assert split_names(own.data.class_names) == tuple(names) and known_labels(own) == 3
    declared = {"data.class-names": text}
    assert node(tmp_path / "a", [names[1], names[0]], **declared) == [names[1], names[0]]
    assert read_preset(str(preset))
    with pytest.raises(ConfigError, match="'a' is there twice"):
        compose(["data.class-names=a,b,a"])
    with pytest.raises(ConfigError, match="a double quote is not closed"):
        compose(['data.class-names="a, b'])


# Property: a label has one id, on whatever node and in whatever type.

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda text: bool(text.strip())
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(WORDS | st.integers(-5, 40).map(str), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_two_nodes_give_a_label_the_same_id(
    tmp_path: Path, names: list[str], data: st.DataObject
) -> None:
    declared = {"data.class-names": join_names(names)}
    held: list[dict[str, str]] = []
    for name in ("a", "b"):
        own = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6))
        form = data.draw(st.sampled_from(["jsonl", "csv", "parquet"]))
        types = [str, int, float] if all(_is_int(label) for label in own) else [str]
        kind = data.draw(st.sampled_from(types))
        found = node(tmp_path / name, [kind(label) for label in own], form, **declared)
        assert found == own
        held.append(dict(zip(own, found, strict=True)))
    assert all(held[0][label] == held[1][label] for label in set(held[0]) & set(held[1]))


def _is_int(text: str) -> bool:
    return text.isascii() and text.lstrip("-").isdigit() and str(int(text)) == text


@given(st.lists(st.integers(0, 30) | st.booleans() | WORDS, min_size=1, unique_by=str))
def test_every_name_finds_itself(names: list[Any]) -> None:
    ids = Ids([str(name) for name in names])
    assert [ids(str(name)) for name in names] == list(range(len(names)))
    assert np.array_equal([ids(n) for n in map(str, names)], np.arange(len(names)))
