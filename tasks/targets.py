"""Which modules of a base model take an adapter, and which are its head."""

import re
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankfit.configs.settings import ConfigError, Head, split_list
from rankfit.tasks.kronecker import INNER, OUTER, wrapped
from rankfit.tasks.model_sources import ModelError

#: Names of the attention's query and value projections, in the order they are looked for. PEFT's
#: own table goes by model type and knows neither ViT nor DeiT nor the names of transformers 5.
_QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("q_b_proj", "kv_b_proj"),
    ("q_proj", "kv_b_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("qkv",),
    ("in_proj",),
    ("c_attn",),
)
#: Input projections of layers without attention, in the same order (Mamba). Its output projection
#: takes no adapter: the fused kernels read its weight.
_INPUTS = (("in_proj", "x_proj"), ("in_proj",))


#: In a config, modules inside the body that the checkpoint lacks: they are new, like the head.
NEW_MODULES = "new_modules"


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a matrix that LoRA adapts: Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(Outputs d, inputs k) of a module that takes an adapter.

    Raises
    ------
    ModelError
        If it is not a matrix.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        k, d = module.weight.shape
        return d, k
    raise ModelError(f"{type(module).__name__} is not a Linear module and takes no adapter")


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules beside the body: ``classifier``, ``score``, and what comes with them.

    So are those of the body that a checkpoint without a classifier lacks: the pooler of a masked
    language model, before the classifier. A causal language model has none: its output layer is
    pretrained, and often tied to the embedding.
    """
    if model.get_output_embeddings() is not None:
        return ()
    body = _body(model)
    beside = [
        name
        for name, module in model.named_children()
        if name != body and next(module.parameters(), None) is not None
    ]
    return (*model.config.to_dict().get(NEW_MODULES, ()), *beside)


def _body(model: PreTrainedModel) -> str:
    """Name of the child that is pretrained; CLIP's image classifiers have it under another name."""
    children = dict(model.named_children())
    prefix: str = model.base_model_prefix
    if prefix in children:
        return prefix
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in children.items()}
    return max(sizes, key=lambda name: sizes[name], default="")


def whole_modules(model: PreTrainedModel, head: Head) -> tuple[str, ...]:
    """Modules that a client trains whole beside its adapter: ``head.modules``, or the head.

    In a base that was wrapped for ``lora.form`` kronecker, W₁ of each layer too.

    Raises
    ------
    ModelError
        If a name is no module of the model.
    """
    outer = tuple(f"{name}{OUTER}" for name in wrapped(model))
    if head.mode == "frozen":
        return outer
    named = split_list(head.modules)
    if not named:
        return (*head_modules(model), *outer)
    present = dict(model.named_modules())
    for name in named:
        if name not in present:
            children = ", ".join(child for child, _ in model.named_children())
            raise ModelError(
                f"head.modules {name!r} is no module of {type(model).__name__}; its own are "
                f"{children}"
            )
    return (*named, *outer)


def shared_heads(model: PreTrainedModel, head: Head) -> tuple[str, ...]:
    """Those of them that travel and are averaged: none where every client keeps its own."""
    return () if head.mode == "local" else whole_modules(model, head)


def target_modules(model: PreTrainedModel, targets: str) -> tuple[str, ...]:
    """Full names of the Linear modules that take an adapter, in the model's order.

    Parameters
    ----------
    model
        A base model, with or without weights.
    targets
        ``default`` (the attention's query and value projections), ``all-linear`` (all but the
        head), comma-separated ends of names, or ``re:`` and a regular expression that whole names
        must match.

    Raises
    ------
    ModelError
        If a name or expression matches nothing, or is no expression; it lists the Linear modules.
    """
    if layers := wrapped(model):  # for these targets, when it was loaded
        return tuple(f"{name}{INNER}" for name in layers)
    heads = tuple(f"{name}." for name in head_modules(model))
    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not output and not f"{name}.".startswith(heads)
    ]
    if targets == "all-linear":
        chosen = linear
    elif targets == "default":
        chosen = _query_value(linear)
    elif targets.startswith("re:"):
        try:
            expression = re.compile(targets.removeprefix("re:"))
        except re.error as error:
            raise ModelError(
                f"lora.targets {targets!r} is no regular expression: {error}"
            ) from error
        chosen = [name for name in linear if expression.fullmatch(name)]
    else:
        ends = split_list(targets)
        for end in ends:
            if not any(_ends_with(name, end) for name in linear):
                raise _no_target(model, end, linear)
        chosen = [name for name in linear if any(_ends_with(name, end) for end in ends)]
    if not chosen:
        raise _no_target(model, targets, linear)
    return tuple(chosen)


def _query_value(linear: Sequence[str]) -> list[str]:
    in_attention = [name for name in linear if "att" in name.lower()]
    names, known = (in_attention, _QUERY_VALUE) if in_attention else (linear, _INPUTS)
    for ends in known:
        if all(any(_ends_with(name, end) for name in names) for end in ends):
            return [name for name in names if any(_ends_with(name, end) for end in ends)]
    return []


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _no_target(model: PreTrainedModel, target: str, linear: Sequence[str]) -> ModelError:
    last = sorted({name.rpartition(".")[2] for name in linear})
    return ModelError(
        f"lora.targets {target!r} matches no Linear module of {type(model).__name__}; there are: "
        f"{', '.join(last) or 'none'}"
        + (f" (full names like {', '.join(linear[:2])})" if linear else "")
    )


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
