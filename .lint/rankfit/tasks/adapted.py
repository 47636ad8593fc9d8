"""Between an adapter as a value and a PEFT model that holds one."""

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankfit.adapters.state import Adapter
from rankfit.configs.settings import ConfigError
from rankfit.tasks.inject import TRAINED
from rankfit.tasks.targets import weight_shape

#: Label of a token that no loss is taken over.
IGNORED = -100


def target_shapes(
    model: PreTrainedModel, targets: Iterable[str], rank: int
) -> dict[str, tuple[int, int]]:
    """Shape (d, k) of each weight to adapt.

    Raises
    ------
    ConfigError
        If ``rank`` is above the smaller side of one: a product cannot have that rank.
    """
    shapes = {}
    for name in targets:
        d, k = weight_shape(model.get_submodule(name))
        if rank > min(d, k):
            raise ConfigError(
                f"lora.rank {rank} is above the rank that {name} ({d} × {k}) can have; set it to "
                f"at most {min(d, k)}, or leave the module out of lora.targets"
            )
        shapes[name] = (d, k)
    return shapes


def head_tensors(model: PreTrainedModel, heads: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the head's tensors in float32, by their name in the base model."""
    return {
        f"{head}.{name}": tensor.detach().float().clone()
        for head in heads
        for name, tensor in model.get_submodule(head).state_dict().items()
    }


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


def learnt(labels: Tensor) -> int:
    """Count the labels that a batch's mean loss is taken over: tokens, or samples of shape (b,).

    The first token of a row is predicted from nothing, and no loss is taken over it.
    """
    if labels.dim() == 2:
        return int((labels[:, 1:] != IGNORED).sum())
    return len(labels)


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
