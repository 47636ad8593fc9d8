"""What a trace cannot know: bytes that libraries and the driver take beside the tensors.

Every term has a value, a source and a setting of its own; nothing else in the estimate is fitted.
"""

import os
import re
from dataclasses import dataclass
from typing import Self

from rankfit.estimator.report import DeviceReport

MIB = 2**20


@dataclass(frozen=True)
class Term:
    """One calibration term: its value in bytes (or as a factor) and where it comes from."""

    name: str
    value: int
    source: str


#: The one table of values; :class:`Calibration` picks from it.
TERMS = {
    term.name: term
    for term in (
        Term(
            "cublas-workspace-sm90",
            32 * MIB,
            "fits HRALoRA's profiled DeiT-small on H100; torch's default for sm90; one for the "
            "forward and one for the backward thread",
        ),
        Term(
            "cublas-workspace",
            8_519_680,
            "torch's default CUBLAS_WORKSPACE_CONFIG :4096:2:16:8, one per thread",
        ),
        Term("attention-scratch", 1, "kernel sources of flash and efficient attention backward"),
        Term("cuda-context", 470 * MIB, "reports of 430 MB; until measured by NVML"),
        Term(
            "nccl-communicator",
            688 * MIB,
            "github.com/NVIDIA/nccl/issues/964: all-reduce of 4 A100s (544 of 2); a group's only",
        ),
    )
}


@dataclass(frozen=True)
class Calibration:
    """The terms for one device; ``dataclasses.replace`` overrides a term.

    Attributes
    ----------
    cublas_workspace : int
        Bytes of one cuBLAS workspace; the forward and the backward thread hold one each.
    attention_scratch : int
        Times the scratch bytes of attention's backward kernel (0 = leave it out).
    context : int
        Bytes of the CUDA context, outside the allocator.
    communicator : int
        Bytes that NCCL takes, outside the allocator, where several GPUs train together.
    """

    cublas_workspace: int = 0
    attention_scratch: int = 0
    context: int = 0
    communicator: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"calibration {name} is {value}; expected bytes of 0 or more")

    @classmethod
    def of(cls, report: DeviceReport) -> Self:
        """Terms for a device; a CPU has none. ``CUBLAS_WORKSPACE_CONFIG`` is honoured."""
        if report.accelerator == "cpu":
            return cls()
        return cls.cuda(report.compute_capability, report.group_size)

    @property
    def outside(self) -> int:
        """Bytes outside the allocator."""
        return self.context + self.communicator

    @classmethod
    def cuda(cls, compute_capability: str = "", group_size: int = 1) -> Self:
        """Terms for a GPU of a compute capability ("9.0"; "" = not known), alone or in a group."""
        sm90 = compute_capability.partition(".")[0] == "9"
        default = TERMS["cublas-workspace-sm90" if sm90 else "cublas-workspace"].value
        configured = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return cls(
            cublas_workspace=default if configured is None else workspace_bytes(configured),
            attention_scratch=TERMS["attention-scratch"].value,
            context=TERMS["cuda-context"].value,
            communicator=TERMS["nccl-communicator"].value if group_size > 1 else 0,
        )


def workspace_bytes(config: str) -> int:
    """Bytes of ``:SIZE:COUNT[:SIZE:COUNT…]``, sizes in KiB, as cuBLAS and torch read it.

    Raises
    ------
    ValueError
        If the text is not of that form.
    """
    if config == ":0:0":
        return 0
    if not re.fullmatch(r"(:\d+:\d+)+", config):
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG is {config!r}; expected :SIZE:COUNT pairs such as :4096:8"
        )
    numbers = [int(text) for text in config.split(":")[1:]]
    return sum(s * c * 1024 for s, c in zip(numbers[::2], numbers[1::2], strict=True))
