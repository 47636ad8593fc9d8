import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankfit.configs.settings import RunSettings
from rankfit.tasks.partition import PartitionError, partition


def run_settings(kind, seed=0, **changes):
    return RunSettings.model_validate(
        {"run": {"seed": seed}, "partition": {"kind": kind, **changes}}
    )


def draw_labels(examples, classes, seed):
    return np.random.default_rng(seed).integers(0, classes, examples)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "pathological"]),
    examples=st.integers(40, 400),
    classes=st.integers(2, 8),
    clients=st.integers(1, 8),
    each=st.integers(1, 8),
    minimum=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_parts_are_disjoint_complete_deterministic_and_large_enough(
    kind, examples, classes, clients, each, minimum, seed
):
    labels = draw_labels(examples, classes, seed)
    asked = run_settings(kind, seed, alpha=0.5, classes_per_client=each, min_samples=minimum)
    try:
        parts = partition(labels, asked, clients)
    except PartitionError:
        assume(False)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples))
    assert min(len(part) for part in parts) >= max(1, minimum)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    again = partition(labels, asked, clients)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    if kind == "pathological":
        assert all(len(np.unique(labels[part])) == each for part in parts)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_another_seed_deals_otherwise(kind):
    labels = draw_labels(500, 5, 0)
    one, two = (partition(labels, run_settings(kind, seed), 4) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_parts_are_shuffled_and_equal():
    labels = np.sort(draw_labels(1000, 10, 0))
    parts = partition(labels, run_settings("iid"), 7)
    assert {len(part) for part in parts} == {142, 143}
    assert all(len(np.unique(labels[part])) == 10 for part in parts)


def test_a_smaller_alpha_is_more_skewed():
    labels = draw_labels(5000, 10, 0)

    def largest_share(alpha):
        parts = partition(labels, run_settings("dirichlet", alpha=alpha), 10)
        return np.mean([np.bincount(labels[p]).max() / len(p) for p in parts])

    assert largest_share(0.1) > 0.5 > 0.2 > largest_share(100.0)


def test_pathological_as_in_hralora():
    labels = np.repeat(np.arange(100), 500)  # CIFAR-100
    parts = partition(labels, run_settings("pathological", classes_per_client=10), 20)
    assert all(len(np.unique(labels[part])) == 10 for part in parts)
    holders = np.zeros(100, dtype=int)
    for part in parts:
        holders[np.unique(labels[part])] += 1
    assert set(holders) == {2}
    sizes = [np.bincount(labels[p], minlength=100).max() for p in parts]
    assert max(sizes) > 400  # Dirichlet(1) is uneven within a class


def test_hundred_clients():
    labels = np.repeat(np.arange(100), 500)
    for kind in ("dirichlet", "pathological"):
        parts = partition(labels, run_settings(kind, classes_per_client=10, alpha=0.3), 100)
        assert min(len(part) for part in parts) >= 10


def test_a_nodes_own_files_are_all_its_own():
    labels = draw_labels(30, 3, 0)
    (part,) = partition(labels, run_settings("local"), 9)
    assert np.array_equal(part, np.arange(30))
    with pytest.raises(PartitionError, match="30 examples"):
        partition(labels, run_settings("local", min_samples=31), 1)


@pytest.mark.parametrize(
    ("examples", "classes", "clients", "changes", "message"),
    [
        (30, 3, 4, {"kind": "iid"}, r"at least 10: lower partition\.min-samples"),
        (110, 2, 10, {"kind": "dirichlet", "alpha": 0.01}, r"raise partition\.alpha"),
        (110, 5, 10, {"kind": "pathological"}, "fewer than 10 of 110"),
        (100, 5, 2, {"kind": "pathological"}, r"leave some of 5 classes to nobody"),
        (100, 3, 2, {"kind": "pathological", "classes_per_client": 4}, "only 3 classes"),
        (8, 2, 6, {"kind": "pathological", "min_samples": 1}, "for 6 clients that hold it"),
    ],
)
def test_what_cannot_be_dealt_says_what_to_change(examples, classes, clients, changes, message):
    labels = np.arange(examples) % classes
    with pytest.raises(PartitionError, match=message):
        partition(labels, run_settings(**changes), clients)


def test_natural_groups_stay_together() -> None:
    users = np.array([f"user-{i % 7}" for i in range(70)] + ["user-9"] * 30)
    labels = np.zeros(100, dtype=np.int64)
    asked = run_settings("natural", column="user", min_samples=5)
    parts = partition(labels, asked, 4, users)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    held = [set(users[part]) for part in parts]
    assert sum(len(own) for own in held) == 8  # no user is with two clients
    assert max(len(part) for part in parts) == 30
    assert [p.tolist() for p in parts] == [p.tolist() for p in partition(labels, asked, 4, users)]
    each = partition(labels, asked, 8, users)
    assert sorted(len(set(users[part])) for part in each) == [1] * 8
    with pytest.raises(PartitionError, match="8 values, which 9 clients"):
        partition(labels, asked, 9, users)
    with pytest.raises(PartitionError, match="smallest of 8 clients has 10"):
        partition(labels, run_settings("natural", column="user", min_samples=12), 8, users)


def test_quantity_skew_keeps_the_minimum() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    for alpha, spread in ((0.2, 100), (1000.0, 0)):
        asked = run_settings("quantity", alpha=alpha, min_samples=7)
        sizes = [len(part) for part in partition(labels, asked, 10)]
        assert sum(sizes) == 1000 and min(sizes) >= 7
        assert max(sizes) - min(sizes) > spread
    assert max(sizes) - min(sizes) < 30
