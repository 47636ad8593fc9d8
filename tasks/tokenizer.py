"""The tokenizer of a base model, compared with the model: padding, vocabulary, length."""

import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from rankfit.configs import settings as config_settings
from rankfit.configs.settings import RunSettings
from rankfit.tasks.config import counts_from_padding, longest_text, read_config
from rankfit.tasks.model_sources import ModelError, resolve_source

log = logging.getLogger(__name__)


def load_tokenizer(model: config_settings.Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source; it pads with the token that the model is told of.

    Raises
    ------
    ModelError
        If the source has no tokenizer, or none that can pad.
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
    padding = _padding(model, tokenizer, read_config(model))
    if tokenizer.pad_token_id != padding:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def _padding(model: config_settings.Model, tokenizer: Any, config: PreTrainedConfig) -> int:
    """The one padding token of tokenizer and model.

    A classifier on a decoder reads the last token that is not padding, so the two must agree: on
    the tokenizer's, which is what batches hold. A model whose positions are numbered from its
    padding token was trained with that one. Where neither has any, a text's end pads.
    """
    own, values = tokenizer.pad_token_id, config.get_text_config().to_dict()
    declared = values.get("pad_token_id")
    if counts_from_padding(config) and declared != own and _has(tokenizer, declared):
        log.warning(
            "%s: the tokenizer pads as the model counts, with id %d", model.source, declared
        )
        return int(declared)
    if own is not None:
        return int(own)
    # A word, or the token of unknown words, may end a text: it would be taken for padding. GPT-2
    # has one token for both, and no word is unknown to it.
    special = {*tokenizer.all_special_ids}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special -= {tokenizer.unk_token_id}
    ends = values.get("eos_token_id")
    for token in (declared, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])):
        if token in special:
            return int(token)
    raise ModelError(
        f"model.source {model.source!r}: its tokenizer has neither a padding nor an end-of-text "
        "token; save it with a pad_token"
    )


def _has(tokenizer: Any, token: int | None) -> bool:
    return token is not None and 0 <= token < len(tokenizer)


def settle_padding(model: config_settings.Model, config: PreTrainedConfig) -> None:
    """Tell a model's config which token pads: the tokenizer's, if it has one.

    Raises
    ------
    ModelError
        As :func:`load_tokenizer`.
    """
    text = config.get_text_config()
    values = text.to_dict()
    declared = values.get("pad_token_id")
    if resolve_source(model.source).kind in ("folder", "hub"):
        padding = int(load_tokenizer(model).pad_token_id)
        if declared not in (None, padding):
            log.warning(
                "%s: its config pads with id %s, its tokenizer with id %d: the tokenizer's is "
                "used by both", model.source, declared, padding,
            )  # fmt: skip
        text.pad_token_id = padding
    elif "pad_token_id" in values and declared is None:
        end = values.get("eos_token_id")
        text.pad_token_id = int(end[0] if isinstance(end, list) else end or 0)


def check_text(settings: RunSettings, tokenizer: Any) -> None:
    """Refuse tokens that the model has no embedding for, and texts longer than its positions.

    Raises
    ------
    ModelError
        One line that says which, and what to set.
    """
    model = settings.model
    config = read_config(model)
    rows = config.get_text_config().to_dict().get("vocab_size")
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=lambda token: int(vocabulary[token]))
    if isinstance(rows, int) and vocabulary[last] >= rows:
        raise ModelError(
            f"model.source {model.source!r}: its tokenizer has the token {last!r} with id "
            f"{vocabulary[last]}, but the model has embeddings for {rows} tokens alone (ids 0 … "
            f"{rows - 1}): save the model after model.resize_token_embeddings(len(tokenizer)), or "
            "with the tokenizer that it was trained with"
        )
    limit, wanted = longest_text(config), settings.data.max_length
    if limit is not None and wanted > limit:
        raise ModelError(
            f"data.max-length {wanted}: {model.source} takes at most {limit} tokens; set "
            f"data.max-length={limit} or less"
        )
    written = settings.task.max_new_tokens
    if limit is not None and settings.task.kind == "causal-lm" and written >= limit:
        raise ModelError(
            f"task.max-new-tokens {written}: with a prompt that is more than the {limit} tokens "
            f"that {model.source} takes"
        )
