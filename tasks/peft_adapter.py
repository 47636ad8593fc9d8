"""An adapter that PEFT saved, as the start of a run: of any rank, padded or cut to the run's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.lowrank import Stack, exact
from rankfit.configs.settings import RunSettings
from rankfit.tasks.model_sources import ModelError

log = logging.getLogger(__name__)

#: Starts that leave the base as it is; others (PiSSA, OLoRA, LoftQ, …) take a part out of it.
_HARMLESS = (True, False, "gaussian", "orthogonal", "eva")
_SHOWN = 3


def start_from(settings: RunSettings, fresh: Adapter) -> Adapter:
    """The adapter that a run begins with: ``fresh``, or in its place what ``lora.start`` names.

    The product of each module stays what it was: a scale of its own goes into B. Of a smaller rank
    than the run's it is padded with directions of ``fresh``, whose B is zero; of a larger one the
    strongest directions are kept. Directions are ordered by their strength, as clients of a low
    rank get the first ones.

    Raises
    ------
    ModelError
        If it cannot be had, is no LoRA, or is of modules or a head that this run does not train.
    """
    if not settings.lora.start:
        return fresh
    config, given = read_start(settings, fresh)
    factors = {
        module: _fitted(module, own, given, config, fresh.scale)
        for module, own in fresh.factors.items()
    }
    head = {name: given.head.get(name, own).float() for name, own in fresh.head.items()}
    return Adapter(factors, fresh.scale, head)


def read_start(settings: RunSettings, fresh: Adapter) -> tuple[LoraConfig, Adapter]:
    """Read the adapter that ``lora.start`` names, and compare it with the run's; see above."""
    place = settings.lora.start
    if settings.lora.form != "lora":
        raise ModelError(f"lora.start cannot be used with lora.form {settings.lora.form!r}")
    config, state = _read(place)
    _check(place, config, settings)
    try:
        given = Adapter.from_state_dict(state, 1.0)
    except ValueError as error:
        raise ModelError(f"lora.start {place!r}: {error}") from error
    _check_modules(place, given, fresh)
    return config, given


def _read(place: str) -> tuple[LoraConfig, Mapping[str, Tensor]]:
    folder = Path(place).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"lora.start {place!r}: the folder holds no adapter_config.json; expected what PEFT's "
            "save_pretrained writes, such as the folder `checkpoint` of a run",
            fault="model-missing",
        )
    if not folder.is_dir() and (place.startswith(("/", ".", "~")) or place.count("/") != 1):
        raise ModelError(f"lora.start {place!r}: there is no such folder", fault="model-missing")
    location = str(folder) if folder.is_dir() else place
    try:
        config: Any = PeftConfig.from_pretrained(location)
        state = load_peft_weights(location, device="cpu")
    except Exception as error:  # whatever the hub, a file of weights or PEFT's reader raises
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"lora.start {place!r}: cannot be loaded as an adapter, from a folder or the hub: "
            f"{line}",
            fault="model-missing",
        ) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"lora.start {place!r}: is {config.peft_type}, expected LoRA")
    return config, state


def _check(place: str, config: LoraConfig, settings: RunSettings) -> None:
    """Refuse what is no sum of a base's weight and B·A."""
    if config.use_dora:
        raise ModelError(
            f"lora.start {place!r}: is DoRA, whose magnitudes RankFit does not train: merge it "
            "into its base (merge_and_unload) and give that as model.source, or start from a "
            "plain LoRA"
        )
    if config.init_lora_weights not in _HARMLESS:
        raise ModelError(
            f"lora.start {place!r}: was begun by {config.init_lora_weights!r}, which changes the "
            "base: save it with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    base = Path(str(config.base_model_name_or_path or "")).name
    if base and base != Path(settings.model.source).name:
        log.warning(
            "lora.start: it was trained on %s, model.source is %s", base, settings.model.source
        )


def _check_modules(place: str, given: Adapter, fresh: Adapter) -> None:
    """Refuse to lose a part of it; a module of the run that it lacks begins anew."""
    for module, own in given.factors.items():
        if module not in fresh.factors:
            ends = ",".join(sorted({name.rpartition(".")[2] for name in given.factors}))
            raise ModelError(
                f"lora.start {place!r}: adapts {module}, which lora.targets does not: set "
                f"lora.targets={ends} (if model.source has such modules)"
            )
        wanted = fresh.factors[module]
        have = (own.b.shape[0], own.a.shape[1])
        if have != (wanted.b.shape[0], wanted.a.shape[1]):
            raise ModelError(
                f"lora.start {place!r}: {module} is {have[0]} × {have[1]} there and "
                f"{wanted.b.shape[0]} × {wanted.a.shape[1]} in model.source: it is of another base"
            )
    for name, tensor in given.head.items():
        own_head = fresh.head.get(name)
        if own_head is None:
            raise ModelError(
                f"lora.start {place!r}: holds {name}, which this run does not train: set head.mode="
                "trained, or name its module in head.modules"
            )
        if own_head.shape != tensor.shape:
            raise ModelError(
                f"lora.start {place!r}: {name} is {tuple(tensor.shape)}, expected "
                f"{tuple(own_head.shape)}: it is for other classes (data.class-names)"
            )
    new = [module for module in fresh.factors if module not in given.factors]
    if new:
        log.warning(
            "lora.start: has nothing of %d modules (%s), which begin anew",
            len(new), ", ".join(new[:_SHOWN]),
        )  # fmt: skip


def _fitted(
    module: str, fresh: Factors, given: Adapter, config: LoraConfig, scale: float
) -> Factors:
    """Factors of the run's rank and scale whose product is the given one's, or nearest to it."""
    own = given.factors.get(module)
    if own is None:
        return fresh
    ratio = _scale(module, own.rank, config) / scale
    left, right = own.b.double() * ratio, own.a.double()  # (d, r), (r, k)
    if own.rank > fresh.rank:
        stack = Stack(left, right, torch.ones(own.rank, dtype=torch.float64))
        kept = exact(stack, fresh.rank)
        root = kept.values[: fresh.rank].sqrt()
        left = kept.u[:, : fresh.rank] * root
        right = root[:, None] * kept.vt[: fresh.rank]
    order = (left.norm(dim=0) * right.norm(dim=1)).argsort(descending=True, stable=True)
    left, right = left[:, order].float(), right[order].float()
    b, a = fresh.b.clone(), fresh.a.clone()
    b[:, : left.shape[1]], a[: left.shape[1]] = left, right
    return Factors(b, a)


def _scale(module: str, rank: int, config: LoraConfig) -> float:
    """PEFT's multiplier of a module's product."""
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)
