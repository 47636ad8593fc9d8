"""The GPU that CUDA would use, found and measured through NVML: no torch, no CUDA context.

NVML does not know ``CUDA_VISIBLE_DEVICES`` and numbers the GPUs in PCI order, so the visible device
is worked out here by CUDA's rules and then named by UUID.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from rankfit.client.host import Memory
from rankfit.configs.settings import NodeConfigError

_INDEX = re.compile(r"[+-]?[0-9]+")

#: Errors that mean "this driver does not answer this question", not "the GPU is unusable".
_UNANSWERED = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_InvalidArgument,
    pynvml.NVMLError_ArgumentVersionMismatch,
    pynvml.NVMLError_NoPermission,
)

#: What to do about the errors that a person can mend.
_REMEDIES: dict[type[Exception], str] = {
    pynvml.NVMLError_LibraryNotFound: "install the NVIDIA driver, or start the container with GPUs",
    pynvml.NVMLError_DriverNotLoaded: "load the NVIDIA kernel module",
    pynvml.NVMLError_NoPermission: "give this user access to /dev/nvidia*",
    pynvml.NVMLError_GpuIsLost: "reset the GPU or restart the machine",
    pynvml.NVMLError_ResetRequired: "reset the GPU or restart the machine",
    pynvml.NVMLError_LibRmVersionMismatch: "restart the machine after the driver's update",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU or MIG slice.

    Attributes
    ----------
    name, uuid, compute_capability : str
        As NVML gives them; "" for a compute capability that is not known.
    memory : Memory or None
        None where the GPU shares the host's memory (Jetson, GB10) and NVML has no figure.
    processes : int
        Compute processes on it but this one (−1 = not known).
    """

    name: str
    uuid: str
    compute_capability: str
    memory: Memory | None
    processes: int


@dataclass(frozen=True)
class NoGpu:
    """There is no GPU to train on, and why."""

    reason: str


@dataclass(frozen=True)
class _Listed:
    """A GPU by its NVML index: its handle, or the error that hides it."""

    uuid: str
    handle: Any
    kind: tuple[object, ...]
    error: str = ""


def find_gpu(environment: Mapping[str, str], process: int) -> Gpu | NoGpu:
    """Measure the first device that CUDA would show a process of this environment.

    Parameters
    ----------
    environment : Mapping[str, str]
        Read for ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.
    process : int
        Process id that is not counted among the others.

    Raises
    ------
    ValueError
        If GPUs differ and only CUDA's own order, which NVML does not tell, says which comes first.
        No state of driver or GPU raises: it makes a :class:`NoGpu`.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NoGpu(_explain(error))
    try:
        return _find(environment, process)
    except pynvml.NVMLError as error:
        return NoGpu(_explain(error))
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def find_gpus(
    environment: Mapping[str, str], process: int, count: int | None = None
) -> list[Gpu] | NoGpu:
    """Measure the first ``count`` whole GPUs that CUDA would show, or all; see :func:`find_gpu`."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NoGpu(_explain(error))
    try:
        uuids = [_list(index).uuid for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return NoGpu(_explain(error))
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    first = find_gpu(environment, process)  # refuses what only CUDA's order decides
    order = visible_devices(environment.get("CUDA_VISIBLE_DEVICES"), uuids)
    if isinstance(first, NoGpu) or len(order) < (count or 1):
        reason = first.reason if isinstance(first, NoGpu) else f"{len(order)} GPUs are visible"
        return NoGpu(reason)
    found = []
    for index in order[:count]:
        name = index if isinstance(index, str) else uuids[index]
        gpu = find_gpu({"CUDA_VISIBLE_DEVICES": name}, process)
        if isinstance(gpu, NoGpu):
            return gpu
        found.append(gpu)
    return found


def process_bytes(uuid: str, process: int) -> int | None:
    """Bytes of a GPU or MIG slice that a process holds; None where NVML does not tell.

    It does not in a container that has process ids of its own, and on WSL.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = _running(handle) or ()
        return next((i.usedGpuMemory for i in found if i.pid == process and i.usedGpuMemory), None)
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible_devices(text: str | None, uuids: Sequence[str]) -> tuple[int | str, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves visible, in CUDA's order.

    An entry that is no device (``-1``, an index out of range, a prefix of no or of several UUIDs)
    hides itself and all that follow; a device named twice hides all. Indices are read as
    ``strtoul`` does (``"1abc"`` is 1). Source: CUDA programming guide, environment variables.

    Parameters
    ----------
    text : str or None
        The variable's value, None if it is not set.
    uuids : Sequence[str]
        UUIDs of the GPUs in NVML's order.

    Returns
    -------
    tuple of int or str
        NVML indices of GPUs, and ``MIG-…`` UUIDs as they were written.
    """
    if text is None:
        return tuple(range(len(uuids)))
    entries = [entry.strip() for entry in text.split(",")]
    found: list[int | str] = []
    if entries[0].startswith(("GPU-", "MIG-")):
        kind = entries[0][:4]
        for entry in entries:
            if not entry.startswith(kind):
                break
            if entry in found:
                return ()
            found.append(entry)
        return tuple(found) if kind == "MIG-" else _by_prefix([str(item) for item in found], uuids)
    for entry in entries:
        match = _INDEX.match(entry)
        index = int(match.group()) if match else -1
        if index < 0:
            break
        if index in found:
            return ()
        found.append(index)
    inside = [index in range(len(uuids)) for index in found]
    return tuple(found[: inside.index(False)] if False in inside else found)


def _by_prefix(prefixes: Sequence[str], uuids: Sequence[str]) -> tuple[int, ...]:
    """Index of the one UUID that starts with each prefix, up to the first that has none."""
    found: list[int] = []
    for prefix in prefixes:
        matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(prefix)]
        if len(matches) != 1:
            break
        if matches[0] in found:
            return ()
        found.append(matches[0])
    return tuple(found)


def _find(environment: Mapping[str, str], process: int) -> Gpu | NoGpu:
    """Apply the visibility, then MIG, then measure; NVML is initialised."""
    gpus = [_list(index) for index in range(pynvml.nvmlDeviceGetCount())]
    if not gpus:
        return NoGpu("no GPU: the driver sees none")
    text = environment.get("CUDA_VISIBLE_DEVICES")
    order = visible_devices(text, [gpu.uuid for gpu in gpus])
    if not order:
        return NoGpu(f"no GPU: CUDA_VISIBLE_DEVICES={text!r} leaves none of {len(gpus)} visible")
    if isinstance(order[0], str):
        return _measure_named_slice(order[0], process)
    by_uuid = text is not None and text.strip().startswith("GPU-")
    if not by_uuid and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        _refuse_unlike(text, gpus)
    visible = [gpus[index] for index in order if isinstance(index, int)]
    if visible[0].error:
        return NoGpu(f"{visible[0].error} ({visible[0].uuid or f'index {order[0]}'})")
    # CUDA shows no whole GPU beside a MIG slice, and only one slice (MIG user guide).
    usable = [gpu for gpu in visible if not gpu.error]
    slices = [_slices(gpu.handle) for gpu in usable]
    for gpu, found in zip(usable, slices, strict=True):
        if found:
            return _measure(found[0], gpu.handle, process)
    for gpu, found in zip(usable, slices, strict=True):
        if found is None:
            return _measure(gpu.handle, gpu.handle, process)
    return NoGpu(
        f"no GPU: MIG mode is on for {visible[0].uuid} and it has no instance; make one with "
        "nvidia-smi mig -cgi … -C, or switch MIG off"
    )


def _list(index: int) -> _Listed:
    """List one GPU; one that is lost keeps its index, because CUDA counts it too."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _ask(_memory, handle, default=None)  # MIG hides the whole GPU's figures
        kind = (
            _ask(pynvml.nvmlDeviceGetName, handle, default=""),
            _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle, default=()),
            memory.total_bytes if memory else 0,
        )
        return _Listed(pynvml.nvmlDeviceGetUUID(handle), handle, kind)
    except pynvml.NVMLError as error:
        return _Listed("", None, (), _explain(error))


def _refuse_unlike(text: str | None, gpus: Sequence[_Listed]) -> None:
    """Raise if CUDA's default order, fastest first, may differ from NVML's and would matter."""
    readable = [gpu for gpu in gpus if not gpu.error]
    if len({gpu.kind for gpu in readable}) > 1:
        names = ", ".join(f"{gpu.kind[0]} {gpu.uuid}" for gpu in readable)
        shown = "not set" if text is None else repr(text)
        raise NodeConfigError(
            f"CUDA_VISIBLE_DEVICES is {shown} on a machine whose GPUs differ ({names}): CUDA "
            "numbers them fastest first, which NVML does not tell; expected a GPU's UUID in "
            "CUDA_VISIBLE_DEVICES, or CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _slices(handle: Any) -> list[Any] | None:
    """Handles of the MIG slices of a GPU; None if MIG is off or unknown to it."""
    current, _ = _ask(pynvml.nvmlDeviceGetMigMode, handle, default=[0, 0])
    if not current:
        return None
    count = _ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle, default=0)
    handles = []
    for index in range(count):
        with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return handles


def _measure_named_slice(uuid: str, process: int) -> Gpu | NoGpu:
    """Measure the slice of a ``MIG-…`` UUID through its own handle."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
        return NoGpu(
            f"no GPU: CUDA_VISIBLE_DEVICES={uuid!r} names no MIG slice here; nvidia-smi -L"
        )
    parent = _ask(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle, default=handle)
    return _measure(handle, parent, process)


def _measure(handle: Any, parent: Any, process: int) -> Gpu:
    """Read a device; what a slice does not answer about its chip, its parent does."""
    chip = _ask(pynvml.nvmlDeviceGetName, parent, default="NVIDIA GPU")
    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle, default=None) or _ask(
        pynvml.nvmlDeviceGetCudaComputeCapability, parent, default=()
    )
    return Gpu(
        name=_ask(pynvml.nvmlDeviceGetName, handle, default=chip),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        compute_capability=".".join(str(part) for part in capability),
        memory=_memory(handle),
        processes=_processes(handle, process),
    )


def _memory(handle: Any) -> Memory | None:
    """Read v2 figures, v1 on drivers before 510 (no ``reserved``), None for unified memory."""
    try:
        figures = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        reserved = int(figures.reserved)
    except _UNANSWERED:
        try:
            figures, reserved = pynvml.nvmlDeviceGetMemoryInfo(handle), 0
        except pynvml.NVMLError_NotSupported:
            return None
    if figures.total == 0:
        return None
    return Memory(int(figures.total), min(int(figures.free), int(figures.total)), reserved)


def _processes(handle: Any, process: int) -> int:
    """Count the other compute processes (−1 = not known)."""
    found = _running(handle)
    return -1 if found is None else sum(int(item.pid) != process for item in found)


def _running(handle: Any) -> Sequence[Any] | None:
    """Compute processes on a device; v3 came with driver 510, v2 with 450 (same struct)."""
    found: Sequence[Any] | None
    found = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle, default=None)
    if found is None:
        found = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, handle, default=None)
    return found


def _ask(function: Callable[[Any], Any], handle: Any, *, default: Any) -> Any:
    """Answer of the driver, or ``default`` where it does not answer this question."""
    try:
        return function(handle)
    except _UNANSWERED:
        return default


def _explain(error: Exception) -> str:
    """Reason for a table: NVML's words and what to do."""
    remedy = _REMEDIES.get(type(error))
    return f"no GPU: NVML says {str(error)!r}" + (f"; {remedy}" if remedy else "")
