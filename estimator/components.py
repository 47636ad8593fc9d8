"""Real training steps on random weights, and the components of their memory on a CPU."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rankfit.estimator.recording import LiveMemory
from rankfit.estimator.step import Phase, build, filled_batch, run_steps
from rankfit.estimator.step_spec import StepSpec


def real_step(
    spec: StepSpec,
    ranks: Mapping[str, int],
    remainder_ranks: Mapping[str, int] | None = None,
    device: str = "cpu",
) -> torch.nn.Module:
    """Build the adapted model of a step on a device, with random weights."""
    adapted = build(spec, ranks, remainder_ranks)
    model: torch.nn.Module = adapted.to_empty(device=device)
    adapted.base_model.model.tie_weights()  # to_empty unties them
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def measure_components(
    spec: StepSpec, ranks: Mapping[str, int], remainder_ranks: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Train two steps on this CPU; bytes by component, in the accounting of ``Breakdown``."""
    model = real_step(spec, ranks, remainder_ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {"parameters": 0, "forward": 0, "gradients": 0, "optimizer": 0, "overhead": 0}
    peaks = [0, 0]  # before and in the last optimizer step

    def enter(phase: Phase) -> None:
        peaks[0] = max(peaks[0], live.peak)
        if not found["parameters"]:
            found["parameters"] = live.current
        if phase == "optimizer":
            found["gradients"] = sum(p.grad.nbytes for p in trained if p.grad is not None)
            found["overhead"] = live.current
            live.reset_peak()

    with LiveMemory().baseline(model) as live:
        optimizer = run_steps(spec, model, lambda: filled_batch(spec), enter)
    found["overhead"] = max(0, live.peak - found["overhead"])
    found["optimizer"] = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    found["forward"] = max(peaks[0], live.peak) - sum(found.values())
    return found
