import pytest

from rankfit.estimator.round_time import Payload, rank_bound
from rankfit.tasks import base_model

from .small import IMAGE, deit_small_config


@pytest.fixture(scope="module")
def deit() -> Payload:
    base = base_model.build_empty(deit_small_config(100), IMAGE, attention="sdpa", precision="fp32")
    return Payload.of(base, base_model.target_modules(base, "default"), (), "float32")


def test_table_of_the_paper(deit: Payload):
    """HRALoRA's Table III: [288, 432, 576] over 24 modules, from the upload formula alone."""
    ranks = [deit.upload_bound(1.0, mbps) for mbps in (7.08, 10.62, 14.16)]
    assert ranks == [12, 18, 24]
    assert [rank * len(deit.shapes) for rank in ranks if rank] == [288, 432, 576]
    downloads = [deit.download_bound(1.0, mbps) for mbps in (51.1, 63.4, 86.3)]
    assert all(down > up for down, up in zip(downloads, ranks, strict=True) if down and up)


def test_bytes_per_rank_come_from_shapes_and_wire_type(deit: Payload):
    assert deit.bytes_per_rank() == 24 * (384 + 384) * 4
    half = Payload(deit.shapes, wire_dtype="bfloat16")
    assert half.bytes_per_rank() * 2 == deit.bytes_per_rank()
    assert half.upload_bound(1.0, 7.08) == 24


def test_one_factor_moves_at_half_the_traffic(deit: Payload):
    assert deit.bytes_per_rank("a") == deit.bytes_per_rank("b") == deit.bytes_per_rank() // 2
    assert deit.upload_bound(1.0, 7.08, ("a", "b")) == 24


def test_phases_take_the_larger_factor():
    payload = Payload({"mlp": (100, 10)})
    assert payload.bytes_per_rank("a") == 40 and payload.bytes_per_rank("b") == 400
    assert payload.upload_bound(1.0, 8e-6 * 1200, ("a", "b")) == 3


def test_the_head_is_a_fixed_cost(deit: Payload):
    with_head = Payload(deit.shapes, head_values=100 * 385)
    assert with_head.upload_bound(1.0, 7.08) == (885_000 - 154_000) // 73_728
    assert with_head.upload_bound(1.0, 1.0) == 0


def test_no_bound_without_a_time_or_a_known_link():
    assert rank_bound(0, 10, 100) is None
    assert rank_bound(1, 0, 100) is None


def test_bad_figures_are_named(deit: Payload):
    with pytest.raises(ValueError, match=r"-1 Mbps"):
        rank_bound(1, -1, 100)
    with pytest.raises(ValueError, match=r"are 0; expected more than 0"):
        rank_bound(1, 1, 0)
    with pytest.raises(ValueError, match=r"'float8'.*wire\.dtype"):
        Payload(deit.shapes, wire_dtype="float8")
    base = base_model.build_empty(deit_small_config(), IMAGE, attention="sdpa", precision="fp32")
    with pytest.raises(ValueError, match="is not a Linear module"):
        Payload.of(base, ("vit.embeddings",), (), "float32")
