"""The device report: what this client has to train with. Answers without torch and Flower."""

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rankfit.client.accelerate_config import DataParallel
from rankfit.client.host import Memory, host_memory, processor_name
from rankfit.client.nvml import Gpu, NoGpu, find_gpu, find_gpus
from rankfit.configs.settings import Fleet, NodeConfigError, RunSettings, Scalar, split_numbers
from rankfit.estimator.device_report import Accelerator, DeviceReport, Source

MIB = 2**20


@dataclass(frozen=True)
class OwnMemory:
    """What a process of this client's own holds of the GPU, in bytes.

    Attributes
    ----------
    gpu_bytes : int
        In all: it is free for this client.
    context_bytes : int
        Outside of torch's allocator (−1 = not known).
    """

    pid: int
    gpu_bytes: int
    context_bytes: int = -1


@dataclass(frozen=True)
class Placement:
    """Where a simulation may put a client.

    Attributes
    ----------
    share : float
        Part of a GPU that each client has; from 1, the whole.
    visible : str or None
        ``CUDA_VISIBLE_DEVICES`` of the simulation: any of its GPUs may be a client's next one.
    """

    share: float
    visible: str | None


@dataclass(frozen=True)
class _Device:
    """The physical device: what it is, its memory, and where that was read."""

    accelerator: Accelerator
    name: str
    uuid: str
    compute_capability: str
    memory: Memory
    processes: int
    source: Source
    note: str


@dataclass(frozen=True)
class _Profile:
    """Declared figures; memory in MiB (None = measured), links in Mbps (0 = not known)."""

    memory_mib: float | None
    upload_mbps: float
    download_mbps: float


def device_report(
    node_config: Mapping[str, Scalar],
    settings: RunSettings,
    *,
    node_id: int,
    samples: int = -1,
    worker: OwnMemory | None = None,
    group: DataParallel | None = None,
    placement: Placement | None = None,
    most_bytes: int | None = None,
) -> DeviceReport:
    """Measure this client's device, or take what its node config or the fleet declares.

    The node config's ``memory-mib``, ``upload-mbps``, ``download-mbps`` and ``client-name`` come
    first; then, for a node that has a ``partition-id``, the profile that ``fleet.*`` deals to that
    partition; then what NVML and the host say. docs/devices.md tells the rules in full.

    Parameters
    ----------
    node_config : Mapping[str, str or int or float or bool]
        Of this SuperNode, or ``partition-id`` and ``num-partitions`` in a simulation.
    settings : RunSettings
        Read for ``fleet``.
    node_id : int
        Flower's id of the node: the name's suffix where nothing lasting tells nodes apart.
    samples : int
        Training samples held (−1 = not counted).
    worker : OwnMemory or None
        The process that keeps this client's model on the GPU: what it holds is free for it.
    group : DataParallel or None
        Where several GPUs train for this client; a declared memory is then that of each.
    placement : Placement or None
        In a simulation with GPUs: the report then holds for each that the client may be put on.
    most_bytes : int or None
        What the node's policy allows; a larger declaration counts as this.

    Raises
    ------
    ValueError
        For a declared figure that is not a number above 0, a bad ``partition-id`` or
        ``client-name``, GPUs between which only CUDA's own order decides, or fewer GPUs than a
        group asks for. The absence or the failure of the one GPU never raises: it is reported as a
        CPU with the reason in ``note``.
    """
    profile = _declared(node_config, settings.fleet)
    if most_bytes is not None:
        most = most_bytes / MIB
        profile = replace(profile, memory_mib=min(profile.memory_mib or most, most))
    own = worker or OwnMemory(os.getpid(), 0)
    if group and group.size > 1:
        device = _of_group(own, group)
    else:
        device = _placed(own, placement) if placement else _physical(own)
    memory, source, note = _budget(device, profile.memory_mib)
    return DeviceReport(
        client=_client_name(node_config, device.uuid, node_id),
        accelerator=device.accelerator,
        name=device.name,
        uuid=device.uuid,
        compute_capability=device.compute_capability,
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        reserved_bytes=memory.reserved_bytes,
        processes=device.processes,
        source=source,
        note=note,
        upload_mbps=profile.upload_mbps,
        download_mbps=profile.download_mbps,
        samples=samples,
        group_size=group.size if group else 1,
        context_bytes=-1 if group and group.size > 1 else own.context_bytes,
    )


def _of_group(own: OwnMemory, group: DataParallel) -> _Device:
    """The tightest of a group's GPUs with the UUIDs of all; on the CPU, a share of the memory."""
    if group.cpu:
        has = host_memory()
        each = Memory(has.total_bytes // group.size, has.free_bytes // group.size)
        note = f"the memory of one of {group.size} processes"
        return _Device("cpu", processor_name(), "", "", each, -1, "ram", note)
    environment = dict(os.environ)
    if group.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = group.gpus
    gpus = find_gpus(environment, own.pid, group.size)
    if isinstance(gpus, NoGpu):
        raise NodeConfigError(f"accelerate-config asks for {group.size} GPUs: {gpus.reason}")
    devices = [_of_gpu(gpu, own.gpu_bytes) for gpu in gpus]
    tightest = min(devices, key=lambda device: device.memory.free_bytes)
    return replace(tightest, uuid=",".join(device.uuid for device in devices))


def _physical(own: OwnMemory) -> _Device:
    """Read the device under a process of this client's, whatever is declared."""
    gpu = find_gpu(os.environ, own.pid)
    if isinstance(gpu, NoGpu):
        return _Device("cpu", processor_name(), "", "", host_memory(), -1, "ram", gpu.reason)
    return _of_gpu(gpu, own.gpu_bytes)


def _placed(own: OwnMemory, placement: Placement) -> _Device:
    """The GPU under this process, with the memory and capability that all of them can give.

    What is free is read of this one alone: of the others, their own clients hold a part.
    """
    here = _physical(own)
    if here.accelerator == "cpu":
        return here
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if placement.visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = placement.visible
    found = find_gpus(environment, own.pid)
    others = [] if isinstance(found, NoGpu) else [_of_gpu(gpu, 0) for gpu in found]
    usable = min(d.memory.total_bytes - d.memory.reserved_bytes for d in (here, *others))
    capability = min(
        (d.compute_capability for d in (here, *others)),
        key=lambda text: [int(part) for part in text.split(".") if part],
    )
    here = replace(here, compute_capability=capability)
    if placement.share >= 1 and usable == here.memory.total_bytes - here.memory.reserved_bytes:
        return here
    each = int(usable * min(placement.share, 1.0))
    note = f"{placement.share:g} of the smallest of {max(len(others), 1)} GPUs of the simulation"
    return replace(
        here,
        memory=Memory(each, min(each, here.memory.free_bytes)),
        source="declared",
        note=note,
    )


def _of_gpu(gpu: Gpu, own_bytes: int) -> _Device:
    memory, source, note = _gpu_memory(gpu, own_bytes)
    return _Device(
        "cuda", gpu.name, gpu.uuid, gpu.compute_capability, memory, gpu.processes, source, note
    )


def _gpu_memory(gpu: Gpu, own_bytes: int) -> tuple[Memory, Source, str]:
    """NVML's figures, or the host's for a GPU that shares its memory."""
    if gpu.memory is not None:
        free = min(gpu.memory.free_bytes + own_bytes, gpu.memory.total_bytes)
        return replace(gpu.memory, free_bytes=free), "nvml", ""
    return host_memory(), "ram", "unified memory: NVML has no figures, the host's RAM is counted"


def _budget(device: _Device, declared_mib: float | None) -> tuple[Memory, Source, str]:
    """Memory to report: measured, or declared but never more than the device has.

    A GPU's limit is what is free; RAM's is its size, because page cache makes what is free differ
    from one second to the next and two simulations of one config must make the same plans.
    """
    if declared_mib is None:
        return device.memory, device.source, device.note
    declared = max(round(declared_mib * MIB), 1)
    has = device.memory
    if device.accelerator == "cuda":
        limit = max(min(has.total_bytes - has.reserved_bytes, has.free_bytes), 0)
    else:
        limit = has.total_bytes
    notes = [f"declared {declared_mib:g} MiB"]
    if declared > limit:
        notes.append(f"capped to the {limit // MIB} MiB that the device has")
    if device.note:
        notes.append(device.note)
    memory = Memory(min(declared, has.total_bytes), min(declared, limit))
    return memory, "declared", "; ".join(notes)


def _declared(node_config: Mapping[str, Scalar], fleet: Fleet) -> _Profile:
    """Declared figures: the node config's, else the item of the fleet's lists for its partition."""
    partition = partition_of_node(node_config)
    dealt = {
        "memory-mib": _dealt(fleet.memory_mib, partition, "fleet.memory-mib"),
        "upload-mbps": _dealt(fleet.upload_mbps, partition, "fleet.upload-mbps"),
        "download-mbps": _dealt(fleet.download_mbps, partition, "fleet.download-mbps"),
    }
    figures = {
        key: _figure(key, node_config[key]) if key in node_config else value
        for key, value in dealt.items()
    }
    return _Profile(
        memory_mib=figures["memory-mib"],
        upload_mbps=figures["upload-mbps"] or 0.0,
        download_mbps=figures["download-mbps"] or 0.0,
    )


def _dealt(text: str, partition: int | None, key: str) -> float | None:
    """Item ``partition`` modulo the length of a comma list; None without a list or a partition."""
    numbers = split_numbers(text, key)
    return numbers[partition % len(numbers)] if numbers and partition is not None else None


def _figure(key: str, value: Scalar) -> float:
    """Check one declared figure."""
    if isinstance(value, str | bool) or not math.isfinite(value) or value <= 0:
        raise NodeConfigError(
            f"node config {key}={value!r}: expected a number above 0; write for instance "
            f"--node-config '{key}=4096', without quotes around the number, or leave it out"
        )
    return float(value)


def partition_of_node(node_config: Mapping[str, Scalar]) -> int | None:
    """Partition of this node, None if it has none."""
    value = node_config.get("partition-id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NodeConfigError(
            f"node config partition-id={value!r}: expected a whole number from 0; write for "
            "instance --node-config 'partition-id=0 num-partitions=2'"
        )
    return value


def _client_name(node_config: Mapping[str, Scalar], uuid: str, node_id: int) -> str:
    """Name that outlives a restart.

    ``client-name``, ``partition-N``, host and GPU, in this order. A host without a GPU may run
    several nodes and has nothing else to tell them by than Flower's node id, which lasts only with
    SuperNode authentication.
    """
    if "client-name" in node_config:
        name = node_config["client-name"]
        if not isinstance(name, str) or not name.strip():
            raise NodeConfigError(
                f"node config client-name={name!r}: expected text; write for instance "
                "--node-config 'client-name=\"berlin-1\"'"
            )
        return name.strip()
    partition = partition_of_node(node_config)
    if partition is not None:
        return f"partition-{partition}"
    return f"{socket.gethostname()}-{uuid or node_id}"
