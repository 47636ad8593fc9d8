"""The split of the estimate against the split of a real CPU step."""

import pytest

from rankfit.estimator.components import measure_components
from rankfit.estimator.tracer import TraceCache

from .small import step_spec

TRACES = TraceCache()
STEPS = [{}, {"checkpointing": True}, {"accumulates": True, "dropout": 0.1}, {"optimizer": "sgd"}]


@pytest.mark.parametrize("changes", STEPS)
@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_every_component_is_that_of_a_real_step(architecture: str, changes: dict[str, object]):
    """To the byte, but for Adam's step counters (4 bytes a tensor)."""
    spec = step_spec(architecture, **changes)
    ranks = {module: 2 * index + 1 for index, module in enumerate(spec.targets)}
    split, measured = TRACES(spec).breakdown(ranks), measure_components(spec, ranks)
    for name, nbytes in measured.items():
        assert abs(getattr(split, name) - nbytes) <= 256, name
    assert abs(split.total - sum(measured.values())) <= 256
