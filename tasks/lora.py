"""LoRA in a base model: adapters in at the exact ranks of a plan, their state, and out again."""

import gc
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankfit.adapters import names
from rankfit.adapters.adapter import Adapter
from rankfit.tasks.model_sources import ModelError
from rankfit.tasks.packing import IGNORED
from rankfit.tasks.targets import is_linear
from rankfit.tasks.task import Split

#: The adapter that is trained, and the frozen second one.
TRAINED, REMAINDER = "default", "remainder"


def inject(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    *,
    scale: float,
    dropout: float,
    heads: Sequence[str],
    remainder_ranks: Mapping[str, int] | None = None,
) -> PeftModel:
    """Put LoRA adapters into a frozen base model, in place.

    Factors are float32 whatever the base is. Only the adapter ``default`` and the heads require
    grad. Works on a model on the meta device too. The first factors are drawn from torch's global
    random state, B = 0.

    Parameters
    ----------
    model
        The base model, as :func:`rankfit.tasks.base_model.load_base` gives it.
    ranks
        Rank per full module name; a module that is absent or has rank 0 is not adapted.
    scale
        Multiplier of B·A, the same for every module whatever its rank.
    dropout
        Of the trained adapter's input; the remainder has none.
    heads
        Modules trained whole beside the adapters (float32 copies); empty = head frozen.
    remainder_ranks
        Ranks of a frozen second adapter, ``remainder``, added to the first in the forward pass.

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
    remainder = _positive(model, remainder_ranks or {})
    on_meta = model.device.type == "meta"
    # PEFT would make the factors on the CPU and then skip the move to meta.
    with torch.device("meta") if on_meta else nullcontext(), warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        peft_model = get_peft_model(
            model, _lora_config(trained, scale, dropout, heads), adapter_name=TRAINED
        )
        if remainder:
            peft_model.add_adapter(REMAINDER, _lora_config(remainder, scale, 0.0, ()))
            peft_model.base_model.set_adapter([TRAINED, REMAINDER])
    _check(model, TRAINED, trained)
    _check(model, REMAINDER, remainder)
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


def load_adapter(model: PeftModel, adapter: Adapter, name: str = TRAINED) -> None:
    """Copy an adapter into the PEFT adapter of that name, exactly.

    Raises
    ------
    ValueError
        If a tensor has no place, has another shape, or a place stays empty: PEFT itself only warns.
    """
    state = adapter.state_dict()
    own = read_state(model, name)
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))
        raise ValueError(f"adapter {name!r} and the model differ in {len(odd)} names: {odd[:3]}")
    for key, tensor in state.items():
        if own[key].shape != tensor.shape:
            raise ValueError(f"{key} is {tuple(tensor.shape)}, the model's {tuple(own[key].shape)}")
    result: Any = set_peft_model_state_dict(model, state, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"PEFT did not take {result.unexpected_keys[:3]}")


def read_state(model: PeftModel, name: str = TRAINED) -> dict[str, Tensor]:
    """Tensors of a PEFT adapter under PEFT's names."""
    # save_embedding_layers: PEFT's "auto" asks the hub whether the vocabulary has grown.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return state


def train_only(model: PeftModel, factor: str) -> None:
    """Freeze the other factor of the trained adapter; the head stays as it is.

    Parameters
    ----------
    factor : {"a", "b"}
        The factor that moves.
    """
    frozen = {"a": "lora_B", "b": "lora_A"}[factor]
    for name, parameter in model.named_parameters():
        if f".{frozen}.{TRAINED}." in name:
            parameter.requires_grad_(False)


def place(batch: Mapping[str, Tensor], model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Move a batch to a device; floating inputs take the number type of the model's base."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        name: tensor.to(device, dtype)
        if tensor.is_floating_point() and name != "labels"
        else tensor.to(device)
        for name, tensor in batch.items()
    }


def count_targets(labels: Tensor) -> int:
    """Count the labels that a batch's mean loss is taken over: tokens, or samples of shape (b,).

    The first token of a row is predicted from nothing, and no loss is taken over it.
    """
    if labels.dim() == 2:
        return int((labels[:, 1:] != IGNORED).sum())
    return len(labels)


def set_training(model: nn.Module) -> None:
    """Put a model into training mode, all but norms with running statistics (BatchNorm).

    Those stay as the base has them: they are no parameters of anybody's, clients of a simulation
    share them, and a batch of one has no variance.
    """
    model.train()
    for module in model.modules():
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            module.eval()


@contextmanager
def checkpointing(base: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Recompute activations of the base in the backward pass while the block lasts."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        # Newer transformers call it activation checkpointing and warn of the old name.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprec")
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_disable` is deprec")
            base.gradient_checkpointing_disable()


def training_device() -> torch.device:
    """The first visible GPU, by its index, or the CPU.

    torch accepts a GPU without an index in most places, but refuses it where memory is capped
    (``torch.cuda.set_per_process_memory_fraction``).
    """
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def free_cache() -> None:
    """Give back what an attempt that failed for memory has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Run a classifier over batches with ``labels``.

    Returns
    -------
    logits : Tensor
        (n, classes), float32, on the CPU.
    labels : Tensor
        (n,), int64, on the CPU.
    """
    was_training = model.training
    model.eval()
    logits, labels = [], []
    try:
        for batch in batches:
            inputs = place(batch, model, device)
            labels.append(inputs.pop("labels").cpu())
            logits.append(model(**inputs).logits.float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def chunks(indices: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    """Split a sequence into runs of ``size``; the last may be shorter."""
    return (indices[i : i + size] for i in range(0, len(indices), size))


def fisher_scores(
    model: PeftModel, split: Split, rows: NDArray[np.int64], device: torch.device
) -> dict[str, float]:
    """F of each adapted module: mean over samples, and over its factors' values, of g².

    g = ∂ log p(y|x)/∂θ, one sample at a time, over all samples given (the code published with
    HRALoRA squares the gradient of the logit, of the first batch's four samples only).

    Parameters
    ----------
    model : PeftModel
        With the adapter in it; factors that are frozen count as if they moved. Left as it was.
    rows : NDArray
        Samples of the split.
    """
    factors = _parameters(model)
    was_training = model.training
    model.eval()
    moved = {name: parameter.requires_grad for name, parameter in factors.items()}
    sums = dict.fromkeys(factors, 0.0)
    try:
        for parameter in factors.values():
            parameter.requires_grad_(True)
        for row in rows:
            batch = place(split.collate([row]), model, device)
            loss = model(**batch).loss * count_targets(
                batch["labels"]
            )  # −log p(y|x), up to a constant
            gradients = torch.autograd.grad(loss, list(factors.values()))
            for name, gradient in zip(factors, gradients, strict=True):
                sums[name] += float(gradient.double().square().sum())
    finally:
        for name, parameter in factors.items():
            parameter.requires_grad_(moved[name])
        model.train(was_training)
    totals: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, total in sums.items():
        module = names.parse(name)[0]
        totals[module] = totals.get(module, 0.0) + total
        sizes[module] = sizes.get(module, 0) + factors[name].numel()
    return {module: total / len(rows) / sizes[module] for module, total in totals.items()}


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Factors of the trained adapter under PEFT's saved names."""
    mark = f".{TRAINED}.weight"
    return {
        f"{name.removesuffix(mark)}.weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith((f".lora_A{mark}", f".lora_B{mark}"))
    }
