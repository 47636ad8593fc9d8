"""The typed settings of a run: one frozen model per table of the run config; seeds and rates."""

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from rankfit.configs.faults import Faulty
from rankfit.configs.learning import (
    BITS,
    TORCH_ADAMW,
    Count,
    Data,
    Fraction,
    Head,
    Model,
    NonNegative,
    Partition,
    PositiveFloat,
    PositiveInt,
    Share,
    Table,
    Task,
    Train,
    join_names,
    kebab,
    nearest,
    setting,
    split_list,
    split_names,
    split_numbers,
)

__all__ = [
    "OWNER",
    "ConfigError",
    "Data",
    "Head",
    "Model",
    "NodeConfigError",
    "Partition",
    "RunSettings",
    "Scalar",
    "Task",
    "Train",
    "from_flat",
    "known_keys",
    "refuse_renamed",
    "split_list",
    "split_names",
    "split_numbers",
    "to_flat",
]

#: Environment variable by which `rankfit run` tells the server how wide the user's terminal is.
#: ``COLUMNS`` itself is set to 80 by readline in whatever a Python with it starts.
TERMINAL_WIDTH = "RANKFIT_COLUMNS"
#: Names that ``run.report-to`` takes.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
Scalar = str | int | float | bool
#: As a node config's ``policy``: whoever runs the process owns the data (client/policy.py).
OWNER = "owner"


class ConfigError(Faulty, ValueError):
    """A setting that is unknown or has a value that cannot be used."""

    code = "settings"


class NodeConfigError(ConfigError):
    """A value of a node's own config that cannot be used."""

    code = "node-config"


class Run(Table):
    """The run itself."""

    name: str = setting("run", "Name of the run, and of its folder in `run.directory`.")
    directory: str = setting(
        "runs",
        "Folder that holds `NAME/`, relative to where the command is given; on a "
        "SuperLink, on its machine.",
    )
    seed: Count = setting(0, "Every random draw of the run follows from it.")
    rounds: PositiveInt = setting(
        20, "Rounds of the whole run; with `best.patience`, at most.", unit="rounds"
    )
    resume: bool = setting(
        False, "Continue from the checkpoint of an interrupted run of this name."
    )
    report_to: str = setting(
        "tensorboard",
        "Comma-separated trackers that get the figures of each round and client: `tensorboard`, "
        "`wandb`, `mlflow`, `trackio` (empty = none); see docs/trackers.md.",
    )

    @model_validator(mode="after")
    def _known_trackers(self) -> Self:
        for name in split_list(self.report_to):
            if name not in TRACKERS:
                raise ValueError(
                    f"run.report-to: unknown tracker {name!r}; expected {', '.join(TRACKERS)}"
                )
        return self


class Best(Table):
    """Which round's adapter is the best, and when a run stops because no better one comes."""

    metric: str = setting(
        "",
        "Figure of an evaluation, such as `accuracy` or `loss`, that chooses the best round, whose "
        "checkpoint is kept (empty = no round is chosen).",
    )
    mode: Literal["auto", "max", "min"] = setting(
        "auto",
        "Whether the largest or the least figure is best (`auto` = the least of a loss, else the "
        "largest).",
    )
    patience: Count = setting(
        0,
        "Evaluations in a row without a better figure after which the run stops (0 = it never "
        "stops before `run.rounds`).",
        unit="evaluations",
    )
    holdout: Share = setting(
        0.1,
        "Share of the training split that the server holds back to measure `best.metric` on, so "
        "that the test split has no part in the choice (0 = chosen by what `server.evaluate` "
        "measures).",
    )

    @property
    def held_out(self) -> float:
        """Share of the training split that clients do not get."""
        return self.holdout if self.metric else 0.0

    @property
    def least(self) -> bool:
        """Whether the least figure is the best."""
        if self.mode == "auto":
            return self.metric == "loss" or self.metric.endswith("-loss")
        return self.mode == "min"


Form = Literal["lora", "kronecker"]


class Lora(Table):
    """The global adapter; one scale, alpha / rank or alpha / sqrt(rank), for all clients."""

    rank: PositiveInt = setting(
        16, "Rank of the global adapter: the largest that a client can be given."
    )
    alpha: PositiveFloat = setting(
        16.0, "Numerator of the scale of B·A, which is the same for every client."
    )
    scaling: Literal["classic", "rslora"] = setting(
        "classic", "Scale of B·A: alpha / rank (`classic`) or alpha / √rank (`rslora`)."
    )
    targets: str = setting(
        "default",
        "Comma-separated names of the modules that get an adapter, `re:EXPRESSION`, "
        "`all-linear`, or `default` (the attention's query and value).",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Share of an adapter's inputs that training sets to zero."
    )
    start: str = setting(
        "",
        "LoRA adapter that the run begins with: a folder that PEFT saved (such as `checkpoint` of "
        "a run) or a hub id, of any rank.",
    )
    form: Form = setting(
        "lora", "What is added to a weight: B·A, or W₁ ⊗ (B·A), for the method `lokr` alone."
    )

    @property
    def scale(self) -> float:
        """Multiplier of B·A, the same for every client whatever its rank."""
        return self.alpha / (self.rank if self.scaling == "classic" else self.rank**0.5)


class Method(Table):
    """The federated method, by its name in the catalogue."""

    name: str = setting("rankfit", "Method of the catalogue; `rankfit methods` lists them.")
    remainder: bool = setting(
        False,
        "Send clients the directions that they cannot train as well, frozen (costs the "
        "download of the whole rank).",
    )
    without: str = setting(
        "",
        "Comma-separated parts of the method to switch off, for ablations; `rankfit "
        "methods` lists them.",
    )
    warm_up_rounds: Count = setting(
        20,
        "Rounds in which both factors are trained before a method with a warm-up alternates.",
        unit="rounds",
    )
    renew_every: PositiveInt = setting(
        20,
        "Rounds after which layers are drawn, and importance scores measured, anew.",
        unit="rounds",
    )
    scores: Literal["server", "clients"] = setting(
        "server",
        "Where importance scores are measured: on the server's own training split, or on "
        "the clients (averaged, so that the server needs no data).",
    )
    probe_samples: Count = setting(
        64, "Samples that one measurement of importance reads (0 = all).", unit="samples"
    )
    pattern: Literal["triangle", "inverted-triangle", "bottleneck", "uniform"] = setting(
        "inverted-triangle",
        "Which layers Fed-HeLLo's GD-HLA gives to clients that cannot train all.",
    )
    prune_decay: Fraction = setting(0.99, "HetLoRA: share γ of the rank that self-pruning keeps.")
    prune_weight: NonNegative = setting(
        1e-3, "HetLoRA: weight λ of the regulariser of self-pruning."
    )


class Plan(Table):
    """What the plan search may change, and the limits it keeps."""

    search: str = setting(
        "micro-batch,checkpointing",
        "Comma-separated steps that may make a plan fit, tried in this order: "
        "`micro-batch`, `checkpointing` (empty = rank alone).",
    )
    precisions: str = setting(
        "",
        "Comma-separated precisions (`bf16`, `int8`, `nf4`) that the frozen base may be "
        "lowered to on a device, in this order, where no rank fits otherwise (empty = as "
        "`model` says).",
    )
    min_rank: PositiveInt = setting(1, "A device that cannot train this rank is left out.")
    upload_seconds: NonNegative = setting(
        0.0, "Time allowed for one upload over a link that is known (0 = unlimited)."
    )
    download_seconds: NonNegative = setting(
        0.0, "Time allowed for one download over a link that is known (0 = unlimited)."
    )
    measure_link_mib: Annotated[float, Field(ge=0, le=64)] = setting(
        0.0,
        "Size of the timed payloads that measure the link of a client that declares none "
        "(0 = not measured: unlimited).",
    )
    deadline_seconds: NonNegative = setting(
        0.0,
        "Time allowed for one round's training, at its measured throughput (0 = unlimited).",
    )
    margin_mib: NonNegative = setting(0.0, "Memory kept free beside the estimate.")
    calibration: str = setting(
        "",
        "Profile of calibration terms that `rankfit calibrate` wrote (empty = the built-in terms).",
    )
    read_memory: Literal["every-round", "once"] = setting(
        "every-round",
        "When a client's free memory is read: before each round that it takes part in, or"
        " when it is first seen.",
    )

    @model_validator(mode="after")
    def _known_steps(self) -> Self:
        for step in split_list(self.search):
            if step not in ("micro-batch", "checkpointing"):
                raise ValueError(
                    f"plan.search: unknown step {step!r}; expected micro-batch or checkpointing"
                )
        return self

    @model_validator(mode="after")
    def _known_precisions(self) -> Self:
        for precision in split_list(self.precisions):
            if precision not in BITS:
                raise ValueError(
                    f"plan.precisions: unknown precision {precision!r}; expected {', '.join(BITS)}"
                )
        return self


class Fleet(Table):
    """Declared profiles of simulated devices, dealt in turn to the partitions ("" = measured)."""

    memory_mib: str = setting(
        "",
        "Simulation only: comma-separated memory of the devices, given to the clients in "
        "turn (empty = measured).",
    )
    upload_mbps: str = setting(
        "",
        "Simulation only: comma-separated upload speeds of the devices, given to the "
        "clients in turn (empty = not known: unlimited).",
    )
    download_mbps: str = setting(
        "",
        "Simulation only: comma-separated download speeds of the devices, given to the "
        "clients in turn (empty = not known: unlimited).",
    )

    @model_validator(mode="after")
    def _numbers(self) -> Self:
        for key in ("memory_mib", "upload_mbps", "download_mbps"):
            if any(
                value <= 0 for value in split_numbers(getattr(self, key), f"fleet.{kebab(key)}")
            ):
                raise ValueError(f"fleet.{kebab(key)}: every figure must be above 0")
        return self


class Wire(Table):
    """Number type of adapters on the wire."""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = setting(
        "float32", "Number type in which adapters travel."
    )
    delta: bool = setting(
        False,
        "Nodes store the adapter that they were sent last, and what has not changed is "
        "not sent again.",
    )


class Server(Table):
    """The coordinator."""

    clients_per_round: PositiveInt = setting(
        6, "Clients drawn for a round; all of them where there are fewer.", unit="clients"
    )
    min_clients: Count = setting(
        0,
        "A round starts when this many clients can train (0 = when every node that is "
        "expected has answered, or `server.wait-seconds` are over, and one can train).",
        unit="clients",
    )
    wait_seconds: PositiveFloat = setting(120.0, "Longest wait for clients before a round.")
    round_timeout_seconds: PositiveFloat = setting(
        3600.0, "Longest wait for the updates of a round; later ones are dropped."
    )
    evaluate: Literal["server", "clients", "none"] = setting(
        "server", "Where the global adapter is evaluated."
    )
    evaluate_every: PositiveInt = setting(
        1,
        "Rounds from one evaluation to the next; the last round is always evaluated.",
        unit="rounds",
    )
    evaluate_batch_size: PositiveInt = setting(
        64, "Samples of one evaluation batch; halved where memory runs out.", unit="samples"
    )
    max_update_norm: NonNegative = setting(
        0.0,
        "Drop an update whose change, of its products or of its head, has a larger Frobenius norm "
        "(0 = no limit).",
    )
    norm_limit: NonNegative = setting(
        5.0,
        "A change, of an update's products or of its head, that is longer than this many medians "
        "of its round is shortened to the median where it points as the others do, else dropped "
        "(0 = no limit).",
        unit="medians",
    )
    max_weight_share: Annotated[float, Field(gt=0, le=1)] = setting(
        0.25,
        "Largest share of a round's weight that one client can have, with the others counted up to "
        "their median; two of n shares are always allowed. Samples that the server knows (its own "
        "division of a data set) count in full.",
    )
    sample_changes: Literal["cap", "refuse", "accept"] = setting(
        "cap",
        "A client weighs by the samples that it named first: a larger number later is capped, any "
        "other number drops its update, or it is accepted.",
    )
    robust: Literal[
        "none",
        "norm-clipping",
        "trimmed-mean",
        "median",
        "geometric-median",
        "krum",
        "multi-krum",
        "cosine",
    ] = setting("none", "Merge that withstands hostile clients; see docs/merging.md.")
    robust_share: Annotated[float, Field(ge=0, lt=0.5)] = setting(
        0.25, "Share of hostile clients that `server.robust` allows for."
    )
    sampling: Literal["uniform", "samples"] = setting(
        "uniform",
        "Clients of a round are drawn with equal chances, or in proportion to their "
        "samples (and then weigh the same).",
    )
    bind_names: Literal["auto", "on", "off"] = setting(
        "auto",
        "A client's name belongs to the node that first used it in the run, with SuperNode "
        "authentication to its key (`auto` = in a deployment; nodes of a simulation, and nodes "
        "without keys, have other ids when they come back).",
    )
    optimizer: Literal["none", "sgd", "momentum", "adam"] = setting(
        "none",
        "FedOpt: how the step from the old adapter to the merged one is taken (`none` = "
        "the whole step).",
    )
    learning_rate: PositiveFloat = setting(1.0, "Learning rate of `server.optimizer`.")
    momentum: Share = setting(0.9, "Momentum of `server.optimizer`; Adam's β₁.")
    second_momentum: Share = setting(0.99, "Adam's β₂ of `server.optimizer`.")
    epsilon: PositiveFloat = setting(1e-3, "Adam's ε of `server.optimizer`.")
    max_waiting_updates: Count = setting(
        64,
        "Updates that may wait for the median of their round; beyond it they are judged by those "
        "that came so far and merged, and two runs of one seed may differ.",
        unit="updates",
    )
    merge_tolerance: NonNegative = setting(
        0.005,
        "By how much the error of a merge of products may exceed the smallest possible "
        "one, relative to it, where that is faster (0 = exact).",
    )
    merge_device: Literal["cpu", "cuda"] = setting(
        "cpu", "Where products are merged: on the CPU, or on the server's first GPU."
    )
    threads: Count = setting(
        0,
        "Modules that the server merges side by side, each with one thread (0 = as many as it may "
        "use cores, by affinity and cgroup; never more). Results do not depend on it.",
        unit="threads",
    )
    average: Share = setting(
        0.0,
        "Decay of a moving average of the global adapter and head, which is then what is "
        "evaluated and exported (0 = none).",
    )
    evaluate_unaveraged: bool = setting(
        False, "Evaluate what that average is taken of as well, as `unaveraged-accuracy` and so on."
    )
    diagnostics: bool = setting(
        True, "Measure spectrum, truncation and distance from the true mean in every round."
    )


class Client(Table):
    """The client process of a deployment; see docs/warm-client.md."""

    warm: Literal["auto", "on", "off"] = setting(
        "auto",
        "Keep the model in a worker process between messages; `auto`: in a deployment, "
        "where Flower starts a process for every message.",
    )
    prefetch: bool = setting(
        True,
        "Load base model and data as soon as the query was answered, while the server still plans.",
    )
    keep_base_on_device: bool = setting(
        True,
        "Keep the base model on the GPU between messages; false: it waits in host memory "
        "and leaves the GPU to others.",
    )
    idle_seconds: PositiveFloat = setting(
        600.0, "A worker that gets no message for this long exits."
    )
    second_run: Literal["own", "wait"] = setting(
        "own",
        "A second run on the same SuperNode gets a worker of its `own`, or must `wait` "
        "until the first run's is between two messages, which then exits.",
    )
    message_mib: PositiveFloat = setting(
        4096.0, "Largest message between a client's Flower process and its worker."
    )


class Simulation(Table):
    """Size of a simulation; not read in a deployment."""

    clients: PositiveInt = setting(12, "Simulation only: number of clients.", unit="clients")
    cpus_per_client: PositiveFloat = setting(
        1.0, "Simulation only: CPU cores reserved for a client that trains.", unit="cores"
    )
    gpus_per_client: NonNegative = setting(
        0.0, "Simulation only: share of a GPU reserved for a client that trains.", unit="GPUs"
    )


class RunSettings(Table):
    """All settings of a run."""

    run: Run = Run()
    best: Best = Best()
    task: Task = Task()
    model: Model = Model()
    data: Data = Data()
    partition: Partition = Partition()
    lora: Lora = Lora()
    head: Head = Head()
    train: Train = Train()
    method: Method = Method()
    plan: Plan = Plan()
    fleet: Fleet = Fleet()
    wire: Wire = Wire()
    server: Server = Server()
    client: Client = Client()
    simulation: Simulation = Simulation()

    def deployed(self) -> Self:
        """Return the settings as a deployment reads them: what is simulated is at its defaults."""
        return self.model_copy(update={"fleet": Fleet(), "simulation": Simulation()})

    def simulated_keys(self) -> list[str]:
        """Return the keys that are set and count in a simulation alone."""
        flat, nothing = to_flat(self), to_flat(self.deployed())
        return [key for key in flat if flat[key] != nothing[key]]

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        classifies = self.task.kind != "causal-lm" and self.task.problem == "classification"
        if self.train.label_prior and not classifies:
            raise ValueError(
                f"train.label-prior {self.train.label_prior}: only a classifier has a label prior; "
                "set it to 0"
            )
        if self.train.optimizer not in TORCH_ADAMW:
            wanted = {"moments kept": self.train.moments == "kept"}
            wanted |= {"head-moment tensor": self.train.head_moment == "tensor"}
            for what in (key for key, asked in wanted.items() if asked):
                raise ValueError(
                    f"train.{what}: only torch's AdamW can, not {self.train.optimizer}; set "
                    f"train.optimizer to {' or '.join(TORCH_ADAMW)}"
                )
        if self.lora.form == "kronecker":
            self._wrappable()
        if self.head.mode == "local" and self.server.evaluate == "server":
            raise ValueError(
                "head.mode local: the server has no head to evaluate with; set server.evaluate to "
                "clients or none"
            )
        if self.head.mode == "local" and self.head.modules == "" and self.task.kind == "causal-lm":
            raise ValueError(
                "head.mode local: a language model has no classifier; name head.modules (lm_head)"
            )
        if self.plan.precisions and self.model.quantization != "none":
            raise ValueError(
                f"plan.precisions {self.plan.precisions!r}: a base that is quantised for all "
                f"(model.quantization {self.model.quantization}) is not lowered further; set that "
                "to none and list it in plan.precisions"
            )
        bases = [self.model.at(each) for each in split_list(self.plan.precisions)]
        for base in (self.model, *bases):
            if {"bf16", "fp16"} == {base.precision, self.train.autocast}:
                raise ValueError(
                    f"train.autocast {self.train.autocast} with a base in {base.precision} mixes "
                    "two 16-bit types, which torch does not train; make them the same"
                )
        return self

    @model_validator(mode="after")
    def _best_can_be_chosen(self) -> Self:
        best = self.best
        if best.patience and not best.metric:
            raise ValueError(
                f"best.patience {best.patience}: name the figure that must improve in best.metric"
            )
        if best.held_out and self.partition.kind == "local":
            raise ValueError(
                f"best.holdout {best.holdout}: the nodes hold the data (partition.kind local), so "
                "the server has none to hold back; set best.holdout to 0 to choose by what "
                "server.evaluate measures"
            )
        if best.metric and not best.holdout and self.server.evaluate == "none":
            raise ValueError(
                "best.holdout 0 with server.evaluate none: nothing measures best.metric; set one "
                "of them"
            )
        if best.metric and self.head.mode == "local":
            raise ValueError(
                "best.metric with head.mode local: clients keep the heads of their last rounds "
                "alone, so the best round would lack its heads; leave best.metric empty"
            )
        return self

    def _wrappable(self) -> None:
        """Refuse what cannot be had with layers that are wrapped for Kronecker factors."""
        for key, value, only in (
            ("head.mode", self.head.mode, ("trained", "frozen")),
            ("model.quantization", self.model.quantization, ("none",)),
            ("plan.precisions", self.plan.precisions, ("",)),
        ):
            if value not in only:
                raise ValueError(
                    f"lora.form kronecker cannot be used with {key} {value!r}; set it to "
                    f"{' or '.join(map(repr, only))}"
                )


#: Former keys with what they are now.
RENAMED = {
    "server.keep-waiting": "server.max-waiting-updates",
    "wire.skip-held": "wire.delta",
    "method.tail": "method.remainder",
}
_DORA = (
    "there is no DoRA, whose magnitudes cannot be averaged over ranks as products can: use "
    "plain LoRA, with lora.targets=all-linear or a higher lora.rank where it falls short"
)
#: Keys that others have, and what to use.
ABSENT = {"lora.dora": _DORA, "lora.use-dora": _DORA, "lora.use_dora": _DORA}


def refuse_renamed(key: str) -> None:
    """Raise :class:`ConfigError` with what to use for a key that is no more, or never was."""
    if key in ABSENT:
        raise ConfigError(f"setting {key!r}: {ABSENT[key]}")
    if key in RENAMED:
        raise ConfigError(f"setting {key!r} has been renamed: write {RENAMED[key]!r}")


def known_keys() -> dict[str, Scalar]:
    """Every key of the run config with its default."""
    return to_flat(RunSettings())


def to_flat(settings: RunSettings) -> dict[str, Scalar]:
    """Flatten settings to Flower's dotted keys, in the order of the tables."""
    nested = settings.model_dump(by_alias=True)
    return {
        f"{table}.{key}": value for table, keys in nested.items() for key, value in keys.items()
    }


def unknown_setting(key: str) -> ConfigError:
    """The error for a key that is no setting, with the one that may be meant."""
    near = nearest(key, known_keys())
    hint = f"; did you mean {near!r}?" if near else " (`rankfit settings` lists all)"
    return ConfigError(f"unknown setting {key!r}{hint}")


def from_flat(flat: Mapping[str, Scalar]) -> RunSettings:
    """Build settings from dotted keys; keys that are absent take their defaults.

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest known one) or a value that cannot be used.
    """
    known = known_keys()
    nested: dict[str, dict[str, Scalar]] = {}
    for key, value in flat.items():
        refuse_renamed(key)
        if key not in known:
            raise unknown_setting(key)
        table, _, name = key.partition(".")
        if isinstance(value, list) and isinstance(known[key], str):
            value = join_names(value)  # a list in a TOML file
        nested.setdefault(table, {})[name] = value
    try:
        return RunSettings.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    """One line per bad value: the key, the value and what was expected."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(item["input"], dict | BaseModel) else f" (got {item['input']!r})"
        lines.append(f"{key}: {message}{shown}")
    return "; ".join(lines)


def derive(seed: int, *parts: str | int) -> int:
    """Return a seed of 40 bits for one purpose: equal parts give equal draws on every machine.

    40 bits leave room for callers that number streams of their own below it.
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")


def learning_rate(settings: RunSettings, server_round: int) -> float:
    """Rate of a round (from 1): ``train.learning-rate`` times the schedule's factor.

    With T rounds, W of warm-up, and p = (t − 1 − W)/(T − W) in [0, 1): constant 1;
    linear 1 − (1 − floor)·p; cosine floor + (1 − floor)·(1 + cos πp)/2; step factor^⌊(t − 1 −
    W)/step⌋. Warm-up: t/(W + 1). After T rounds the rate stays where it ended.
    """
    train = settings.train
    warm_up, total = train.schedule_warm_up, train.schedule_rounds or settings.run.rounds
    if server_round <= warm_up:
        return train.learning_rate * server_round / (warm_up + 1)
    done = server_round - 1 - warm_up
    progress = min(1.0, done / max(1, total - warm_up))
    floor = train.schedule_floor
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - floor) * progress,
        "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2,
        "step": train.schedule_factor ** (done // train.schedule_step),
    }[train.schedule]
    return train.learning_rate * factor
