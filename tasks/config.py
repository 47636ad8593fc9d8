"""What a base model's own config says: its classes, its longest text, its padding.

A run has words of its own for each of them, from the data, the settings and the tokenizer. They are
compared before anything is trained, and the one that is right is used by all.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from rankfit.configs import settings as config_settings
from rankfit.configs.settings import RunSettings
from rankfit.tasks import font_vit
from rankfit.tasks.model_sources import ModelError, Source, read_config_file, resolve_source

log = logging.getLogger(__name__)

#: What transformers calls the classes of a model that names none.
_UNNAMED = re.compile(r"LABEL_\d+")
#: Keys of configs for the tokens that a model has positions for.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
)
#: Models that number positions from their padding token: a text begins at pad_token_id + 1, and a
#: table of ``max_position_embeddings`` rows holds that many fewer tokens.
_FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def read_config(model: config_settings.Model) -> PreTrainedConfig:
    """Read a model's config as its source has it.

    Raises
    ------
    ModelError
        If the source cannot be found or read.
    """
    source = resolve_source(model.source)
    try:
        if source.kind == "builtin":
            return AutoConfig.for_model(**font_vit.load()[0])
        if source.kind == "config":
            written = read_config_file(Path(source.location))
            return _with_names(AutoConfig.for_model(**written), written)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.source {model.source!r}: {error}") from error
    try:
        config = AutoConfig.from_pretrained(source.location, **hub_arguments(model))
        written, _ = PreTrainedConfig.get_config_dict(source.location, revision=model.revision)
        return _with_names(config, written)
    except (OSError, ValueError) as error:
        raise unreachable(model, source, error) from error


def _with_names(config: PreTrainedConfig, written: Mapping[str, Any]) -> PreTrainedConfig:
    """Take classes from ``label2id`` where the file has that alone: transformers drops it then."""
    numbers = written.get("label2id")
    if numbers and not written.get("id2label"):
        config.id2label = {int(number): str(name) for name, number in numbers.items()}
        config.label2id = {str(name): int(number) for name, number in numbers.items()}
    return config


def hub_arguments(model: config_settings.Model) -> dict[str, Any]:
    """What ``from_pretrained`` takes beside the place."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def unreachable(model: config_settings.Model, source: Source, error: Exception) -> ModelError:
    """The error for a source that cannot be read."""
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    if source.kind == "folder":
        return ModelError(f"model.source {model.source!r} cannot be read: {first_line}")
    return ModelError(
        f"model.source {model.source!r} (revision {model.revision!r}) is neither a folder here nor "
        "a model that can be had from the hub: check the id and the connection, fetch it once with "
        f"`hf download {model.source}`, or give a local folder. {first_line}"
    )


def own_classes(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names that a model gives its classes, by id; () where it gives none."""
    forward = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    named = any(not _UNNAMED.fullmatch(name) for name in forward.values())
    if not named or sorted(forward) != list(range(len(forward))):
        return ()
    return tuple(forward[i] for i in range(len(forward)))


def number_classes(
    names: Sequence[str], own: Sequence[str], settings: RunSettings
) -> tuple[str, ...]:
    """Names of a run's classes by the model's output: the data's, numbered as the model does.

    Where the model has all of the data's classes, by name whatever the case, its own numbers and
    names hold, and its head fits. Plain numbers are the model's ids where there are as many as it
    has outputs. Otherwise the data's own names hold, and the head is a new one.

    Parameters
    ----------
    names : sequence of str
        The data's classes by its ids.
    own : sequence of str
        The model's (:func:`own_classes`).

    Raises
    ------
    ModelError
        If the head is frozen, but knows other classes.
    """
    if not own:
        return tuple(names)
    if places(names, own) is not None:
        log.info("the model names the data's classes: its ids are used (%s)", _shown(own))
        return tuple(own)
    if settings.head.mode == "frozen" and not settings.head.modules:
        raise ModelError(
            f"head.mode frozen: the head of {settings.model.source} is for {_shown(own)}, the data "
            f"has {_shown(names)}: set head.mode=trained for a new head, or data.class-names to "
            "the model's own names in the order of the data's ids"
        )
    log.warning(
        "the model's head is for %s, the data has %s: the head is a new one",
        _shown(own), _shown(names),
    )  # fmt: skip
    return tuple(names)


def places(names: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """The model's id of each class of the data; None where it does not have them all."""
    if names and list(names) == [str(i) for i in range(len(own))]:
        return list(range(len(own)))  # numbers in the data are ids
    for plain in (str, _plain):
        by_name = {plain(name): number for number, name in enumerate(own)}
        found = [by_name.get(plain(name), -1) for name in names]
        if len(by_name) == len(own) and len(set(found)) == len(names) and -1 not in found:
            return found
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" … ({len(names)} classes)" if len(names) > 5 else "")


def counts_from_padding(config: PreTrainedConfig) -> bool:
    """Whether a model's positions are numbered from its padding token, as RoBERTa's are."""
    return config.model_type in _FROM_PADDING


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None if its positions have no end."""
    text = config.get_text_config()
    values = text.to_dict()
    # T5's files carry an n_positions that the model never had; code from the hub declares nothing.
    library = type(text).__module__.startswith("transformers.")
    declared = {field.name for field in fields(text)} if library else values
    lengths = [values.get(key) for key in _LENGTHS if key in declared]
    found = [length for length in lengths if isinstance(length, int) and length > 0]
    if not found:
        return None
    return min(found) - (int(values.get("pad_token_id") or 0) + 1) * counts_from_padding(text)
