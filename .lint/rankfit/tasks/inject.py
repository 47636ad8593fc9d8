"""Adapters into a base model, at the exact ranks of a plan, and out of it without a trace."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from rankfit.tasks.sources import ModelError
from rankfit.tasks.targets import is_linear

#: The adapter that is trained, and the frozen second one.
TRAINED, TAIL = "default", "tail"


def inject(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    *,
    scale: float,
    dropout: float,
    heads: Sequence[str],
    tail_ranks: Mapping[str, int] | None = None,
) -> PeftModel:
    """Put LoRA adapters into a frozen base model, in place.

    Factors are float32 whatever the base is. Only the adapter ``default`` and the heads require
    grad. Works on a model on the meta device too. The first factors are drawn from torch's global
    random state, B = 0.

    Parameters
    ----------
    model
        The base model, as :func:`rankfit.tasks.models.load_base` gives it.
    ranks
        Rank per full module name; a module that is absent or has rank 0 is not adapted.
    scale
        Multiplier of B·A, the same for every module whatever its rank.
    dropout
        Of the trained adapter's input; the tail has none.
    heads
        Modules trained whole beside the adapters (float32 copies); empty = head frozen.
    tail_ranks
        Ranks of a frozen second adapter, ``tail``, added to the first in the forward pass.

    Raises
    ------
    ModelError
        If a name is not a module that can be adapted, or no rank is above 0.
    """
    trained = _positive(model, ranks)
    if not trained:
        raise ModelError(
            f"no module has a rank above 0 (got {dict(ranks)!r}); a client that cannot train rank "
            "1 must be left out of the round"
        )
    tail = _positive(model, tail_ranks or {})
    on_meta = model.device.type == "meta"
    # PEFT would make the factors on the CPU and then skip the move to meta.
    with torch.device("meta") if on_meta else nullcontext(), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        peft_model = get_peft_model(
            model, _lora_config(trained, scale, dropout, heads), adapter_name=TRAINED
        )
        if tail:
            peft_model.add_adapter(TAIL, _lora_config(tail, scale, 0.0, ()))
            peft_model.base_model.set_adapter([TRAINED, TAIL])
    _check(model, TRAINED, trained)
    _check(model, TAIL, tail)
    _check_heads(model, heads)
    _settle(model, scale)
    # On the wrapper: it goes with it, and the base stays as it was.
    peft_model.register_forward_pre_hook(_inputs_to(model.dtype), with_kwargs=True)
    return peft_model


def eject(peft_model: PeftModel) -> PreTrainedModel:
    """Take the adapters out and put the original head back.

    Returns the very base model that went into :func:`inject`, every tensor as it was: PEFT's
    ``unload`` would leave the trained head in it.
    """
    base: PreTrainedModel = peft_model.base_model.model
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    vars(base).pop("peft_config", None)
    base.requires_grad_(False)
    base.zero_grad(set_to_none=True)
    return base


def _positive(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks above 0, after a check that the modules exist and are Linear."""
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if not is_linear(modules.get(name)):
            raise ModelError(f"{name!r} is not a Linear module of {type(model).__name__}")
        if rank < 0:
            raise ModelError(f"rank of {name!r} is {rank}; expected 0 or more")
    return {name: rank for name, rank in ranks.items() if rank > 0}


def _lora_config(
    ranks: Mapping[str, int], scale: float, dropout: float, heads: Sequence[str]
) -> LoraConfig:
    """Build a config whose patterns match each module by its full name and nothing else.

    PEFT reads a pattern as a regular expression that may match the end of a name; these are
    escaped and anchored, one per distinct rank (one per module is quadratic in the modules).
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    by_rank: defaultdict[int, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        if rank != common:
            by_rank[rank].append(name)
    patterns = {f"^{_alternatives(names)}": rank for rank, names in by_rank.items()}
    return LoraConfig(
        r=common,
        lora_alpha=scale * common,
        lora_dropout=dropout,
        target_modules=_alternatives(list(ranks)),
        rank_pattern=patterns,
        alpha_pattern={pattern: scale * rank for pattern, rank in patterns.items()},
        modules_to_save=list(heads) or None,
    )


def _alternatives(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(re.escape(name) for name in names)})"


def _check(model: PreTrainedModel, adapter: str, expected: Mapping[str, int]) -> None:
    """Check that PEFT adapted exactly the modules asked for, at exactly their ranks."""
    found = {
        name: module.r[adapter]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ModelError(
            f"PEFT adapted other modules or ranks than asked for: {wrong[:6]}; the installed peft "
            "does not work with this model"
        )


def _check_heads(model: PreTrainedModel, heads: Sequence[str]) -> None:
    wrapped = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if sorted(wrapped) != sorted(heads):
        raise ModelError(f"PEFT wrapped {wrapped} for training, expected the heads {list(heads)}")


def _settle(model: PreTrainedModel, scale: float) -> None:
    """Set what PEFT leaves to rounding or to the base: scale, number type, what requires grad."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.scaling:
                module.scaling[adapter] = scale  # (scale * r) / r can differ in the last bit
                trained = adapter == TRAINED
                for factor in (module.lora_A[adapter], module.lora_B[adapter]):
                    factor.to(torch.float32).requires_grad_(trained)
        elif isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[TRAINED]
            head.to(torch.float32).requires_grad_(True)
            # What a bfloat16 base hands to its float32 head.
            head.register_forward_pre_hook(_inputs_to(torch.float32), with_kwargs=True)


Arguments = tuple[tuple[object, ...], dict[str, object]]


def _inputs_to(
    dtype: torch.dtype,
) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], Arguments]:
    """Make a hook that casts the float tensors among a module's inputs.

    Not every architecture does it itself: Swin hands float32 pixels to bfloat16 weights.
    """

    def cast(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        return value

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
        return (
            tuple(cast(value) for value in args),
            {key: cast(value) for key, value in kwargs.items()},
        )

    return hook
