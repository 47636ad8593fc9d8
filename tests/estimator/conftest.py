import pytest

from rankfit.estimator.trace import Trace
from rankfit.estimator.tracer import TraceCache

from .small import step_spec

_CACHE = TraceCache()


@pytest.fixture(scope="session")
def traces() -> TraceCache:
    return _CACHE


def _deit(attention: str) -> Trace:
    return _CACHE(
        step_spec(
            "deit-small",
            head=False,
            accelerator="cuda",
            attention=attention,
            micro_batch=32,
            dropout=0.1,
        )
    )


@pytest.fixture(scope="session")
def deit_eager() -> Trace:
    """HRALoRA's step: DeiT-small, query and value, batch 32, dropout 0.1, frozen classifier."""
    return _deit("eager")


@pytest.fixture(scope="session")
def deit_sdpa() -> Trace:
    return _deit("sdpa")
