"""Accelerate's configuration file of a machine with several GPUs: how many processes, on which.

The file is what ``accelerate config`` writes. It says how this machine trains; what is trained, and
in which precision, the run says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rankfit.configs.settings import NodeConfigError

#: Data parallelism, and none. What shards a model needs another memory model and other checkpoints.
_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU")


@dataclass(frozen=True)
class DataParallel:
    """Processes that train one client's batches together, each with the whole model.

    Attributes
    ----------
    size : int
        Number of processes, one for each GPU.
    gpus : str
        What ``CUDA_VISIBLE_DEVICES`` is to be; "" leaves it as it is.
    cpu : bool
        Train on the processor.
    """

    size: int = 1
    gpus: str = ""
    cpu: bool = False

    @classmethod
    def of_file(cls, path: Path, autocast: str) -> "DataParallel":
        """Read Accelerate's file (YAML or JSON).

        Parameters
        ----------
        autocast : str
            ``train.autocast`` of the run.

        Raises
        ------
        ValueError
            If the file cannot be read, asks for more than data parallelism on one machine, for
            another precision than the run's, or for a device of one process.
        """
        try:
            config = _Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise NodeConfigError(f"accelerate-config {path}: {error}") from error
        if config.distributed_type not in _KINDS:
            raise NodeConfigError(
                f"accelerate-config {path}: distributed_type {config.distributed_type} is not "
                f"supported; expected one of {', '.join(_KINDS)}"
            )
        if config.num_machines != 1:
            raise NodeConfigError(
                f"accelerate-config {path}: num_machines is {config.num_machines}; a client is one "
                "machine, start a SuperNode on each"
            )
        if config.mixed_precision not in ("no", autocast):
            raise NodeConfigError(
                f"accelerate-config {path}: mixed_precision is {config.mixed_precision!r}, but "
                f"train.autocast of the run is {autocast!r}, which plans were made for"
            )
        size = 1 if config.distributed_type == "NO" else config.num_processes
        gpus = "" if config.gpu_ids == "all" else config.gpu_ids
        cpu = config.use_cpu or config.distributed_type == "MULTI_CPU"
        if size == 1 and (gpus or cpu):
            raise NodeConfigError(
                f"accelerate-config {path}: of one process, gpu_ids and use_cpu are not read; set "
                "CUDA_VISIBLE_DEVICES for the SuperNode, and leave accelerate-config out"
            )
        return cls(size, gpus, cpu)


class _Config(BaseModel):
    """The fields of Accelerate's file that matter here; the others are Accelerate's affair."""

    model_config = ConfigDict(extra="ignore")

    distributed_type: str
    num_processes: int = Field(default=1, ge=1)
    num_machines: int = 1
    gpu_ids: str = "all"
    mixed_precision: str = "no"
    use_cpu: bool = False

    @field_validator("distributed_type", "mixed_precision", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """YAML reads an unquoted ``NO`` as false."""
        return {False: "NO", None: "no"}.get(value, value) if not isinstance(value, str) else value

    @field_validator("mixed_precision")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()

    @field_validator("gpu_ids", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return "all" if value is None else str(value)
