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


class _Allocator:
    """Bytes in use on the GPU, as torch's caching allocator counts them."""

    @property
    def current(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @property
    def requested(self) -> int:
        """Bytes that were asked for: ``current`` without the rounding to blocks."""
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def measure_components(
    spec: StepSpec, ranks: Mapping[str, int], remainder_ranks: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Train two steps where the spec says; bytes by component, in the accounting of ``Breakdown``.

    On a GPU, which must be of the spec's kind, they are what its allocator counts, and ``unused``
    is what it has reserved beyond its peak of blocks in use.
    """
    if spec.accelerator != "cuda":
        model = real_step(spec, ranks, remainder_ranks)
        with LiveMemory().baseline(model) as live:
            found, optimizer = _measure(spec, model, live)
        found["optimizer"] = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        return _forward_is_the_rest(found)
    torch._C._cuda_clearCublasWorkspaces()  # they are counted: none may be there before
    torch.cuda.empty_cache()
    model = real_step(spec, ranks, remainder_ranks, "cuda")
    torch.cuda.empty_cache()  # tying frees weights, whose blocks the step would use again
    allocator = _Allocator()
    allocator.reset_peak()
    # What the rounding to blocks adds to them counts as ``forward``, as in the estimate.
    parameters = allocator.requested
    found, optimizer = _measure(spec, model, allocator)
    before = allocator.requested
    optimizer.state.clear()
    found["optimizer"] = before - allocator.requested
    # Beside the model only the libraries' workspaces are left.
    found["overhead"] += allocator.current - found["parameters"]
    found["parameters"] = parameters
    unused = torch.cuda.memory_reserved() - found["total"]
    return _forward_is_the_rest(found) | {"unused": unused}


def _measure(
    spec: StepSpec, model: torch.nn.Module, memory: LiveMemory | _Allocator
) -> tuple[dict[str, int], torch.optim.Optimizer]:
    """Run the steps: the components that show while they run, and the peak as ``total``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {"parameters": 0, "gradients": 0}
    peak_before = entered = 0  # the last optimizer step

    def enter(phase: Phase) -> None:
        nonlocal peak_before, entered
        peak_before = max(peak_before, memory.peak)
        found["parameters"] = found["parameters"] or memory.current
        if phase == "optimizer":
            found["gradients"] = sum(p.grad.nbytes for p in trained if p.grad is not None)
            entered = memory.current
            memory.reset_peak()

    optimizer = run_steps(spec, model, lambda: filled_batch(spec, spec.accelerator), enter)
    found["overhead"] = max(0, memory.peak - entered)
    found["total"] = max(peak_before, memory.peak)
    return found, optimizer


def _forward_is_the_rest(found: Mapping[str, int]) -> dict[str, int]:
    """The components of a total, with what no other one is as ``forward``."""
    parts = {name: nbytes for name, nbytes in found.items() if name != "total"}
    return parts | {"forward": found["total"] - sum(parts.values())}
