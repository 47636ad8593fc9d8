"""Measuring the memory of training steps, and keeping to a declared budget."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankfit.estimator.calibration import Calibration
from rankfit.estimator.live import LiveMemory


class CudaMeter:
    """Peak of device memory of the process, under a cap that it enforces.

    Both are what decides out of memory: what the caching allocator reserves, and what is outside of
    it (CUDA's context, NCCL's buffers), which the cap of the allocator must leave room for.
    """

    def __init__(self, device: torch.device, cap_bytes: int | None, group_size: int = 1) -> None:
        self._device = device
        total = torch.cuda.get_device_properties(device).total_memory
        self._outside = Calibration.cuda(group_size=group_size).outside
        allowed = total if cap_bytes is None else cap_bytes - self._outside
        share = min(1.0, max(allowed, 0) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
        # What an earlier client of this process left in the cache is not this one's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do nothing: the allocator counts all the time."""
        yield

    def see(self, inputs: Mapping[str, Tensor]) -> None:
        """Do nothing: see :meth:`step`."""

    def peak(self) -> int:
        """Largest bytes so far."""
        return int(torch.cuda.max_memory_reserved(self._device)) + self._outside


class LiveMeter:
    """Peak of live CPU tensors, under a cap that it enforces.

    Following every operator costs time, so only the first two steps are followed: the second one
    finds the optimizer's state in place, and later ones take no more (shorter texts take less).
    """

    def __init__(
        self, cap_bytes: int | None, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._cap, self._model, self._optimizer = cap_bytes, model, optimizer
        self._steps = 0
        self._peak = 0
        self._live: LiveMemory | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Follow one optimizer step, if it can hold the peak."""
        self._steps += 1
        if self._steps > 2:
            yield
            return
        with LiveMemory(cap_bytes=self._cap).baseline(self._model) as live:
            for state in self._optimizer.state.values():
                live.count(value for value in state.values() if isinstance(value, Tensor))
            self._live = live
            try:
                yield
            finally:
                self._live = None
                self._peak = max(self._peak, live.peak)

    def see(self, inputs: Mapping[str, Tensor]) -> None:
        """Count a batch that exists before the step that uses it."""
        if self._live is not None:
            self._live.count(inputs.values())

    def peak(self) -> int:
        """Largest bytes so far."""
        return self._peak


def meter_of(
    device: torch.device,
    cap_bytes: int | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group_size: int = 1,
) -> CudaMeter | LiveMeter:
    """The meter of a training device, alone or in a group, under a cap in bytes (None = none)."""
    if device.type == "cuda":
        return CudaMeter(device, cap_bytes, group_size)
    return LiveMeter(cap_bytes, model, optimizer)
