"""The base model: its config, its frozen weights, quantisation, and its fingerprint."""

import copy
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as hf_logging

from rankfit.configs import settings as config_settings
from rankfit.configs.learning import Precision
from rankfit.configs.settings import Model
from rankfit.tasks import font_vit
from rankfit.tasks.config import hub_arguments, own_classes, read_config, unreachable
from rankfit.tasks.kronecker import wrap
from rankfit.tasks.model_sources import ModelError, Source, resolve_source
from rankfit.tasks.targets import (
    NEW_MODULES,
    head_modules,
    shared_heads,
    target_modules,
    whole_modules,
)
from rankfit.tasks.tokenizer import settle_padding


def check_quantizable(model: Model, source: str) -> None:
    """Refuse to quantise a base whose source has no weights to read: ``builtin:``, ``config:``.

    Raises
    ------
    ModelError
        If it has none.
    """
    if model.quantization != "none" and source not in ("folder", "hub"):
        raise ModelError(
            f"model.quantization {model.quantization!r}: {model.source!r} is not a folder or hub "
            "id with weights"
        )


def quantization(model: Model, source: str, kept: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for ``model.quantization``; {} = as the weights are.

    nf4 is 4-bit NormalFloat with double quantisation (QLoRA, arXiv:2305.14314), nf4-single without;
    int8 is LLM.int8() (arXiv:2208.07339). What is computed is in ``model.precision``. Modules named
    in ``kept`` stay as they are; None = the output layer and tied ones, as transformers has it.

    Raises
    ------
    ModelError
        If bitsandbytes is not installed, or the source has no weights to quantise.
    """
    if model.quantization == "none":
        return {}
    check_quantizable(model, source)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {model.quantization!r} needs bitsandbytes: pip install "
            "'rankfit[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[model.precision]
    skipped = None if kept is None else list(kept)  # to transformers [] means that none is kept
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=model.quantization == "nf4",
            bnb_4bit_compute_dtype=kind,
            llm_int8_skip_modules=skipped,
        )
        if model.quantization != "int8"
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    )
    # The current one: each process of a client with several GPUs has its own.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


log = logging.getLogger(__name__)

__all__ = [
    "ModelError",
    "build_empty",
    "fingerprint",
    "head_modules",
    "load_base",
    "load_config",
    "lower_base",
    "resolve_source",
    "shared_heads",
    "target_modules",
    "whole_modules",
]

Kind = Literal["image-classification", "text-classification", "causal-lm", "seq2seq-lm"]
Problem = Literal["classification", "regression"]

_AUTO = {
    "image-classification": AutoModelForImageClassification,
    "text-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: What of a config changes the result without showing in a parameter's name or shape.
_ESSENTIALS = (
    "model_type",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "head_dim",
    "hidden_act",
    "hidden_dropout_prob",
    "layer_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)
_SPREAD = 64  # values read from each frozen tensor by the fingerprint


def load_config(
    model: config_settings.Model,
    *,
    labels: int,
    problem: Problem = "classification",
    names: Sequence[str] = (),
) -> PreTrainedConfig:
    """Read a model's config and set it up for ``labels`` outputs: classes, or one number.

    Parameters
    ----------
    names : sequence of str
        Of the outputs, where they are known.

    Raises
    ------
    ModelError
        If the source cannot be found or read, or there are fewer than two classes.
    """
    if labels < 2 and problem == "classification":
        raise ModelError(f"a classifier needs at least 2 classes, got {labels}")
    config = read_config(model)
    config.num_labels = labels
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if problem == "regression" else "single_label_classification"
    # Keys and values are of use to generation alone, which asks for them itself.
    if "use_cache" in config.to_dict():
        config.use_cache = False
    # The auto classes take the first class of the architecture, not e.g. DeiT "WithTeacher".
    config.architectures = []
    config._attn_implementation = model.attention
    return config


def build_empty(
    config: PreTrainedConfig, kind: Kind, *, attention: str, precision: Precision
) -> PreTrainedModel:
    """Build a model on the meta device: shapes and modules, no weights; frozen, in train mode.

    Raises
    ------
    ModelError
        If the architecture has no such classifier or no such attention.
    """
    config = copy.deepcopy(config)
    config.architectures = []
    if kind == "text-classification" and _lacks_padding(config):
        config.pad_token_id = 0  # any: it decides which position is read, no shape
    if kind == "seq2seq-lm" and config.to_dict().get("decoder_start_token_id") is None:
        config.decoder_start_token_id = 0  # any: it is written into the inputs, no shape
    try:
        with torch.device("meta"):
            model = _AUTO[kind].from_config(
                config, attn_implementation=attention, dtype=DTYPES[precision]
            )
    except (ValueError, ImportError) as error:
        raise _unbuildable(config, kind, attention, error) from error
    model.requires_grad_(False)
    return model.train()


def build_random(
    config: PreTrainedConfig, kind: Kind, model: config_settings.Model
) -> PreTrainedModel:
    """Build a model of random weights, from torch's global random state."""
    made: PreTrainedModel = _AUTO[kind].from_config(
        config, attn_implementation=model.attention, dtype=DTYPES[model.precision]
    )
    return made.eval()


def lower_base(base: PreTrainedModel, kind: Kind, precision: Precision) -> PreTrainedModel:
    """Copy a loaded base with every tensor in the type that a model of this precision keeps it in.

    The copy holds the very weights of the base, rounded: what is drawn at random or loaded anew in
    another precision need not.
    """
    attention = str(base.config._attn_implementation)
    empty = build_empty(base.config, kind, attention=attention, precision=precision)
    types = {name: tensor.dtype for name, tensor in _tensors(empty)}
    lowered = copy.deepcopy(base)
    for name, tensor in _tensors(lowered):
        tensor.data = tensor.data.to(types[name])
    lowered.config.dtype = DTYPES[precision]
    return lowered


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _lacks_padding(config: PreTrainedConfig) -> bool:
    return config.to_dict().get("pad_token_id", 0) is None


def _unbuildable(
    config: PreTrainedConfig, kind: str, attention: str, error: Exception
) -> ModelError:
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    return ModelError(
        f"a model of type {config.model_type!r} cannot be built for {kind} with "
        f"model.attention {attention!r} (try 'eager'): {first_line}"
    )


def load_base(
    settings: config_settings.RunSettings, labels: int, names: Sequence[str] = ()
) -> PreTrainedModel:
    """Load the frozen base model with a head of ``labels`` outputs, in evaluation mode.

    What the checkpoint lacks (the head, or everything for ``config:``) is drawn from
    ``settings.run.seed``; torch's global random state is left as it was. So is the head of a
    checkpoint that names other classes than ``names``.

    Raises
    ------
    ModelError
        If the model cannot be had, or its checkpoint lacks weights other than the head's.
    """
    model_settings, kind = settings.model, settings.task.kind
    source = resolve_source(model_settings.source)
    config = load_config(model_settings, labels=labels, problem=settings.task.problem, names=names)
    own = own_classes(read_config(model_settings))
    if kind in ("text-classification", "causal-lm"):
        settle_padding(model_settings, config)
    quantized: dict[str, Any] = {}
    if model_settings.quantization != "none":
        quantized = quantization(model_settings, source.kind, _never_quantized(settings, config))
    if source.kind == "hub":
        log.info(
            "model.source %r: no folder of that name here, so it is taken from the hub (%s)",
            model_settings.source, model_settings.revision,
        )  # fmt: skip
    with _seeded(settings.run.seed), _quiet():
        try:
            if source.kind == "config":
                model = build_random(config, kind, model_settings)
            else:
                model = _load_weights(model_settings, kind, source, config, quantized)
        except (ImportError, OSError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            if source.kind == "hub" or isinstance(error, OSError):
                raise unreachable(model_settings, source, error) from error
            raise _unbuildable(config, kind, model_settings.attention, error) from error
        if own and names and tuple(names) != own:
            _draw_heads(model)
        if settings.lora.form == "kronecker":
            wrap(model, target_modules(model, settings.lora.targets))
    model.requires_grad_(False)
    return model.eval()


def _never_quantized(
    settings: config_settings.RunSettings, config: PreTrainedConfig
) -> tuple[str, ...]:
    """Output layer and tied layers, as transformers has it, and heads: they are trained."""
    model = settings.model
    empty = build_empty(
        config, settings.task.kind, attention=model.attention, precision=model.precision
    )
    return (*get_keys_to_not_convert(empty), *whole_modules(empty, settings.head))


@torch.no_grad()
def _draw_heads(model: PreTrainedModel) -> None:
    """Draw the heads anew, as transformers draws one that a checkpoint lacks."""
    for name in head_modules(model):
        head = model.get_submodule(name)
        for part in (*head.modules(), *head.parameters()):
            part._is_hf_initialized = False
        head.apply(model._init_weights)


def _load_weights(
    model: config_settings.Model,
    kind: Kind,
    source: Source,
    config: PreTrainedConfig,
    quantized: dict[str, Any],
) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": DTYPES[model.precision],
        "attn_implementation": model.attention,
        "ignore_mismatched_sizes": True,  # a head of other classes; anything else is refused below
        "output_loading_info": True,
        **quantized,
    }
    if source.kind == "builtin":
        weights = font_vit.load()[1]
        empty = build_empty(config, kind, attention=model.attention, precision=model.precision)
        loaded, info = type(empty).from_pretrained(None, state_dict=weights, **arguments)
    else:
        arguments |= hub_arguments(model)
        loaded, info = _AUTO[kind].from_pretrained(source.location, **arguments)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    absent = {*info["missing_keys"], *mismatched}
    pooler = f"{loaded.base_model_prefix}.pooler"
    if absent and any(key.startswith(f"{pooler}.") for key in absent):
        setattr(loaded.config, NEW_MODULES, [pooler])
    heads = head_modules(loaded)
    lacking = sorted(key for key in absent if not key.startswith(tuple(f"{h}." for h in heads)))
    if new := [head for head in heads if any(key.startswith(f"{head}.") for key in absent)]:
        made = ", ".join(read_config(model).architectures or ["none"])
        log.info(
            "%s: the checkpoint (architecture %s) has no fitting %s: drawn from run.seed",
            model.source, made, " and ".join(new),
        )  # fmt: skip
    if lacking:
        raise ModelError(
            f"model.source {model.source!r}: the checkpoint lacks {len(lacking)} weights of "
            f"{type(loaded).__name__}, or has them in another shape: {', '.join(lacking[:4])} …; "
            "expected all but the head"
        )
    return loaded


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside, and give the global random state of the CPU back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and reporting the new head, which is expected here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def fingerprint(model: PreTrainedModel, *, heads: Sequence[str]) -> str:
    """Hash of a base model: two machines with the same one train the same frozen weights.

    sha256 over the config's essentials and, for each tensor, its name, shape, type and a spread of
    64 values; fast whatever the size. The trained ``heads`` are left out, a frozen head is in.
    """
    digest = hashlib.sha256()
    config: Mapping[str, Any] = model.config.to_dict()
    for key in _ESSENTIALS:
        digest.update(f"{key}={config.get(key)!r};".encode())
    trained = tuple(f"{name}." for name in heads)
    for name, tensor in model.state_dict().items():
        if trained and name.startswith(trained):
            continue
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        flat = tensor.reshape(-1)
        if flat.numel():
            where = torch.linspace(
                0, flat.numel() - 1, min(_SPREAD, flat.numel()), dtype=torch.float64
            )
            picked = flat[where.long().to(flat.device)].to(torch.float64).cpu()
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()
