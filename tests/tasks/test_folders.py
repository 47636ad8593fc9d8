"""Folders as they lie on disks: strays, splits, shards, saved sets, turned pictures."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from rankfit.configs.settings import RunSettings, from_flat
from rankfit.tasks import load_task
from rankfit.tasks.data import DataError, read_data

ROWS = {"text": [f"text {i}" for i in range(8)], "label": ["a", "b"] * 4}


def settings_for(
    folder: Path, kind: str = "image-classification", **changes: object
) -> RunSettings:
    return from_flat({"task.kind": kind, "data.source": str(folder), **changes})  # type: ignore[arg-type]


def pictures(folder: Path, count: int = 4, shade: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (6, 5), (shade + number, 0, 0)).save(folder / f"{number}.png")


def classes(folder: Path, **changes: object) -> dict[str, int]:
    """Number of pictures by class, of both sets."""
    data = read_data(settings_for(folder, **changes))
    labels = np.concatenate([data.train.labels, data.test.labels])
    return dict(zip(data.class_names, np.bincount(labels).tolist(), strict=True))


def test_what_programs_leave_behind_is_no_class_and_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
        pictures(tmp_path / name)
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"thumbs")
    (tmp_path / "cat" / "notes.heic").write_bytes(b"?")
    (tmp_path / "dog" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "dog" / "0.png", tmp_path / "dog" / ".ipynb_checkpoints")
    (tmp_path / ".DS_Store").write_bytes(b"store")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        assert classes(tmp_path) == {"cat": 4, "dog": 4}
    assert "left out, as no pictures: " in caplog.text and "and 4 more" in caplog.text
    assert "folders without pictures are no classes: empty" in caplog.text


def test_pictures_deeper_in_a_class_are_the_classs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path / "cat")
    pictures(tmp_path / "bird" / "2020", 3)
    pictures(tmp_path / "bird" / "2021" / "may", 2)
    with caplog.at_level(logging.WARNING):
        assert classes(tmp_path) == {"bird": 5, "cat": 4}
    assert "5 pictures of folders inside bird (2020, 2021) are of class bird" in caplog.text


def test_folders_of_folders_alone_are_asked_about(tmp_path: Path) -> None:
    for year in ("2020", "2021"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "by-year" / year / name)
    with pytest.raises(DataError, match=r"2020, 2021.*hold no pictures but folders \(cat, dog\)"):
        classes(tmp_path / "by-year")
    assert classes(tmp_path / "by-year", **{"data.train": "2020"}) == {"cat": 4, "dog": 4}


def test_the_only_folder_of_a_folder_is_gone_into(tmp_path: Path) -> None:
    """What unpacking an archive leaves: one folder more."""
    for name in ("cat", "dog"):
        pictures(tmp_path / "a" / "pets" / "images" / name)
    (tmp_path / "a" / "__MACOSX").mkdir()
    assert classes(tmp_path / "a") == {"cat": 4, "dog": 4}
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            pictures(tmp_path / "b" / "pets" / split / name)
    data = read_data(settings_for(tmp_path / "b"))
    assert (len(data.train), len(data.test)) == (8, 8)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "Testing"), ("TRAIN", "TEST"), ("train", "valid"),
     ("train", "Val"), ("training", "dev")],
)  # fmt: skip
def test_splits_by_other_names(tmp_path: Path, train: str, test: str) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / train / name)
        pictures(tmp_path / test / name, 2)
    data = read_data(settings_for(tmp_path))
    assert (len(data.train), len(data.test), data.class_names) == (8, 4, ("cat", "dog"))


def test_a_validation_set_stands_in_for_a_test_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Dataset.from_dict(ROWS).to_csv(tmp_path / "train.csv")
    data = read_data(settings_for(tmp_path, "text-classification"))
    assert (len(data.train), len(data.test)) == (6, 2)  # held out where there is no other
    Dataset.from_dict(ROWS).to_csv(tmp_path / "validation.csv")
    with caplog.at_level(logging.WARNING):
        data = read_data(settings_for(tmp_path, "text-classification"))
    assert (len(data.train), len(data.test)) == (8, 8)
    assert "there is no test set; the validation set is used" in caplog.text
    held_out = read_data(settings_for(tmp_path, "text-classification", **{"data.test": ""}))
    assert (len(held_out.train), len(held_out.test)) == (6, 2)


def test_shards_in_a_folder_named_data(tmp_path: Path) -> None:
    """A copy of a hub repository as it is."""
    (tmp_path / "data").mkdir()
    for part in range(2):
        Dataset.from_dict(ROWS).to_parquet(
            tmp_path / "data" / f"train-0000{part}-of-00002-1a2b3c.parquet"
        )
    Dataset.from_dict(ROWS).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "data" / "._train-00000-of-00002.parquet").write_bytes(b"resource fork")
    data = read_data(settings_for(tmp_path, "text-classification"))
    assert (len(data.train), len(data.test)) == (16, 8)


def test_folders_that_save_to_disk_wrote(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    rows = ROWS | {"label": [0, 1] * 4}
    table = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": table, "validation": table.select([0, 1])}).save_to_disk(tmp_path / "all")
    data = read_data(settings_for(tmp_path / "all", "text-classification"))
    assert (len(data.train), len(data.test), data.class_names) == (8, 2, ("b", "a"))
    table.save_to_disk(tmp_path / "one")
    data = read_data(settings_for(tmp_path / "one", "text-classification"))
    assert (len(data.train), len(data.test)) == (6, 2)
    for split in ("train", "test"):
        table.save_to_disk(tmp_path / "each" / split)
    data = read_data(settings_for(tmp_path / "each", "text-classification"))
    assert (len(data.train), len(data.test)) == (8, 8)


def test_pictures_listed_in_a_table(tmp_path: Path) -> None:
    """The layout of datasets' imagefolder with metadata."""
    pictures(tmp_path / "train" / "img")
    rows = [{"file_name": f"img/{i}.png", "label": ["x", "y"][i % 2]} for i in range(4)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "train" / "metadata.jsonl").write_text(lines)
    assert classes(tmp_path, **{"data.test-fraction": 0.5}) == {"x": 2, "y": 2}


def test_pictures_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    """From folders, from paths in a table, and from pictures in a table: the same pixels."""
    for name in ("a", "b"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.effect_noise((24, 16), 80).convert("RGB")
            exif = picture.getexif()
            exif[0x0112] = 6  # to be turned by 270 degrees
            picture.save(tmp_path / "folder" / name / f"{number}.jpg", exif=exif)
    files = sorted((tmp_path / "folder").glob("*/*.jpg"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [file.parent.name for file in files],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "table.parquet")
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
    (tmp_path / "paths.csv").write_text("\n".join(["image,label", *lines]))
    found = []
    for source in ("folder", "table.parquet", "paths.csv"):
        task = load_task(settings_for(tmp_path / source, **{"data.test-fraction": 0.34}))
        assert task.train.examples.inputs[0].size == (16, 24)
        found.append(task.train.collate(range(len(task.train)))["pixel_values"])
    assert bool((found[0] == found[1]).all()) and bool((found[0] == found[2]).all())


def test_the_folder_itself_is_named_where_nothing_matches(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,0\n")
    with pytest.raises(DataError, match="nothing matches data.train 'train'; it holds reviews.csv"):
        read_data(settings_for(tmp_path, "text-classification"))
