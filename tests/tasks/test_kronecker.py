"""Kronecker factors: the wrapped layer against the dense product, and as a plain LoRA adapter."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.configs.compose import compose
from rankfit.tasks.base_model import load_base, shared_heads, target_modules
from rankfit.tasks.kronecker import Kronecker, expanded, halves, unwrap, wrapped
from rankfit.tasks.lora import inject, load_adapter
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.targets import head_tensors, target_shapes

SCALE, RANK = 2.0, 3


def loaded(*parts: str) -> PreTrainedModel:
    return load_base(compose(["quickstart", *parts]), 10)


def drawn(base: PreTrainedModel) -> Adapter:
    """An adapter of random values for a wrapped base."""
    targets = target_modules(base, "default")
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: Factors(
            torch.randn(d, RANK, generator=generator), torch.randn(RANK, k, generator=generator)
        )
        for name, (d, k) in target_shapes(base, targets, RANK).items()
    }
    return Adapter(factors, SCALE, head_tensors(base, shared_heads(base, QUICK.head)))


QUICK = compose(["quickstart", "lokr"])


@pytest.mark.parametrize(
    ("width", "pair"), [(64, (8, 8)), (768, (24, 32)), (384, (16, 24)), (13, (1, 13))]
)
def test_widths_are_split_near_their_root(width: int, pair: tuple[int, int]) -> None:
    assert halves(width) == pair


def test_a_layer_adds_the_kronecker_product() -> None:
    """Against the (d, k) matrix s·W₁ ⊗ (B·A), through PEFT's adapter on the inner layer."""
    base = loaded("lokr")
    adapter = drawn(base)
    assert {a.a.shape[1] for a in adapter.factors.values()} == {8}
    name, own = next(iter(adapter.factors.items()))
    layer = base.get_submodule(name.removesuffix(".inner"))
    assert isinstance(layer, Kronecker)
    plain, outer = layer.base, layer.outer.weight.detach().clone()
    model = inject(base, adapter.ranks, scale=SCALE, dropout=0.0,
                   heads=shared_heads(base, QUICK.head))  # fmt: skip
    inputs = torch.randn(2, 5, 64)
    assert torch.allclose(layer(inputs), plain(inputs), atol=1e-6), "B = 0: no change yet"
    load_adapter(model, adapter)
    dense = torch.kron(outer, SCALE * own.b @ own.a)  # (64, 64)
    assert torch.allclose(layer(inputs), plain(inputs) + inputs @ dense.T, atol=1e-4)


def test_it_is_a_lora_adapter_of_the_plain_base() -> None:
    base = loaded("lokr")
    adapter = drawn(base)
    images = {"pixel_values": torch.rand(4, 1, 8, 8)}
    model = inject(base, adapter.ranks, scale=SCALE, dropout=0.0,
                   heads=shared_heads(base, QUICK.head))  # fmt: skip
    load_adapter(model, adapter)
    with torch.no_grad():
        found = model.eval()(**images).logits
    same = expanded(adapter)
    assert set(same.ranks.values()) == {8 * RANK}
    plain = loaded()
    other = inject(plain, same.ranks, scale=SCALE, dropout=0.0, heads=("classifier",))
    load_adapter(other, same)
    with torch.no_grad():
        assert torch.allclose(other.eval()(**images).logits, found, atol=1e-3)


def test_wrapping_leaves_the_base_as_it_was() -> None:
    base, plain = loaded("lokr"), loaded()
    assert len(wrapped(base)) == 8
    for name, tensor in unwrap(base).state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])


def test_only_plain_linear_layers_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    base = loaded()
    with pytest.raises(ModelError, match="is a LayerNorm; expected Linear layers"):
        from rankfit.tasks.kronecker import wrap

        wrap(base, ["vit.layernorm"])
