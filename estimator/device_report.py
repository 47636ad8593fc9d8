"""The device report: what a client says of itself. Free of torch and of Flower."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from rankfit.configs.protocol import one_line, shown

Accelerator = Literal["cuda", "cpu"]
Source = Literal["nvml", "cuda", "ram", "declared"]

#: Least and largest figures of a report that are believed.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "total_bytes": (1, 2**50),
    "free_bytes": (0, 2**50),
    "reserved_bytes": (0, 2**50),
    "processes": (-1, 10**6),
    "upload_mbps": (0, 10**7),
    "download_mbps": (0, 10**7),
    "samples": (-1, 10**12),
    "group_size": (1, 1024),
    "context_bytes": (-1, 2**33),
}
#: Characters that are kept of each of its texts.
LENGTHS: Mapping[str, int] = {
    "client": 64, "name": 96, "uuid": 64, "compute_capability": 8, "note": 200,
}  # fmt: skip
_CAPABILITY = re.compile(r"\d{1,3}\.\d{1,2}")


@dataclass(frozen=True)
class DeviceReport:
    """What one client has to train with.

    Attributes
    ----------
    client : str
        Name of the client, stable over restarts (never the Flower node id alone).
    accelerator : {"cuda", "cpu"}
        Where the training runs; decides which allocator the estimator replays.
    name : str
        Product name of the GPU, or of the processor.
    uuid : str
        ``GPU-…`` or ``MIG-…`` ("" without a GPU).
    compute_capability : str
        "9.0", … ("" without a GPU).
    total_bytes, free_bytes, reserved_bytes : int
        Device memory in bytes: physical, free now, held by the driver.
    processes : int
        Other processes on the device (−1 = not known).
    source : {"nvml", "cuda", "ram", "declared"}
        Where the memory figures were read.
    note : str
        Why the source is not NVML ("" when it is), for the table of plans.
    upload_mbps, download_mbps : float
        Link in megabits (10⁶) per second; 0 = not known, no bound.
    samples : int
        Training samples held (−1 = not counted).
    group_size : int
        Processes that share each batch, one for each GPU; memory is that of the tightest GPU.
    context_bytes : int
        What a process was measured to take of the GPU outside of torch's allocator (−1 = not yet).
    """

    client: str
    accelerator: Accelerator
    name: str
    uuid: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    processes: int
    source: Source
    note: str = ""
    upload_mbps: float = 0.0
    download_mbps: float = 0.0
    samples: int = -1
    group_size: int = 1
    context_bytes: int = -1

    def __post_init__(self) -> None:
        if self.total_bytes <= 0 or not 0 <= self.free_bytes <= self.total_bytes:
            raise ValueError(
                f"client {self.client!r} reports free {self.free_bytes} of {self.total_bytes} "
                "bytes; expected 0 <= free <= total and total above 0"
            )
        for key, (least, most) in BOUNDS.items():
            value = getattr(self, key)
            if not (math.isfinite(value) and least <= value <= most):
                raise ValueError(
                    f"client {self.client!r} reports {key.replace('_', '-')} {shown(value)}; "
                    f"expected {least:g} to {most:g}"
                )

    @property
    def budget_bytes(self) -> int:
        """Bytes a training process may take: min(total − reserved, free)."""
        return min(self.total_bytes - self.reserved_bytes, self.free_bytes)

    def to_dict(self) -> dict[str, str | int | float]:
        """Flat record with kebab-case keys, as it travels in the message."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> "DeviceReport":
        """Inverse of :meth:`to_dict`, with texts cleaned by :func:`one_line`.

        Raises
        ------
        ValueError
            If a field is missing, of another type, or out of range.
        """
        values: dict[str, object] = {}
        for field in fields(cls):
            key = field.name.replace("_", "-")
            if key not in record:
                raise ValueError(f"device report lacks {key!r}")
            value = record[key]
            if field.name in BOUNDS:
                kinds = (int, float) if field.type is float else (int,)
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise ValueError(f"device report: {key} is {shown(value)}, expected a number")
                least, most = BOUNDS[field.name]
                if not least <= value <= most:  # before a conversion: 10**400 is no float
                    raise ValueError(
                        f"device report: {key} is {shown(value)}, expected {least:g} to {most:g}"
                    )
                values[field.name] = float(value) if field.type is float else value
            elif not isinstance(value, str):
                raise ValueError(f"device report: {key} is {shown(value)}, expected text")
            else:
                values[field.name] = one_line(value, LENGTHS.get(field.name, 16))
        if values["accelerator"] not in ("cuda", "cpu"):
            raise ValueError(f"device report: accelerator {values['accelerator']!r}")
        if values["source"] not in ("nvml", "cuda", "ram", "declared"):
            raise ValueError(f"device report: source {values['source']!r}")
        capability = str(values["compute_capability"])
        if capability and not _CAPABILITY.fullmatch(capability):
            raise ValueError(f"device report: compute-capability {capability!r}, expected like 9.0")
        if not values["client"]:
            raise ValueError("device report: the client has no name")
        return cls(**values)  # type: ignore[arg-type]
