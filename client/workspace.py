"""What a client process keeps between messages: the task, its partitions and the frozen base.

A simulation serves many clients from one process, and all of them share it; an adapter is put into
the base for one training and taken out again, and nothing of one client is left for the next.
"""

import logging
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rankfit.client.group import Group
from rankfit.client.heads import HeadStore
from rankfit.configs.settings import RunSettings
from rankfit.tasks.catalogue import load_task
from rankfit.tasks.models import fingerprint, load_base, shared_heads, whole_modules
from rankfit.tasks.partition import alike, partition_of
from rankfit.tasks.task import Task

log = logging.getLogger(__name__)


class WrongBase(RuntimeError):
    """The base model of this client is not the one that the server plans for."""


@dataclass
class Workspace:
    """Task, base model and device of one process.

    Parameters
    ----------
    settings : RunSettings
        The run.
    data_path : str or None
        The node's own data folder, where it has one.
    group : Group
        The processes that train together.
    """

    settings: RunSettings
    data_path: str | None
    group: Group = field(default_factory=Group.alone)
    _partitions: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)

    @cached_property
    def task(self) -> Task:
        """The task, its data encoded."""
        return load_task(self.settings, data_path=self.data_path)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The frozen base model on the training device."""
        began = time.monotonic()
        base = load_base(self.settings, self.task.labels)
        if not self._quantized:  # such a one lies where it was loaded, and cannot be moved
            base = cast(PreTrainedModel, base.to(self.device))
        log.info(
            "base model %s loaded on %s in %.2f s",
            self.settings.model.source, self.device, time.monotonic() - began,
        )  # fmt: skip
        return base

    @property
    def _quantized(self) -> bool:
        return self.settings.model.quantization != "none"

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.group.device

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Modules that are trained whole and travel."""
        return shared_heads(self.base, self.settings.head)

    @cached_property
    def own_heads(self) -> tuple[str, ...]:
        """Modules that are trained whole and stay with the client."""
        local = self.settings.head.mode == "local"
        return whole_modules(self.base, self.settings.head) if local else ()

    def head_store(self, partition_id: int | None) -> HeadStore | None:
        """Where a client's own heads are; None where it has none."""
        if self.settings.head.mode != "local":
            return None
        return HeadStore.of(self.settings, partition_id, self.data_path)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the base model."""
        return fingerprint(self.base, heads=self.heads)

    def load(self) -> None:
        """Load base and data now instead of on first use."""
        log.info("%d training samples, base %s", len(self.task.train), self.fingerprint[:12])

    def park(self) -> None:
        """Move the base to host memory, so that another process can have the device's."""
        if "base" in self.__dict__ and self.device.type != "cpu" and not self._quantized:
            self.base.to("cpu")

    def unpark(self) -> None:
        """Bring the base back to the training device."""
        if "base" in self.__dict__ and not self._quantized:
            self.base.to(self.device)

    def open_device(self) -> None:
        """Make the CUDA context now, where there is a GPU."""
        if self.device.type == "cuda":
            torch.empty(1, device=self.device)

    def free(self) -> int:
        """Give the allocator's unused memory back; returns the bytes of the GPU that it keeps."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def check_base(self, expected: str) -> None:
        """Refuse to train on another base than the server's.

        Raises
        ------
        WrongBase
            If the fingerprints differ.
        """
        if self.fingerprint != expected:
            raise WrongBase(
                f"the base model {self.settings.model.source!r} of this client (fingerprint "
                f"{self.fingerprint[:12]}) is not the server's ({expected[:12]}): install the same "
                "weights, and the same versions of transformers, on both"
            )

    def samples(self, partition_id: int | None, partitions: int) -> NDArray[np.int64]:
        """Indices into the training split that belong to this client.

        Parameters
        ----------
        partition_id : int or None
            Position among the clients that share the data set; None = the node owns all of it.
        partitions : int
            Number of those clients.
        """
        if partition_id is None or self.settings.partition.kind == "local":
            return np.arange(len(self.task.train))
        if partitions not in self._partitions:
            self._partitions[partitions] = partition_of(
                self.task.train.examples, self.settings, partitions
            )
        return self._partitions[partitions][partition_id]

    def test_samples(self, partition_id: int | None, partitions: int) -> NDArray[np.int64]:
        """Indices into the test split that this client measures on: all of its own, or a share.

        The share is like the others', or, as ``partition.test`` says, like its training part.
        """
        everything = np.arange(len(self.task.test))
        if partition_id is None or self.settings.partition.kind == "local":
            return everything
        if self.settings.partition.test == "alike":
            self.samples(partition_id, partitions)
            parts = self._partitions[partitions]
            return alike(self.task.train.labels, parts, self.task.test.labels)[partition_id]
        return everything[partition_id::partitions]


@lru_cache(maxsize=1)
def workspace(settings: RunSettings, data_path: str | None) -> Workspace:
    """Return the workspace of this process for a run; another run replaces it."""
    torch.set_num_threads(settings.train.threads)
    return Workspace(settings, data_path)
