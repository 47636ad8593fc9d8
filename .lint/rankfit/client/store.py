"""What a client keeps to itself, in files: it outlives messages, processes and stops.

Tensors are kept by the round in which they were made, so that a run which resumes goes on from what
the client had then; and with the run's identity, so that another run of the same name does not.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfit.configs.settings import RunSettings

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
        kind: Literal["heads", "moments"],
        partition: int | None,
        data_path: str | None,
        run: str = "",
    ) -> "ClientStore":
        """The store of the client that holds a partition, or a folder of its own."""
        root = Path(settings.run.directory).expanduser() / settings.run.name / kind
        if kind == "heads" and settings.head.directory:
            root = Path(settings.head.directory).expanduser()
        name = "node" if partition is None else f"partition-{partition}"
        if data_path is not None:
            place = str(Path(data_path).expanduser().absolute())
            name += "-" + hashlib.sha256(place.encode()).hexdigest()[:12]
        return cls(root / name, run)

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
