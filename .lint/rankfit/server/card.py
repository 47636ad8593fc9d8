"""The model card of an exported run: what it is, how it was trained, how it is loaded."""

import importlib.metadata
from collections.abc import Sequence

from rankfit.configs.settings import to_flat
from rankfit.server import summary
from rankfit.server.saved import SavedRun
from rankfit.tasks.sources import resolve_source

_AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_PACKAGES = ("rankfit", "torch", "transformers", "peft", "flwr")


def text(run: SavedRun, class_names: Sequence[str], *, merged: bool) -> str:
    """Write the card in Markdown, with the front matter that the hub reads."""
    settings, lines = run.settings, run.lines()
    source = settings.model.source
    hub = resolve_source(source).kind == "hub"
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
    if class_names:
        parts += ["", "## Classes", "", "Ids from 0: " + ", ".join(class_names) + "."]
    parts += [
        "",
        "## Settings",
        "",
        "```toml",
        *(f"{key} = {_toml(value)}" for key, value in to_flat(settings).items()),
        "```",
        "",
        "Written with " + ", ".join(_versions()) + ".",
        "",
    ]
    return "\n".join(parts)


def _data(run: SavedRun) -> str:
    if run.settings.partition.kind == "local":
        return "the clients' own data"
    data = run.settings.data
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
        if run.settings.task.kind != "causal-lm":
            extra = f", num_labels={run.base.config.num_labels}, ignore_mismatched_sizes=True"
        pad = run.base.config.to_dict().get("pad_token_id")
        if run.settings.task.kind == "text-classification" and pad is not None:
            extra += f", pad_token_id={pad}"
        load = f'base = {auto}.from_pretrained("{run.settings.model.source}"{extra})'
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


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
