"""The tokenizer of a base model, and its padding token."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from rankfit.configs import settings as config_settings
from rankfit.tasks.sources import ModelError, Source, resolve_source

#: Models whose first positions are taken: position 0 of a text is number pad_token_id + 1.
_OFFSET_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")


def load_tokenizer(model: config_settings.Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source; a missing padding token becomes the end-of-text token.

    Raises
    ------
    ModelError
        If the source has no tokenizer, or that has neither token.
    """
    source = resolve_source(model.source)
    if source.kind not in ("folder", "hub"):
        raise ModelError(
            f"model.source {model.source!r} has no tokenizer; text needs a local folder, a "
            "package or a hub id"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source.location, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"model.source {model.source!r}: its tokenizer cannot be loaded: {first_line}"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model.source {model.source!r}: its tokenizer has neither a padding nor an "
                "end-of-text token; save it with a pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_token_id(model: config_settings.Model, source: Source, config: PreTrainedConfig) -> int:
    """Padding token of a model whose config names none.

    A decoder with a classification head reads the last token that is not padding, so this must be
    the tokenizer's own.
    """
    if source.kind in ("folder", "hub"):
        return int(load_tokenizer(model).pad_token_id)
    end = config.eos_token_id
    return int(end[0] if isinstance(end, list) else end or 0)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model has positions for; None if its positions have no end."""
    values = config.to_dict()
    positions = values.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return positions - int(values.get("pad_token_id") or 0) - 1
    return positions
