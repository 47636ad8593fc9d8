"""Measuring the memory of training steps, and keeping to a declared budget."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankfit.client.device import OwnMemory
from rankfit.client.nvml import process_bytes
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.recording import LiveMemory

#: What NVML counts for a process is a multiple of it.
_GRAIN = 2 * 2**20


def own_memory(device: torch.device) -> OwnMemory:
    """What this process holds of a GPU, and how much of it outside of torch's allocator."""
    if device.type != "cuda":
        return OwnMemory(os.getpid(), 0)
    reserved = torch.cuda.memory_reserved(device)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    held = process_bytes(uuid, os.getpid())
    if held is None or held < reserved:
        return OwnMemory(os.getpid(), reserved)
    context = -(-(held - reserved) // _GRAIN) * _GRAIN
    return OwnMemory(os.getpid(), held, context)


def outside_bytes(device: torch.device, group_size: int = 1) -> int:
    """What this process takes of a GPU outside of torch's allocator: measured, or assumed."""
    known = own_memory(device).context_bytes
    return known if known >= 0 else Calibration.cuda(group_size=group_size).outside


@contextmanager
def allocator_limit(device: torch.device, most: int | None, later: int | None) -> Iterator[None]:
    """Keep torch's allocator on a GPU within so many bytes, and afterwards within others.

    At its limit the allocator gives back the segments that hold nothing, and only then raises
    ``OutOfMemoryError``: what texts of many lengths leave unused does not pile up.

    Parameters
    ----------
    most, later : int or None
        Bytes that it may reserve, within and after (None = all of the GPU).
    """
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory

    def limit(allowed: int | None) -> None:
        share = 1.0 if allowed is None else min(1.0, max(allowed, 0) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)

    # What an earlier client of this process left in the cache is not this one's.
    torch.cuda.empty_cache()
    limit(most)
    try:
        yield
    finally:
        limit(later)


class CudaMeter:
    """Peak of device memory of the process: what decides out of memory.

    That is what the caching allocator reserves, and what is outside of it.

    Parameters
    ----------
    outside_bytes : int
        What the plan expects outside of the allocator; NVML's figure takes its place.
    """

    def __init__(self, device: torch.device, outside_bytes: int) -> None:
        self._device, self._outside = device, outside_bytes
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do nothing: the allocator counts all the time."""
        yield

    def see(self, inputs: Mapping[str, Tensor]) -> None:
        """Do nothing: see :meth:`step`."""

    def peak(self) -> int:
        """Largest bytes so far; outside of the allocator what NVML counts now, if it tells."""
        outside = own_memory(self._device).context_bytes
        return int(torch.cuda.max_memory_reserved(self._device)) + (
            self._outside if outside < 0 else outside
        )


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
    outside_bytes: int = 0,
) -> CudaMeter | LiveMeter:
    """The meter of a training device; on the CPU it enforces a cap in bytes (None = none)."""
    if device.type == "cuda":
        return CudaMeter(device, outside_bytes)
    return LiveMeter(cap_bytes, model, optimizer)
