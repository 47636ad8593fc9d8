"""A checkpoint for use elsewhere: PEFT's folder, or a merged model, with a card.

What is written loads with plain transformers and PEFT. A base that only RankFit can find (built in,
in a Python package, or drawn from a config) is written along.
"""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import AutoImageProcessor, PreTrainedModel

from rankfit.adapters.state import Adapter
from rankfit.configs.settings import ConfigError
from rankfit.server import card
from rankfit.server.rundir import write_adapter
from rankfit.server.saved import SavedRun
from rankfit.tasks.adapted import head_tensors, load_adapter
from rankfit.tasks.data import DataError
from rankfit.tasks.kronecker import expanded, unwrap
from rankfit.tasks.models import head_modules, inject, load_base, shared_heads
from rankfit.tasks.sources import resolve_source
from rankfit.tasks.tokenizer import load_tokenizer

#: Folder of the base inside an exported one.
BASE = "base"


def export(run: SavedRun, folder: Path, *, merged: bool, head: Adapter | None = None) -> Path:
    """Write a checkpoint into a new folder.

    Parameters
    ----------
    merged : bool
        The whole model with the adapter in its weights, in place of the adapter alone. Of a
        quantised base, the 16-bit one that it was made from.
    head : Adapter, optional
        Carries a client's own head in place of the common one.

    Raises
    ------
    ConfigError
        If the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; export into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if merged:
        _write_merged(run, folder, head)
    else:
        _write_adapter(run, folder, head)
    names = class_names(run)
    (folder / "README.md").write_text(card.text(run, names, merged=merged), encoding="utf-8")
    return folder


def class_names(run: SavedRun) -> tuple[str, ...]:
    """Names of the classes; () where there are none or the data is not at hand."""
    settings = run.settings
    if settings.task.kind == "causal-lm" or settings.task.problem == "regression":
        return ()
    try:
        return run.task.class_names
    except DataError:
        return ()


def whole_adapter(run: SavedRun, head: Adapter | None) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter with the head that belongs to it, and the head's modules.

    A head that was frozen at its random start is part of what was learnt: without it, another
    process would draw another.
    """
    if head is not None:
        heads = tuple(dict.fromkeys(name.rpartition(".")[0] for name in head.head))
        return replace(run.adapter, head=head.head), heads
    adapter, heads = run.adapter, run.heads
    if run.settings.lora.form == "kronecker":
        unwrap(run.base)
        adapter, heads = expanded(adapter), shared_heads(run.base, run.settings.head)
    if heads:
        return adapter, heads
    heads = head_modules(run.base)
    return replace(adapter, head=head_tensors(run.base, heads)), heads


def ships_base(run: SavedRun) -> bool:
    """Whether the base must come along."""
    source = run.settings.model.source
    return resolve_source(source).kind in ("builtin", "config") or source.startswith("package:")


def _write_adapter(run: SavedRun, folder: Path, head: Adapter | None) -> None:
    adapter, heads = whole_adapter(run, head)
    write_adapter(folder, adapter, run.settings, heads)
    if ships_base(run):
        _save_model(run, run.base, folder / BASE)
    _save_processing(run, folder)


def _write_merged(run: SavedRun, folder: Path, head: Adapter | None) -> None:
    base, settings = run.base, run.settings
    if settings.model.quantization != "none":
        model = settings.model.model_copy(update={"quantization": "none", "precision": "bf16"})
        base = load_base(settings.model_copy(update={"model": model}), run.task.labels)
    adapter, heads = whole_adapter(run, head)
    peft = inject(base, adapter.ranks, scale=adapter.scale, dropout=0.0, heads=heads)
    load_adapter(peft, adapter)
    _save_model(run, _merge(peft), folder)
    _save_processing(run, folder)


def _merge(peft: PeftModel) -> PreTrainedModel:
    merged: PreTrainedModel = peft.merge_and_unload()
    merged.to(merged.dtype)  # the head was trained in float32
    return merged


def _save_model(run: SavedRun, model: PreTrainedModel, folder: Path) -> None:
    """Save a model so that the auto classes find its class, with names of its classes."""
    config = model.config
    config.architectures = [type(model).__name__]
    if "use_cache" in config.to_dict():
        config.use_cache = True  # switched off for training
    names = class_names(run)
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(str(folder))


def _save_processing(run: SavedRun, folder: Path) -> None:
    """Save the tokenizer or image processor, where the base has one."""
    source = resolve_source(run.settings.model.source)
    if run.settings.task.kind != "image-classification":
        load_tokenizer(run.settings.model).save_pretrained(str(folder))
    elif source.kind == "folder" and (Path(source.location) / "preprocessor_config.json").exists():
        AutoImageProcessor.from_pretrained(source.location, backend="pil").save_pretrained(folder)
