"""Which attention kernel runs on a GPU: ours against genuine torch's choice on stub GPUs."""

import json

import pytest

from rankfit.estimator.meta_kernels import attention_kernel, kernel_family
from tests.estimator.test_attention import cases
from tests.stub_gpu.gpu import Gpu

CASES = 800

CHOOSES = f"""
import json, torch
from tests.estimator.test_attention import cases
print(torch.__version__)
print(json.dumps([case.torchs("cuda") for case in cases({CASES})]))
"""


@pytest.mark.parametrize("capability", ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_the_kernel_is_the_one_that_torch_chooses(on, capability):
    version, chosen = on(CHOOSES, Gpu(8192, capability)).splitlines()
    family = kernel_family(capability, version)
    wrong = []
    for case, torchs in zip(cases(CASES), json.loads(chosen), strict=True):
        q, k, v, mask = case.tensors("meta")
        own = attention_kernel(q, k, v, mask, case.dropout, case.causal, case.grouped, family)
        if own != torchs:
            wrong.append((own, torchs, case))
    assert not wrong, f"{len(wrong)} of {CASES}: {wrong[:3]}"
