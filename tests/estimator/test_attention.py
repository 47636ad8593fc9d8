"""Which attention kernel runs: ours against torch's own choice, on cases drawn from one seed."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rankfit.estimator.meta_kernels import attention_kernel, cpu_attention_kernel, kernel_family

KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
WIDTHS = (1, 4, 8, 20, 32, 48, 64, 80, 96, 100, 128, 160, 192, 200, 224, 248, 256, 320)


@dataclass(frozen=True)
class Attention:
    """One call of scaled_dot_product_attention."""

    dtype: torch.dtype
    batch: int
    heads: tuple[int, int]
    lengths: tuple[int, int]
    widths: tuple[int, int]
    layout: str
    mask: str
    boolean: bool
    dropout: float
    causal: bool
    grouped: bool
    trains: bool

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask; only shapes, strides and types are right."""
        (queries, keys), (heads, few), (width, out) = self.lengths, self.heads, self.widths

        def make(heads: int, length: int, width: int) -> Tensor:
            shapes = {
                "heads-first": ((heads, length, width), (1, 1)),
                "heads-second": ((length, heads, width), (1, 2)),
                "transposed": ((heads, width, length), (2, 3)),
            }
            shape, swapped = shapes[self.layout]
            tensor = torch.empty(self.batch, *shape, device=device, dtype=self.dtype)
            return tensor.transpose(*swapped).requires_grad_(self.trains)

        shapes = {
            "two": (queries, keys),
            "three": (1, queries, keys),
            "sample": (self.batch, 1, queries, keys),
            "head": (1, heads, queries, keys),
            "row": (self.batch, 1, 1, keys),
            "transposed": (self.batch, 1, keys, queries),
            "learned": (self.batch, heads, queries, keys),
        }
        mask = None
        if self.mask:
            dtype = torch.bool if self.boolean and self.mask != "learned" else self.dtype
            mask = torch.empty(shapes[self.mask], device=device, dtype=dtype)
            mask = mask.transpose(2, 3) if self.mask == "transposed" else mask
            mask.requires_grad_(self.mask == "learned")
        tensors = make(heads, queries, width), make(few, keys, width), make(few, keys, out)
        return (*tensors, mask)

    def torchs(self, device: str) -> str:
        """Torch's own choice on a device."""
        q, k, v, mask = self.tensors(device)
        chosen = torch._fused_sdp_choice(
            q, k, v, mask, self.dropout, self.causal, enable_gqa=self.grouped
        )
        return KERNELS[chosen]


def cases(count: int) -> list[Attention]:
    """Draw calls, among them many that only just may or may not take a kernel."""
    draw = random.Random(7)
    drawn = []
    for _ in range(count):
        heads = draw.choice((1, 4, 8, 12))
        length, width = draw.choice((1, 16, 33, 64)), draw.choice((*WIDTHS, 64, 128))
        mask = draw.choice(
            ("", "", "", "two", "three", "sample", "head", "row", "transposed", "learned")
        )
        drawn.append(
            Attention(
                dtype=draw.choice((torch.float32, torch.float16, torch.bfloat16)),
                batch=draw.choice((1, 2, 3)),
                heads=(heads, draw.choice((heads, heads, 1, 2, 4))),
                lengths=(length, draw.choice((length, length, length, 1, 64))),
                widths=(width, draw.choice((width,) * 6 + (36, 128))),
                layout=draw.choice(("heads-first", "heads-second", "transposed")),
                mask=mask,
                boolean=draw.random() < 0.5,
                dropout=draw.choice((0.0, 0.0, 0.1, 0.125)),
                causal=not mask and draw.random() < 0.5,
                grouped=draw.random() < 0.4,
                trains=draw.random() < 0.7,
            )
        )
    return drawn


def test_the_kernel_on_a_cpu_is_torchs_choice():
    counts: Counter[str] = Counter()
    for case in cases(1500):
        q, k, v, mask = case.tensors("cpu")
        chosen = cpu_attention_kernel(q, k, v, mask, case.dropout, case.grouped)
        assert chosen == case.torchs("cpu"), case
        counts[chosen] += 1
    assert min(counts["math"], counts["flash"]) > 100


@pytest.mark.parametrize(
    ("capability", "version", "family"),
    [
        ("7.5", "2.13.0", "7.5"), ("8.0", "2.13.0", "8.0"), ("8.9", "2.13.0", "8.6"),
        ("9.0", "2.13.0+cu130", "9.0"), ("9.0", "2.8.0", "8.0"), ("10.3", "2.13.0", "10.0"),
        ("11.0", "2.13.0", "8.0"), ("12.0", "2.13.0", "8.6"), ("", "2.13.0", "8.0"),
    ],
)  # fmt: skip
def test_gpus_whose_kernels_are_alike_share_a_family(capability: str, version: str, family: str):
    assert kernel_family(capability, version) == family


@pytest.mark.parametrize(
    ("dtype", "capability", "few", "mask", "expected"),
    [
        (torch.float32, "8.0", 2, False, "math"),  # grouped heads in full precision, on every GPU
        (torch.float16, "7.5", 2, False, "math"),
        (torch.bfloat16, "7.5", 8, True, "math"),  # no bf16 there
        (torch.float16, "7.5", 8, False, "efficient"),
        (torch.bfloat16, "8.6", 2, False, "flash"),
        (torch.bfloat16, "9.0", 8, True, "cudnn"),
        (torch.float32, "9.0", 8, True, "efficient"),
    ],
)
def test_the_kernel_on_a_gpu(
    dtype: torch.dtype, capability: str, few: int, mask: bool, expected: str
):
    q = torch.empty(2, 8, 64, 64, dtype=dtype, device="meta", requires_grad=True)
    k = torch.empty(2, few, 64, 64, dtype=dtype, device="meta")
    bias = torch.empty(2, 1, 64, 64, dtype=torch.bool, device="meta") if mask else None
    family = kernel_family(capability)
    assert attention_kernel(q, k, k, bias, 0.0, not mask, few < 8, family) == expected
