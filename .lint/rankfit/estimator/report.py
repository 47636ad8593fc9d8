"""The device report: what a client says of itself. Free of torch and of Flower."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

Accelerator = Literal["cuda", "cpu"]
Source = Literal["nvml", "cuda", "ram", "declared"]


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

    def __post_init__(self) -> None:
        if self.total_bytes <= 0 or not 0 <= self.free_bytes <= self.total_bytes:
            raise ValueError(
                f"client {self.client!r} reports free {self.free_bytes} of {self.total_bytes} "
                "bytes; expected 0 <= free <= total and total above 0"
            )
        if self.group_size < 1:
            raise ValueError(f"client {self.client!r} reports {self.group_size} processes")
        if self.upload_mbps < 0 or self.download_mbps < 0:
            raise ValueError(
                f"client {self.client!r} reports a link of {self.upload_mbps} up, "
                f"{self.download_mbps} down Mbps; expected figures >= 0"
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
        """Inverse of :meth:`to_dict`.

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
            values[field.name] = (
                float(value) if field.type is float and isinstance(value, int) else value
            )
            if not isinstance(
                values[field.name], field.type if isinstance(field.type, type) else str
            ):
                raise ValueError(f"device report: {key} is {value!r}, expected {field.type}")
        if values["accelerator"] not in ("cuda", "cpu"):
            raise ValueError(f"device report: accelerator {values['accelerator']!r}")
        if values["source"] not in ("nvml", "cuda", "ram", "declared"):
            raise ValueError(f"device report: source {values['source']!r}")
        return cls(**values)  # type: ignore[arg-type]
