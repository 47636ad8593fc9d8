"""Measurements on GPUs that others have published."""

import pytest
import transformers

from rankfit.configs.settings import from_flat
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.memory import Footprint
from rankfit.estimator.plan_search import Estimator
from rankfit.estimator.step_spec import InputSpec
from rankfit.estimator.trace import Trace

from .small import MIB, device

H100 = Calibration.cuda("9.0")

#: HRALoRA (CCGrid 2026) on an H100: DeiT-small, eager attention, rank 202, fp32, batch 32; MiB.
DEIT = {
    "parameters": 98.32,
    "gradients": 14.20,
    "optimizer": 28.41,
    "forward": 1787.53,
    "overhead": 78.44,
}


def test_deit_small_on_an_h100(deit_eager: Trace):
    """The total within 0.2 %, what is stored to the last digit given, every component in 0.35 %."""
    footprint = Footprint((deit_eager,), H100)
    breakdown = footprint.breakdown(202)
    for name, expected in DEIT.items():
        assert getattr(breakdown, name) / MIB == pytest.approx(expected, rel=0.0035), name
    for exact in ("parameters", "gradients", "optimizer"):
        assert getattr(breakdown, exact) / MIB == pytest.approx(DEIT[exact], abs=0.005)
    assert breakdown.total / MIB == pytest.approx(2006.90, rel=0.002)
    # It was profiled in blocks of the allocator; live bytes alone are 0.23 % below.
    assert breakdown.total == footprint.replays(202)[0].allocated
    live = deit_eager.peak_live(202, calibration=H100)
    assert 0.995 * 2006.90 < live / MIB < breakdown.total / MIB


#: PEFT's method_comparison/MetaMathQA, results of 2025-06-19 on an L40S (commits 0a179c1e and
#: 18e07f18): Llama-3.2-3B in bf16, float32 adapters on query and value, batch 4, SDPA, clipped.
#: Rank → trained parameters, mean of memory_allocated after the first 250 steps, largest
#: memory_reserved; bytes.
LLAMA = {
    32: (9_175_040, 6_925_580_957.696, 22_273_851_392),
    64: (18_350_080, 7_072_427_177.984, 22_540_189_696),
}
#: Tokens of the longest batch. It is not published: this is what explains rank 32's figure.
LONGEST = 704


@pytest.fixture(scope="module")
def llama() -> tuple[Estimator, Footprint]:
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=3072, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
        tie_word_embeddings=True,
    )  # fmt: skip
    settings = from_flat(
        {
            "lora.rank": 64,
            "train.batch-size": 4,
            "train.max-grad-norm": 1.0,
            "model.precision": "bf16",
            "plan.search": "",
        }
    )
    names = ("input_ids", "attention_mask", "labels")
    inputs = tuple(InputSpec(name, (LONGEST,), "int64") for name in names)
    estimator = Estimator.for_run(settings, config, inputs, kind="causal-lm")
    l40s = device(48 * 1024, "cuda", compute_capability="8.9")
    return estimator, estimator.footprint(l40s, estimator.steps[0])


def test_llama_3b_on_an_l40s_what_32_more_ranks_store(llama: tuple[Estimator, Footprint]):
    estimator, footprint = llama
    for rank, (parameters, _, _) in LLAMA.items():
        assert estimator.payload.bytes_per_rank() // 4 * rank == parameters
    less, more = (footprint.traces[0].breakdown(rank) for rank in LLAMA)
    stored = sum(
        getattr(more, name) - getattr(less, name)
        for name in ("parameters", "gradients", "optimizer")
    )
    assert stored == pytest.approx(LLAMA[64][1] - LLAMA[32][1], rel=0.0005)


@pytest.mark.parametrize("rank", LLAMA)
def test_llama_3b_on_an_l40s_reserved(llama: tuple[Estimator, Footprint], rank: int):
    """One unknown, the longest batch, explains two figures to 0.15 %."""
    reserved = llama[1].replays(rank)[0].reserved
    assert reserved == pytest.approx(LLAMA[rank][2], rel=0.0015)
