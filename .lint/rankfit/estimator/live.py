"""Bytes of tensors that are alive, counted op by op: one notion for estimates and for measurements.

The tracer runs it over meta tensors and gets an estimate; the client's trainer runs it over real
CPU tensors and gets the peak of the same quantity, or runs out of a declared budget like a device.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALL_DEVICES = frozenset({"cpu", "meta", "cuda"})


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which every tensor storage is counted from its allocation to its release.

    A storage counts once whatever the number of its views, with its bytes as asked for (no
    rounding). What an operator allocates and releases inside its kernel is not seen. Tensors that
    exist before the context is entered count from :meth:`count` or :meth:`baseline`.

    Parameters
    ----------
    cap_bytes : int, optional
        Budget of a simulated device: an operator that takes the live bytes above it raises
        ``torch.OutOfMemoryError``. None = no budget.
    devices : frozenset of str
        Device types whose storages are counted.

    Attributes
    ----------
    current, peak : int
        Live bytes now, and at most since the start or the last :meth:`reset_peak`.

    Examples
    --------
    >>> with LiveMemory(cap_bytes=256 * 2**20).baseline(model) as live:
    ...     model(**batch).loss.backward()
    >>> live.peak
    """

    def __init__(
        self, *, cap_bytes: int | None = None, devices: frozenset[str] = ALL_DEVICES
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if cap_bytes is not None and cap_bytes <= 0:
            raise ValueError(f"cap_bytes is {cap_bytes}; expected bytes above 0, or None")
        self.cap_bytes = cap_bytes
        self.devices = devices
        self.current = 0
        self.peak = 0
        #: Storage identity → weak reference whose callback reports the release.
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def baseline(self, model: torch.nn.Module) -> Self:
        """Count what a model already holds: parameters, buffers and gradients."""
        self.count(model.parameters())
        self.count(model.buffers())
        return self.count(p.grad for p in model.parameters() if p.grad is not None)

    def count(self, tensors: Iterable[torch.Tensor]) -> Self:
        """Count tensors that exist already, a batch for instance; counted ones are skipped."""
        for tensor in tensors:
            self._see(tensor)
        return self

    def reset_peak(self) -> None:
        """Forget the peak: it starts again at the bytes live now."""
        self.peak = self.current

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see_all(result)
        if self.cap_bytes is not None and self.current > self.cap_bytes:
            raise torch.OutOfMemoryError(
                f"{func} took the live tensors to {self.current} bytes; this device is declared "
                f"to have {self.cap_bytes}"
            )
        return result

    def allocated(self, storage: int, tensor: torch.Tensor, nbytes: int) -> None:
        """Note a new storage; subclasses extend it to record."""
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def released(self, storage: int, nbytes: int) -> None:
        """Note the end of a storage; subclasses extend it to record."""
        self.current -= nbytes

    def _see_all(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for item in result:
                self._see_all(item)

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type not in self.devices:
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._live:
            return
        nbytes = storage.nbytes()

        def forget(_: object) -> None:
            del self._live[identity]
            self.released(identity, nbytes)

        self._live[identity] = weakref.ref(storage, forget)
        self.allocated(identity, tensor, nbytes)
