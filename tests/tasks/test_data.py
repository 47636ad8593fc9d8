import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PilImage

from rankfit.configs.settings import Data, RunSettings
from rankfit.tasks.data import DataError, known_labels, read_data
from rankfit.tasks.readers import Columns, hub_parts

TEXTS = [f"text {i}" for i in range(20)]
COLOURS = ["red", "green", "blue", "amber"]
NAMES = [COLOURS[i % 4] for i in range(20)]


def text_settings(source, **tables):
    return RunSettings.model_validate(
        {
            "task": {"kind": "text-classification"},
            **tables,
            "data": {"source": str(source), **tables.get("data", {})},
        }
    )


def image_settings(source, **data):
    return RunSettings.model_validate({"data": {"source": str(source), **data}})


def write_csv(path, texts=TEXTS, labels=NAMES, header="text,label"):
    lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_images(folder, classes=("cat", "dog"), count=3):
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((6, 5, 3), 40 * shade + number, dtype=np.uint8)
            PilImage.fromarray(pixels).save(folder / name / f"{number}.png")


def test_digits():
    settings = RunSettings()
    data = read_data(settings)
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert data.class_names == tuple("0123456789")
    image = data.train.inputs[0]
    assert image.shape == (8, 8) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    shares = np.bincount(data.test.labels) / np.bincount(data.train.labels)
    assert shares.min() > 0.3 and shares.max() < 0.36
    again = read_data(settings)
    assert np.array_equal(data.train.labels, again.train.labels)
    other = read_data(RunSettings.model_validate({"run": {"seed": 1}}))
    assert not np.array_equal(data.train.labels, other.train.labels)


def test_first_classes_only():
    data = read_data(image_settings("sklearn:digits", classes=3))
    assert set(data.train.labels) == {0, 1, 2} == set(data.test.labels)
    assert data.class_names == ("0", "1", "2")
    with pytest.raises(DataError, match=r"data\.classes 11: the data has only 10"):
        read_data(image_settings("sklearn:digits", classes=11))


def test_only_the_digits_come_from_sklearn():
    with pytest.raises(DataError, match="sklearn:digits"):
        read_data(image_settings("sklearn:wine"))
    with pytest.raises(DataError, match="text-classification"):
        read_data(text_settings("sklearn:digits"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_one_file_of_every_format_with_text_labels(tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    rows = [{"text": text, "label": name} for text, name in zip(TEXTS, NAMES, strict=True)]
    if ending == "csv":
        write_csv(path)
    elif ending == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    data = read_data(text_settings(path))
    assert (len(data.train), len(data.test)) == (15, 5)
    assert data.class_names == ("amber", "blue", "green", "red")
    for part in (data.train, data.test):
        for row, label in enumerate(part.labels):
            assert data.class_names[label] == NAMES[TEXTS.index(part.inputs[row])]


def test_a_folder_with_both_sets_shares_one_numbering(tmp_path):
    write_csv(tmp_path / "train.csv", TEXTS[:3], ["b", "d", "b"])
    write_csv(tmp_path / "test.csv", TEXTS[3:5], ["d", "c"])
    data = read_data(text_settings(tmp_path))
    assert data.class_names == ("b", "c", "d")
    assert data.train.labels.tolist() == [0, 2, 0] and data.test.labels.tolist() == [2, 1]


def test_patterns_and_shards(tmp_path):
    write_csv(tmp_path / "intents-00000-of-00002.csv", TEXTS[:2], [0, 1])
    write_csv(tmp_path / "intents-00001-of-00002.csv", TEXTS[2:4], [2, 0])
    write_csv(tmp_path / "held.csv", TEXTS[4:6], [1, 1])
    for train in ("intents", "intents-*.csv"):
        data = read_data(text_settings(tmp_path, data={"train": train, "test": "held.csv"}))
        assert data.train.labels.tolist() == [0, 1, 2, 0] and len(data.test) == 2
        assert data.class_names == ("0", "1", "2")


def test_class_labels_keep_their_order_and_are_matched_by_name(tmp_path):
    def write(name, classes, labels):
        features = Features({"text": Value("string"), "label": ClassLabel(names=classes)})
        rows = {"text": TEXTS[: len(labels)], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name)

    write("train.parquet", ["zebra", "ant", "bee"], [0, 1, 2, 0])
    write("test.parquet", ["ant", "zebra"], [0, 1])
    data = read_data(text_settings(tmp_path))
    assert data.class_names == ("zebra", "ant", "bee")
    assert data.test.labels.tolist() == [1, 0]
    write("test.parquet", ["ant", "wasp"], [0, 1])
    with pytest.raises(DataError, match="row 1 has label 'wasp'"):
        read_data(text_settings(tmp_path))


def test_declared_class_names(tmp_path):
    path = write_csv(tmp_path / "d.csv")
    settings = text_settings(path, data={"class_names": "red, green, blue, amber"})
    data = read_data(settings)
    assert data.class_names == tuple(COLOURS) and known_labels(settings) == 4
    with pytest.raises(DataError, match="'blue'; expected one of red, green"):
        read_data(text_settings(path, data={"class_names": "red,green"}))


def test_known_labels_without_data():
    assert known_labels(RunSettings()) is None
    assert known_labels(text_settings("nowhere", data={"classes": 7})) == 7
    assert known_labels(text_settings("nowhere", data={"class_names": "a,b,c", "classes": 2})) == 2


def test_own_files_of_a_node(tmp_path):
    path = write_csv(tmp_path / "node.csv", TEXTS[:8], ["a", "c"] * 4)
    local = {"partition": {"kind": "local"}, "data": {"class_names": "a,b,c"}}
    data = read_data(text_settings("sklearn:digits", **local), data_path=str(path))
    assert (len(data.train), len(data.test)) == (8, 0) and data.class_names == ("a", "b", "c")
    asked = text_settings("x", **local, server={"evaluate": "clients"})
    data = read_data(asked, data_path=str(path))
    assert (len(data.train), len(data.test)) == (6, 2)
    with pytest.raises(DataError, match=r"set data\.class-names"):
        read_data(text_settings("x", partition={"kind": "local"}), data_path=str(path))
    write_csv(path, TEXTS[:4], [0, 2, 0, 2])
    counted = text_settings("x", partition={"kind": "local"}, data={"classes": 5})
    assert len(read_data(counted, data_path=str(path)).class_names) == 5
    with pytest.raises(DataError, match="no such file or folder"):
        read_data(counted, data_path=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1, 0], "row 1 has label -1; expected 0 … 1"),
        ([0, 0.5, 1, 0], "row 1 has label 0.5; expected a whole number or text"),
        (["a", None, "b", "a"], "row 1 has no label"),
    ],
)
def test_impossible_labels(tmp_path, labels, message):
    Dataset.from_dict({"text": TEXTS[:4], "label": labels}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=message):
        read_data(text_settings(tmp_path / "d.parquet"))


def test_a_label_out_of_the_declared_range(tmp_path):
    path = write_csv(tmp_path / "d.csv", TEXTS[:4], [0, 1, 5, 0])
    with pytest.raises(DataError, match="row 2 has label 5; expected 0 … 2"):
        read_data(text_settings(path, data={"class_names": "a,b,c"}))


def test_errors_name_what_is_missing(tmp_path):
    path = write_csv(tmp_path / "d.csv", header="sentence,intent")
    with pytest.raises(DataError, match=r"no column 'text'; the columns are sentence, intent"):
        read_data(text_settings(path))
    with pytest.raises(DataError, match=r"no column 'label'.*data\.label-column"):
        read_data(text_settings(path, data={"input_column": "sentence"}))
    named = {"input_column": "sentence", "label_column": "intent"}
    assert len(read_data(text_settings(path, data=named)).train) == 15
    with pytest.raises(DataError, match=r"nothing matches data\.train 'train'; it holds d\.csv"):
        read_data(text_settings(tmp_path))
    with pytest.raises(DataError, match=r"nothing matches data\.test 'later'"):
        read_data(text_settings(tmp_path, data={**named, "train": "d.csv", "test": "later"}))
    with pytest.raises(DataError, match="no such file or folder"):
        read_data(text_settings("./nowhere.csv"))
    (tmp_path / "d.xlsx").write_text("")
    with pytest.raises(DataError, match=r"d\.xlsx; expected one of \.parquet"):
        read_data(text_settings(tmp_path / "d.xlsx"))
    (tmp_path / "bad.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="cannot be read as json"):
        read_data(text_settings(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="somebody/something.*neither"):
        read_data(text_settings("somebody/something"))


def test_empty_sets_and_sets_too_small_to_split(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    empty = Dataset.from_dict({"text": [], "label": []}, features=features)
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="the set is empty"):
        read_data(text_settings(tmp_path / "empty.parquet"))
    write_csv(tmp_path / "small.csv", TEXTS[:3], ["a", "a", "b"])
    with pytest.raises(DataError, match=r"data\.test-fraction 0\.25: 3 examples of 2 classes"):
        read_data(text_settings(tmp_path / "small.csv"))
    Dataset.from_dict({"text": ["a", None], "label": [0, 1]}).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError, match="row 1 holds None, expected text"):
        read_data(text_settings(tmp_path / "n.parquet"))


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", classes=("dog",), count=1)
    data = read_data(image_settings(tmp_path))
    assert data.class_names == ("cat", "dog") and data.test.labels.tolist() == [1]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.inputs[4].size == (5, 6) and data.train.inputs[4].getpixel((0, 0))[0] == 41


def test_class_folders_alone_are_split(tmp_path):
    write_images(tmp_path, count=4)
    data = read_data(image_settings(tmp_path))
    assert (len(data.train), len(data.test)) == (6, 2)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: it holds no picture"):
        [data.train.inputs[row] for row in range(6)] + [data.test.inputs[row] for row in range(2)]


def test_images_in_tables(tmp_path):
    write_images(tmp_path / "pictures", count=2)
    files = sorted((tmp_path / "pictures").glob("*/*.png"))
    rows = {"img": [str(file) for file in files], "label": [0, 0, 1, 1]}
    features = Features({"img": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    lines = [f"{file.relative_to(tmp_path)},{i // 2}" for i, file in enumerate(files)]
    (tmp_path / "paths.csv").write_text("\n".join(["image,label", *lines]))
    raw = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "label": [0, 0, 1, 1]}
    Dataset.from_dict(raw).to_parquet(tmp_path / "raw.parquet")
    for name in ("train.parquet", "paths.csv", "raw.parquet"):
        data = read_data(image_settings(tmp_path, train=name, test=name))
        assert [image.getpixel((0, 0))[0] for image in data.test.inputs] == [0, 1, 40, 41]
        assert data.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.shared_data
def test_shared_sets(shared_data):
    settings = text_settings(
        shared_data / "text",
        data={"train": "banking77_train.parquet", "test": "banking77_test.parquet", "classes": 10},
    )
    data = read_data(settings)
    assert len(data.class_names) == 10 and set(data.train.labels) == set(range(10))
    images = read_data(
        image_settings(
            shared_data / "image", train="cifar10_train.parquet", test="cifar10_test.parquet"
        )
    )
    assert (len(images.train), len(images.test)) == (20000, 4000)
    assert images.class_names[3] == "cat" and images.train.inputs[5].size == (32, 32)


def test_hub_layout(tmp_path):
    # load_dataset reads a folder laid out like a hub repository in the same way.
    write_csv(tmp_path / "train.csv", TEXTS[:8], NAMES[:8])
    write_csv(tmp_path / "test.csv", TEXTS[8:12], NAMES[8:12])
    columns = Columns(("text",), "label", images=False)
    train, test = hub_parts(Data(source=str(tmp_path)), columns)
    assert test is not None and (len(train.inputs), len(test.inputs)) == (8, 4)
    sliced, test = hub_parts(Data(source=str(tmp_path), train="train[:25%]", test=""), columns)
    assert sliced.inputs == TEXTS[:2] and test is None
    with pytest.raises(DataError, match="splits 'train' and 'later'"):
        hub_parts(Data(source=str(tmp_path), test="later"), columns)
    (tmp_path / "test.csv").unlink()
    assert hub_parts(Data(source=str(tmp_path)), columns)[1] is None
