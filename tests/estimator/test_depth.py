"""Deep traces from shallow ones, to the event; and traces and replays that are kept."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfit.estimator import native_allocator as native
from rankfit.estimator.allocator import Replay, replay, replay_fast
from rankfit.estimator.depth import depth_of, place_of, shallow, solve_deep
from rankfit.estimator.trace import StepFamily, solve
from rankfit.estimator.tracer import TraceCache, TraceStore

from .architectures import deep_spec
from .small import step_spec

GPU = {"accelerator": "cuda", "precision": "bf16", "dropout": 0.1}
FIELDS = ("events", "column", "amount", "sampled", "trained", "state", "phases", "operators")


def assert_equal(one: StepFamily, two: StepFamily) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field), err_msg=field)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {}),
        ("deit", GPU | {"clips": True}),
        ("bert", GPU | {"checkpointing": True, "accumulates": True}),
        ("deberta-v2", {}),
        ("llama", GPU | {"checkpointing": True, "trainable": "b"}),
        ("qwen2", {"optimizer": "sgd"}),
        ("qwen3", GPU),
        ("gpt2", GPU),
        ("opt", {"remainder": True}),
        ("t5", GPU),
    ],
)
def test_a_deep_trace_from_shallow_ones_equals_the_recorded_one(name: str, changes: dict):
    spec = deep_spec(name, 6, **changes)
    assert depth_of(spec) == 6
    assert_equal(solve_deep(spec, (2, 3)), solve(spec, (2, 3)))


@pytest.mark.parametrize("name", ["swin", "gemma2"])
def test_layers_that_differ_are_recorded_at_full_depth(name: str):
    assert depth_of(deep_spec(name, 6)) == 0


def test_targets_in_some_layers_only_are_recorded_at_full_depth():
    spec = deep_spec("llama", 6)
    some = type(spec)(**(vars(spec) | {"targets": spec.targets[2:]}))
    assert depth_of(some) == 0


def test_shallow_keeps_the_first_layers():
    spec = shallow(deep_spec("llama", 6), 2)
    assert {place_of(target)[0] for target in spec.targets} == {0, 1}
    assert depth_of(spec) == 2
    assert place_of("model.layers.11.mlp.up_proj") == (11, "model.layers.#.mlp.up_proj")
    assert place_of("lm_head") == (None, "lm_head")


# Kept on disk.


def test_a_stored_trace_is_the_one_that_was_made(tmp_path, monkeypatch):
    spec = step_spec("vit")
    made = TraceCache(TraceStore(tmp_path))(spec)
    monkeypatch.setattr("rankfit.estimator.tracer.solve_deep", None)  # nothing is recorded again
    read = TraceCache(TraceStore(tmp_path))(spec)
    np.testing.assert_array_equal(made.events, read.events)
    assert made.peak_live(5) == read.peak_live(5)
    assert made.breakdown(5) == read.breakdown(5)


def test_other_versions_and_broken_files_are_made_again(tmp_path, monkeypatch, caplog):
    spec, store = step_spec("vit"), TraceStore(tmp_path)
    peak = TraceCache(store)(spec).peak_live(5)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a file")
    assert TraceCache(store)(spec).peak_live(5) == peak
    assert "made again" in caplog.text
    monkeypatch.setattr("transformers.__version__", "0.0")
    assert store.read(file.stem.rpartition("-")[0], spec) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert TraceCache(TraceStore(tmp_path / "file" / "below"))(step_spec("vit")).peak_live(5) > 0
    assert "not kept" in caplog.text


# The replay in C.

MIB = 2**20
sizes_of = st.lists(
    st.one_of(st.integers(0, 2048), st.integers(MIB // 2, 2 * MIB), st.integers(8 * MIB, 40 * MIB)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(sizes_of, st.randoms(use_true_random=False), st.one_of(st.none(), st.integers(1, 200)))
def test_the_replay_in_c_equals_the_one_in_python(sizes, random, cap_mib):
    events = allocations(len(sizes), random)
    cap = None if cap_mib is None else cap_mib * MIB
    fast = in_c(sizes, events, cap)
    assert fast == replay(sizes, events, cap)


def allocations(count: int, random: Random) -> list[int]:
    """Events that allocate blocks 0 to count − 1 and free some of them in between, at random."""
    events: list[int] = []
    live: list[int] = []
    for index in range(count):
        events.append(index)
        live.append(index)
        while live and random.random() < 0.5:
            events.append(-1 - live.pop(random.randrange(len(live))))
    return events


def in_c(sizes: list[int], events: list[int], cap: int | None) -> Replay:
    amount = np.array(sizes, dtype=np.int64)
    column, point = np.zeros_like(amount), np.ones(1, dtype=np.int64)
    return replay_fast(column, amount, point, np.array(events, dtype=np.int64), 0, cap)


@settings(max_examples=100, deadline=None)
@given(sizes_of, st.randoms(use_true_random=False), st.integers(1, 200))
def test_a_replay_holds_for_every_cap_of_its_range(sizes, random, cap_mib):
    """What lets a fleet share replays: under the other caps the very same peaks come out."""
    events = allocations(len(sizes), random)
    cap = cap_mib * MIB
    found = replay(sizes, events, cap)
    assert found.holds_under(cap)
    last = found.refused - 1 if found.refused else found.reserved + 7 * MIB
    for other in {found.reserved, last, (found.reserved + last) // 2} - {0}:
        assert found.holds_under(other) and replay(sizes, events, other) == found
    if found.refused:
        assert not found.holds_under(found.refused)
        assert replay(sizes, events, found.refused) != found


def test_without_a_compiler_the_replay_runs_in_python(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native._library.cache_clear()
    try:
        assert native.native_replay(*[np.array([1])] * 3, np.array([0]), 0, None) is None
        assert in_c([5 * MIB], [0], None).reserved == 20 * MIB
    finally:
        native._library.cache_clear()
