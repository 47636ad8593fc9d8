"""What a client keeps between messages: the task and the frozen base, and files of its own."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankfit.adapters.threads import limit_process
from rankfit.client.data_parallel import Group
from rankfit.client.device import OwnMemory
from rankfit.client.memory_meter import own_memory
from rankfit.client.policy import Kept, Policy, everything, kept_folder
from rankfit.configs.faults import Faulty
from rankfit.configs.learning import QUANTIZED
from rankfit.configs.settings import RunSettings
from rankfit.tasks import load_task
from rankfit.tasks.base_model import fingerprint, load_base, lower_base, shared_heads, whole_modules
from rankfit.tasks.partition import alike, partition_of
from rankfit.tasks.task import Task

#: Rounds kept: a resumed run can go back behind those that its last checkpoint lacks.
KEPT = 3
_NAME = re.compile(r"round-(\d+)\.safetensors")


@dataclass(frozen=True)
class ClientStore:
    """Tensors of one client and one kind: its heads, or its optimizer's moments.

    Parameters
    ----------
    folder : Path
        Made when the first tensors are kept.
    run : str
        Identity of the run: tensors of others are not seen, and go when new ones are kept (empty =
        those of any run are seen).
    """

    folder: Path
    run: str = ""

    @classmethod
    def of(
        cls,
        settings: RunSettings,
        kind: Kept,
        partition: int | None,
        data_path: str | None,
        run: str = "",
    ) -> "ClientStore":
        """The store of the client that holds a partition, or a folder of its own."""
        name = "node" if partition is None else f"partition-{partition}"
        if data_path is not None:
            place = str(Path(data_path).expanduser().absolute())
            name += "-" + hashlib.sha256(place.encode()).hexdigest()[:12]
        return cls(kept_folder(settings, kind) / name, run)

    def load(self, before: int) -> dict[str, Tensor] | None:
        """The newest tensors of a round below ``before``; None if there are none."""
        rounds = [n for n in self._rounds() if n < before and self._own(n)]
        return load_file(self._file(max(rounds))) if rounds else None

    def save(self, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a round; later ones belong to rounds that are trained anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{server_round}.partial"
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, partial, metadata={"run": self.run})
        os.replace(partial, self._file(server_round))
        rounds = self._rounds()
        earlier = [number for number in rounds if number <= server_round and self._own(number)]
        for number in rounds:
            if number not in earlier[-KEPT:]:
                self._file(number).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(item.name) for item in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def _own(self, server_round: int) -> bool:
        if not self.run:
            return True
        with safe_open(self._file(server_round), "pt") as file:
            return (file.metadata() or {}).get("run") == self.run

    def _file(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:05d}.safetensors"


log = logging.getLogger(__name__)


class WrongBase(Faulty, RuntimeError):
    """The base model of this client is not the one that the server plans for."""

    code = "model-differs"


@dataclass
class Workspace:
    """Task, base model and device of one process.

    Parameters
    ----------
    settings : RunSettings
        The run.
    data_path : str or None
        The node's own data folder, where it has one.
    policy : Policy
        What the node allows.
    group : Group
        The processes that train together.
    """

    settings: RunSettings
    data_path: str | None
    policy: Policy = field(default_factory=everything)
    group: Group = field(default_factory=Group.alone)
    _partitions: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)
    #: The base by its precision. One lies on the training device, the others on the host.
    _bases: dict[str, PreTrainedModel] = field(default_factory=dict)
    _placed: str = ""
    #: Whether trainings are held to the memory that was planned; not after one that needed more.
    keeps_to_plan: bool = True

    @cached_property
    def task(self) -> Task:
        """The task, its data encoded."""
        return load_task(
            self.settings,
            data_path=self.data_path,
            access=self.policy.access(self.data_path),
        )

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base model on the training device, as the run configures it."""
        return self.base_at(self._own)

    def base_at(self, precision: str) -> PreTrainedModel:
        """The frozen base model on the training device, in the precision of a plan.

        It is made from the base as the run configures it, which waits on the host then: a device
        that is planned lower need not hold that one.
        """
        if precision == self._placed:
            return self._bases[precision]
        self.park()
        began = time.monotonic()
        base = self._load(precision)
        if precision not in QUANTIZED:  # such a one lies where it was loaded, and cannot be moved
            base = cast(PreTrainedModel, base.to(self.device))
        self._placed = precision
        log.info(
            "base model %s loaded in %s, on %s, in %.2f s",
            self.settings.model.source, precision, self.device, time.monotonic() - began,
        )  # fmt: skip
        return base

    def _load(self, precision: str) -> PreTrainedModel:
        """The base in a precision, wherever it lies; made on first use."""
        if precision not in self._bases:
            settings = self.settings
            model = settings.model.at(precision)
            if precision == self._own or precision in QUANTIZED:
                at = settings.model_copy(update={"model": model})
                base = load_base(at, self.task.labels, self.task.output_names)
                self.task.check_model(base)
            else:
                base = lower_base(self._load(self._own), settings.task.kind, model.precision)
            self._bases[precision] = base
        return self._bases[precision]

    @property
    def _own(self) -> str:
        return self.settings.model.base_precision

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.group.device

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Modules that are trained whole and travel."""
        return shared_heads(self._load(self._own), self.settings.head)

    @cached_property
    def own_heads(self) -> tuple[str, ...]:
        """Modules that are trained whole and stay with the client."""
        local = self.settings.head.mode == "local"
        return whole_modules(self._load(self._own), self.settings.head) if local else ()

    def head_store(self, partition_id: int | None, run: str) -> ClientStore | None:
        """Where a client's own heads of a run are; None where it has none."""
        if self.settings.head.mode != "local":
            return None
        return ClientStore.of(self.settings, "heads", partition_id, self.data_path, run)

    def moment_store(self, partition_id: int | None, run: str) -> ClientStore | None:
        """Where a client's moments of a run are; None where each round begins with new ones."""
        if self.settings.train.moments == "reset":
            return None
        return ClientStore.of(self.settings, "moments", partition_id, self.data_path, run)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the base model as the run configures it, whatever precision is planned here."""
        return fingerprint(self._load(self._own), heads=self.heads)

    def load(self) -> None:
        """Load base and data now instead of on first use."""
        log.info("%d training samples, base %s", len(self.task.train), self.fingerprint[:12])
        if not self.settings.plan.precisions:  # else the plan says which base is to come
            self.base_at(self._own)

    def park(self) -> None:
        """Move the base to host memory, so that another can have the device's."""
        placed, self._placed = self._placed, ""
        if not placed or self.device.type == "cpu":
            return
        if placed not in QUANTIZED:
            self._bases[placed].to("cpu")
        elif placed != self._own:
            del self._bases[placed]  # it cannot be moved, but made anew
        else:
            self._placed = placed

    def open_device(self) -> None:
        """Make the CUDA context now, where there is a GPU."""
        if self.device.type == "cuda":
            torch.empty(1, device=self.device)

    def free(self) -> None:
        """Give the allocator's unused memory back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def own_memory(self) -> OwnMemory:
        """What this process holds of the GPU."""
        return own_memory(self.device)

    def check_base(self, expected: str) -> None:
        """Refuse to train on another base than the server's.

        Raises
        ------
        WrongBase
            If the fingerprints differ.
        NotAllowed
            If the node's policy does not name it.
        """
        self.policy.check_fingerprint(self.fingerprint)
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
def workspace(settings: RunSettings, data_path: str | None, policy: Policy) -> Workspace:
    """Return the workspace of this process for a run; another run replaces it."""
    limit_process(settings.train.threads)
    return Workspace(settings, data_path, policy)
