"""A checkpoint for use elsewhere: PEFT's folder, or a merged model, with a model card."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import AutoImageProcessor, PreTrainedModel

from rankfit.adapters.adapter import Adapter
from rankfit.configs.compose import without_places
from rankfit.configs.settings import ConfigError, to_flat
from rankfit.server import reporting as summary
from rankfit.server.report import versions
from rankfit.server.run_directory import SavedRun, write_adapter
from rankfit.tasks.base_model import head_modules, load_base, shared_heads
from rankfit.tasks.kronecker import expanded, unwrap
from rankfit.tasks.lora import inject, load_adapter
from rankfit.tasks.model_sources import resolve_source
from rankfit.tasks.targets import NEW_MODULES, head_tensors
from rankfit.tasks.tokenizer import load_tokenizer

_AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


def text(run: SavedRun, *, merged: bool) -> str:
    """Write the card in Markdown, with the front matter that the hub reads."""
    settings, lines = without_places(run.settings), run.lines()
    source = settings.model.source
    hub = resolve_source(run.settings.model.source).kind == "hub"
    parts = [
        "---",
        "library_name: " + ("transformers" if merged else "peft"),
        *([f"base_model: {source}"] if hub else []),
        "tags: [federated-learning, lora, rankfit]",
        "---",
        f"# {settings.run.name}",
        "",
        f"{source} fine-tuned for {settings.task.kind} on {_data(run)} by federated LoRA "
        f"with RankFit: round {run.round} of {settings.run.rounds}, method "
        f"{settings.method.name}. The clients' data never left them"
        + (
            "."
            if settings.partition.kind == "local"
            else " in this set-up, which simulated clients on parts of one data set."
        ),
        "",
        "## Use",
        "",
        "```python",
        *_usage(run, merged),
        "```",
        "",
        "## Training",
        "",
        *_training(run, lines),
        "",
        "## Evaluation",
        "",
        *_evaluation(run, lines),
    ]
    if run.class_names:
        parts += ["", "## Classes", "", "Ids from 0: " + ", ".join(run.class_names) + "."]
    parts += [
        "",
        "## Settings",
        "",
        "```toml",
        *(f"{key} = {_toml(value)}" for key, value in to_flat(settings).items()),
        "```",
        "",
        "Written with " + ", ".join(versions()) + ".",
        "",
    ]
    return "\n".join(parts)


def _data(run: SavedRun) -> str:
    if run.settings.partition.kind == "local":
        return "the clients' own data"
    data = without_places(run.settings).data
    return f"{data.source} {data.name}".strip()


def _usage(run: SavedRun, merged: bool) -> list[str]:
    from rankfit.server.export import BASE, ships_base

    auto = _AUTO[run.settings.task.kind]
    if merged:
        return [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("FOLDER")',
        ]
    if ships_base(run):
        load = f'base = {auto}.from_pretrained("FOLDER/{BASE}")'
    else:
        extra = ""
        if names := run.class_names:
            numbers = {name: number for number, name in enumerate(names)}
            extra = f", id2label={dict(enumerate(names))}, label2id={numbers}"
        elif run.settings.task.kind != "causal-lm":
            extra = f", num_labels={run.base.config.num_labels}"
        extra += ", ignore_mismatched_sizes=True" if extra else ""
        pad = run.base.config.to_dict().get("pad_token_id")
        if run.settings.task.kind == "text-classification" and pad is not None:
            extra += f", pad_token_id={pad}"
        load = (
            f'base = {auto}.from_pretrained("{without_places(run.settings).model.source}"{extra})'
        )
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        load,
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    ]


def _training(run: SavedRun, lines: Sequence[summary.Line]) -> list[str]:
    settings = run.settings
    clients = summary.clients(lines)
    ranks = sorted({line["rank"] for one in lines for line in one.get("clients", {}).values()})
    sent = summary.traffic(lines)[-1][1] if lines else 0
    facts = {
        "rounds": f"{run.round}, {settings.server.clients_per_round} clients a round",
        "clients that took part": str(len(clients)),
        "ranks trained on devices": ", ".join(str(rank) for rank in ranks) or "none",
        "global rank and scale": f"{max(run.adapter.ranks.values())}, {run.adapter.scale:g}",
        "adapted modules": f"{len(run.adapter.ranks)} ({settings.lora.targets})",
        "head": settings.head.mode,
        "local training": f"{settings.train.optimizer}, learning rate "
        f"{settings.train.learning_rate:g}, batch {settings.train.batch_size}, "
        + (
            f"{settings.train.steps} steps"
            if settings.train.steps
            else f"{settings.train.epochs} epochs"
        ),
        "partition": settings.partition.kind,
        "adapters sent and received": f"{sent / 2**20:.2f} MiB",
        "seed": str(settings.run.seed),
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _evaluation(run: SavedRun, lines: Sequence[summary.Line]) -> list[str]:
    own = next((line for line in reversed(lines) if line.get("evaluation")), None)
    if own is None:
        return ["Not measured in the run."]
    where = {"server": "the test set", "clients": "the clients' own test data"}
    head = f"After round {own['round']}, on {where.get(run.settings.server.evaluate, 'none')}:"
    rows = [f"| {name} | {value:.4f} |" for name, value in own["evaluation"].items()]
    return [head, "", "| | |", "|---|---|", *rows]


def _toml(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


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
    (folder / "README.md").write_text(text(run, merged=merged), encoding="utf-8")
    return folder


def whole_adapter(run: SavedRun, head: Adapter | None) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter with the head that belongs to it, and the head's modules.

    A head that was frozen at its random start is part of what was learned: without it, another
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
        whole = settings.model_copy(update={"model": model})
        base = load_base(whole, run.task.labels, run.class_names)
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
    vars(config).pop(NEW_MODULES, None)  # they are trained now, and in the checkpoint
    model.save_pretrained(str(folder))


def _save_processing(run: SavedRun, folder: Path) -> None:
    """Save the tokenizer or image processor, where the base has one."""
    source = resolve_source(run.settings.model.source)
    if run.settings.task.kind != "image-classification":
        load_tokenizer(run.settings.model).save_pretrained(str(folder))
    elif source.kind == "folder" and (Path(source.location) / "preprocessor_config.json").exists():
        AutoImageProcessor.from_pretrained(source.location, backend="pil").save_pretrained(folder)
