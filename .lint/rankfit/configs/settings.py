"""The typed settings of a run: one frozen model per table of the run config.

A run config is flat for Flower (``train.batch-size = 32``) and nested here
(``settings.train.batch_size``). :func:`from_flat` and :func:`to_flat` are exact inverses. Lists are
comma-separated text because Flower's run config holds only str, int, float and bool.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from rankfit.configs.learning import (
    BITS,
    TORCH_ADAMW,
    Data,
    Head,
    Model,
    Partition,
    Task,
    Train,
)
from rankfit.configs.table import (
    Count,
    Fraction,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Share,
    Table,
    kebab,
    split_list,
    split_numbers,
)

__all__ = [
    "ConfigError",
    "Data",
    "Head",
    "Model",
    "Partition",
    "RunSettings",
    "Scalar",
    "Task",
    "Train",
    "from_flat",
    "known_keys",
    "split_list",
    "split_numbers",
    "to_flat",
]

Scalar = str | int | float | bool


class ConfigError(ValueError):
    """A setting that is unknown or has a value that cannot be used."""


class Run(Table):
    """The run itself."""

    name: str = "run"
    #: Folder that holds ``<name>/``; relative to where the command is given.
    directory: str = "runs"
    seed: Count = 0
    rounds: PositiveInt = 20
    #: Continue from the checkpoint of an interrupted run of this name.
    resume: bool = False


Form = Literal["lora", "kronecker"]


class Lora(Table):
    """The global adapter; one scale, alpha / rank or alpha / sqrt(rank), for all clients."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    scaling: Literal["classic", "rslora"] = "classic"
    #: Comma-separated module names, ``re:EXPRESSION``, ``all-linear``, or ``default`` (the
    #: attention's query and value).
    targets: str = "default"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: What is added to a weight: B·A, or W₁ ⊗ (B·A), for the method ``lokr`` alone.
    form: Form = "lora"

    @property
    def scale(self) -> float:
        """Multiplier of B·A, the same for every client whatever its rank."""
        return self.alpha / (self.rank if self.scaling == "classic" else self.rank**0.5)


class Method(Table):
    """The federated method, by its name in the catalogue."""

    name: str = "rankfit"
    #: Give low-rank clients the part of the adapter that they cannot train as a frozen second
    #: adapter (costs rank R of download).
    tail: bool = False
    #: Comma-separated parts of the method to switch off: ablations. ``rankfit methods`` lists them.
    without: str = ""
    #: Rounds in which both factors move before a method with a warm-up alternates.
    warm_up_rounds: Count = 20
    #: Rounds after which layers are drawn, and importance scores measured, anew.
    renew_every: PositiveInt = 20
    #: Where importance scores are measured: on the server's own training split, or on the clients
    #: (averaged, so that the server needs no data).
    scores: Literal["server", "clients"] = "server"
    #: Samples that one measurement reads (0 = all).
    probe_samples: Count = 64
    #: Which layers Fed-HeLLo's GD-HLA gives to clients that cannot train all.
    pattern: Literal["triangle", "inverted-triangle", "bottleneck", "uniform"] = "inverted-triangle"
    #: HetLoRA: share γ of the rank that self-pruning keeps, and weight λ of its regulariser.
    prune_decay: Fraction = 0.99
    prune_weight: NonNegative = 1e-3


class Plan(Table):
    """What the plan search may change, and the limits it keeps."""

    #: Comma-separated, in this order: ``micro-batch``, ``checkpointing``; "" = rank alone.
    search: str = "micro-batch,checkpointing"
    #: Comma-separated precisions (``bf16``, ``int8``, ``nf4``) that the frozen base may be lowered
    #: to on a device, in this order, where no rank fits otherwise; "" = as ``model`` says.
    precisions: str = ""
    min_rank: PositiveInt = 1
    #: Seconds allowed for one upload / download (0 = unlimited).
    upload_seconds: NonNegative = 0.0
    download_seconds: NonNegative = 0.0
    #: MiB of the timed payloads that measure the link of a client that declares none (0 = not).
    measure_link_mib: Annotated[float, Field(ge=0, le=64)] = 0.0
    #: Seconds allowed for one round's training, by the client's own measured pace (0 = unlimited).
    deadline_seconds: NonNegative = 0.0
    #: Bytes kept free beside the estimate.
    margin_mib: NonNegative = 0.0
    #: Profile of calibration terms that ``rankfit calibrate`` wrote ("" = the table's terms).
    calibration: str = ""
    #: When free memory is read: of the clients of a round before each round, or when first seen.
    read_memory: Literal["every-round", "once"] = "every-round"

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

    memory_mib: str = ""
    upload_mbps: str = ""
    download_mbps: str = ""

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

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    #: Nodes keep the adapter that they were sent last, and what they hold is not sent again.
    skip_held: bool = False


class Server(Table):
    """The coordinator."""

    clients_per_round: PositiveInt = 6
    #: A round starts only when at least this many clients are there …
    min_clients: PositiveInt = 1
    #: … within this time.
    wait_seconds: PositiveFloat = 120.0
    round_timeout_seconds: PositiveFloat = 3600.0
    #: Where the global adapter is evaluated.
    evaluate: Literal["server", "clients", "none"] = "server"
    evaluate_every: PositiveInt = 1
    #: Halved where memory runs out.
    evaluate_batch_size: PositiveInt = 64
    #: Refuse an update whose change is longer than this (Frobenius norm; 0 = no limit).
    max_update_norm: NonNegative = 0.0
    #: Clients of a round are drawn alike, or in proportion to their samples (and then count alike).
    sampling: Literal["uniform", "samples"] = "uniform"
    #: FedOpt: how the step from the old adapter to the merged one is taken (``none`` = whole).
    optimizer: Literal["none", "sgd", "momentum", "adam"] = "none"
    learning_rate: PositiveFloat = 1.0
    momentum: Share = 0.9
    second_momentum: Share = 0.99
    epsilon: PositiveFloat = 1e-3
    #: Updates that may wait for those of earlier clients; beyond it they are folded as they come,
    #: and two runs of one seed may differ by rounding.
    keep_waiting: Count = 64
    #: Merges of products: by how much their error may exceed the best possible at the global rank,
    #: relative to it, where that is faster (0 = always exact).
    merge_tolerance: NonNegative = 0.005
    #: Where products are merged: on the CPU, or on the server's first GPU.
    merge_device: Literal["cpu", "cuda"] = "cpu"
    #: Decay of a moving average of the global adapter and head, which is then what is evaluated
    #: and exported (0 = none).
    average: Share = 0.0
    #: Evaluate what that average is taken of as well, as ``unaveraged-accuracy`` and so on.
    evaluate_unaveraged: bool = False
    #: Measure spectrum, truncation and distance from the true mean in every round.
    diagnostics: bool = True


class Client(Table):
    """The client process of a deployment; see docs/warm-client.md."""

    #: Keep the model in a worker between messages. ``auto``: where Flower starts a process for
    #: every message (``flwr-clientapp``), and never in a simulation.
    warm: Literal["auto", "on", "off"] = "auto"
    #: Load base and data as soon as the query was answered, while the server still plans.
    prefetch: bool = True
    #: False: the base waits in host memory between messages and leaves the GPU to others.
    keep_base_on_device: bool = True
    #: A worker that gets no message for this long ends.
    idle_seconds: PositiveFloat = 600.0
    #: A second run on the same SuperNode gets a worker of its ``own``, or must ``wait`` until the
    #: first one's is between two messages, which then ends.
    second_run: Literal["own", "wait"] = "own"
    #: Largest message between messenger and worker.
    message_mib: PositiveFloat = 4096.0


class Simulation(Table):
    """Size of a simulation; not read in a deployment."""

    clients: PositiveInt = 12
    cpus_per_client: PositiveFloat = 1.0
    gpus_per_client: NonNegative = 0.0


class RunSettings(Table):
    """All settings of a run."""

    run: Run = Run()
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


def known_keys() -> dict[str, Scalar]:
    """Every key of the run config with its default."""
    return to_flat(RunSettings())


def to_flat(settings: RunSettings) -> dict[str, Scalar]:
    """Flatten settings to Flower's dotted keys, in the order of the tables."""
    nested = settings.model_dump(by_alias=True)
    return {
        f"{table}.{key}": value for table, keys in nested.items() for key, value in keys.items()
    }


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
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else " (`rankfit settings` lists all)"
            raise ConfigError(f"unknown setting {key!r}{hint}")
        table, _, name = key.partition(".")
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
