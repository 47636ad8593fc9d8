"""The settings of what is learned: task, model, data, partition, head and local training."""

import codecs
import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: One name of a list: in double quotes, or up to the next comma.
_NAME = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*(?:,|$)|([^",][^,]*|)(?:,|$))')


def split_list(text: str) -> tuple[str, ...]:
    """Split comma-separated text; blanks around items and empty items are dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def split_names(text: str) -> tuple[str, ...]:
    """Split comma-separated names, of which one in double quotes is kept as it is.

    Inverse of :func:`join_names`.

    Raises
    ------
    ValueError
        If a quote is not closed, or a name is there twice.
    """
    names: list[str] = []
    place = 0
    while place < len(text):
        found = _NAME.match(text, place)
        if found is None:
            raise ValueError(f"{text!r} is no list of names: a double quote is not closed")
        quoted, plain = found.groups()
        name = plain.strip() if quoted is None else quoted.replace('""', '"')
        if name in names:
            raise ValueError(f"{name!r} is there twice in {text!r}")
        names += [name] if name else []
        place = found.end()
    return tuple(names)


def join_names(names: Iterable[object]) -> str:
    """Write names separated by commas, in double quotes where they need them."""
    return ",".join(map(_quoted, map(str, names)))


def _quoted(name: str) -> str:
    plain = name == name.strip() and not set(name) & set(',"')
    return name if plain else '"' + name.replace('"', '""') + '"'


def split_numbers(text: str, key: str) -> tuple[float, ...]:
    """Split comma-separated numbers.

    Raises
    ------
    ValueError
        If an item is not a number.
    """
    try:
        return tuple(float(item) for item in split_list(text))
    except ValueError as error:
        raise ValueError(f"{key}: expected comma-separated numbers, got {text!r}") from error


def kebab(name: str) -> str:
    """Write a field's name as the run config does."""
    return name.replace("_", "-")


#: Names that other libraries have for a setting: Hugging Face's Trainer and PEFT, Flower, torch.
_SYNONYMS = {
    "train.learning-rate": "lr eta step-size",
    "train.batch-size": "bs batch per-device-train-batch-size train-batch-size micro-batch-size",
    "train.epochs": "epoch num-epochs num-train-epochs local-epochs n-epochs",
    "train.steps": "max-steps local-steps num-steps",
    "train.weight-decay": "wd decay l2",
    "train.max-grad-norm": "clip grad-clip gradient-clip-val clip-grad-norm max-norm",
    "train.optimizer": "optim opt",
    "train.schedule": "lr-scheduler lr-scheduler-type scheduler",
    "train.schedule-warm-up": "warmup warmup-steps warm-up",
    "train.proximal": "mu proximal-mu fedprox",
    "train.autocast": "amp mixed-precision bf16 fp16",
    "train.gradient-checkpointing": "checkpointing grad-checkpointing activation-checkpointing",
    "lora.rank": "r lora-r lora-rank",
    "lora.alpha": "lora-alpha",
    "lora.dropout": "lora-dropout",
    "lora.targets": "target-modules modules",
    "lora.scaling": "rslora use-rslora",
    "head.modules": "modules-to-save",
    "model.source": "name-or-path model-name model-name-or-path base-model model-id pretrained",
    "model.precision": "dtype torch-dtype",
    "model.quantization": "load-in-4bit load-in-8bit quantize bits",
    "data.source": "dataset dataset-name data-path data-dir",
    "data.max-length": "max-seq-length max-seq-len seq-len cutoff-len block-size max-len",
    "data.input-column": "text-column text-field dataset-text-field image-column",
    "data.label-column": "label target-column labels",
    "data.template": "chat-template prompt-template",
    "task.packing": "pack sample-packing",
    "task.kind": "task type",
    "run.rounds": "num-rounds num-server-rounds n-rounds",
    "run.seed": "random-seed random-state",
    "run.directory": "output-dir out-dir save-dir",
    "run.report-to": "tracker trackers log-with logger",
    "best.metric": "metric-for-best-model monitor load-best-model-at-end",
    "best.mode": "greater-is-better",
    "best.patience": "early-stopping early-stopping-patience",
    "simulation.clients": "num-clients n-clients num-supernodes nodes",
    "server.clients-per-round": "sample-clients participation",
    "server.min-clients": "min-fit-clients min-available-clients",
    "partition.alpha": "dirichlet-alpha dirichlet",
    "method.name": "strategy algorithm aggregation",
}
_BY_SYNONYM = {name: key for key, names in _SYNONYMS.items() for name in names.split()}


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The setting that a user may have meant by a key that there is not; None = no idea.

    A name of another library comes first, then the same name in another table, then a misspelling.
    """
    keys = list(known)
    table, _, name = kebab(key.strip().lstrip("-").lower()).rpartition(".")
    written = f"{table}.{name}" if table else name
    if written in keys:
        return written
    if name in _BY_SYNONYM:
        return _BY_SYNONYM[name]
    same = [one for one in keys if one.rpartition(".")[2] == name]
    if same:
        return same[0]
    close = difflib.get_close_matches(written, keys, n=1, cutoff=0.8)
    if not close:
        names = {one.rpartition(".")[2]: one for one in reversed(keys)}
        close = [names[one] for one in difflib.get_close_matches(name, names, n=1, cutoff=0.8)]
    return close[0] if close else None


class Table(BaseModel):
    """One table of the run config; frozen, unknown keys refused, keys in kebab-case."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def setting(default: object, description: str, *, unit: str = "") -> Any:
    """Declare one setting of a table.

    Its type and range are the annotation's. docs/settings.md, the JSON schema and the comments of
    ``rankfit settings`` are made from this.

    Parameters
    ----------
    default : object
        A product's: nothing simulated.
    description : str
        One sentence in plain words.
    unit : str
        "" = none, or what the name ends with (``-seconds``, ``-mib``, ``-mbps``).
    """
    return Field(default, description=description, json_schema_extra={"unit": unit})


PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


#: Choices that the estimator's step spec and the loading of models share with the settings.
Precision = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["none", "nf4", "nf4-single", "int8"]
Autocast = Literal["none", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw-fused", "adamw-8bit", "sgd", "adafactor"]
#: Those that are torch's AdamW, whose second moments can be kept, and shared in a head.
TORCH_ADAMW = ("adamw", "adamw-fused")

#: Bits of one frozen weight in each precision of a base, scales of the blocks included.
BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "nf4-single": 4.5, "nf4": 4.127}
#: Those in which bitsandbytes keeps it.
QUANTIZED = ("int8", "nf4-single", "nf4")

#: Figures of a classifier or of a regression, by name.
CLASS_METRICS = ("accuracy", "macro-f1", "micro-f1", "f1", "mcc")
NUMBER_METRICS = ("pearson", "spearman", "mse")


class Task(Table):
    """What is learned."""

    kind: Literal["image-classification", "text-classification", "causal-lm"] = setting(
        "image-classification", "A classifier of images or of texts, or a language model."
    )
    problem: Literal["classification", "regression"] = setting(
        "classification",
        "Labels of text are classes, or numbers (STS-B): one output, squared error.",
    )
    metrics: str = setting(
        "",
        "Comma-separated metrics of an evaluation (empty = the problem's: accuracy, "
        "macro-f1, micro-f1; or pearson, spearman); `f1` is that of class 1 of two, `mcc`"
        " is Matthews' correlation.",
    )
    loss: Literal["answers", "all"] = setting(
        "answers", "causal-lm: tokens that the loss is taken over."
    )
    packing: bool = setting(
        False, "causal-lm: several examples in one row, each attending to itself alone."
    )
    evaluate: Literal["generation", "likelihood", "loss"] = setting(
        "generation",
        "causal-lm: an evaluation judges what the model writes, which of the choices it "
        "finds likeliest, or its loss alone.",
    )
    suite: Literal["none", "commonsense"] = setting(
        "none",
        "causal-lm: how the answer is found in what was written: by a suite's pattern, or"
        " all of it.",
    )
    max_new_tokens: PositiveInt = setting(
        32, "causal-lm: most tokens that an evaluation writes for one question.", unit="tokens"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.problem == "regression" and self.kind != "text-classification":
            raise ValueError(f"task.problem regression is for text-classification, not {self.kind}")
        if self.packing and self.kind != "causal-lm":
            raise ValueError(f"task.packing is for causal-lm, not {self.kind}")
        known = NUMBER_METRICS if self.problem == "regression" else CLASS_METRICS
        for name in split_list(self.metrics):
            if self.kind == "causal-lm" or name not in known:
                choices = "none for causal-lm" if self.kind == "causal-lm" else ", ".join(known)
                raise ValueError(f"task.metrics: unknown figure {name!r}; expected {choices}")
        return self


class Model(Table):
    """The base model.

    ``source`` is ``builtin:font-vit``, ``package:NAME/SUBFOLDER`` (inside an installed Python
    package), ``config:FILE.json`` (random weights from a config), a local folder, or a hub id.
    """

    source: str = setting(
        "builtin:font-vit",
        "`builtin:font-vit`, `package:NAME/SUBFOLDER` (inside an installed Python "
        "package), `config:FILE.json` (random weights), a local folder, or a hub id.",
    )
    revision: str = setting("main", "Branch, tag or commit on the hub.")
    attention: Literal["sdpa", "eager"] = setting(
        "sdpa", "Implementation of attention: torch's fused one, or plain matrix products."
    )
    precision: Precision = setting("fp32", "Number type of the base model's weights.")
    quantization: Quantization = setting(
        "none",
        "Store the frozen base in 4 or 8 bits through bitsandbytes (extra `quantized`); "
        "the scales of `nf4` are quantised too, those of `nf4-single` are not.",
    )
    trust_remote_code: bool = setting(False, "Run model code that comes from the hub.")

    @property
    def base_precision(self) -> str:
        """What the frozen weights are kept in: a key of :data:`BITS`."""
        return self.precision if self.quantization == "none" else self.quantization

    def at(self, precision: str) -> Self:
        """The same model with its frozen weights in another precision.

        A quantised base is computed in 16 bits: in ``precision`` where that has 16, else in bf16.
        """
        if precision == self.base_precision:
            return self
        if precision in QUANTIZED:
            computed = "bf16" if self.precision == "fp32" else self.precision
            return self.model_copy(update={"precision": computed, "quantization": precision})
        return self.model_copy(update={"precision": precision, "quantization": "none"})


class Data(Table):
    """The data set: ``sklearn:digits``, a local file or folder, or a hub id."""

    source: str = setting(
        "sklearn:digits", "Data set: `sklearn:digits`, a local file or folder, or a hub id."
    )
    name: str = setting(
        "",
        "Configuration name on the hub, or the subfolder of a local copy of it (empty = default).",
    )
    train: str = setting(
        "train", "Training split: its name on the hub, or a file pattern in a local folder."
    )
    test: str = setting(
        "test", "Test split, likewise (empty = `data.test-fraction` of the training split)."
    )
    input_column: str = setting(
        "",
        "Column of the input (empty = the task's default: `image`, `img`, `file_name` or `path`; "
        "`text`; causal-lm: as `data.format` says); two names, separated by a comma, are a pair of "
        "texts; of causal-lm two are question and answer, three instruction, input and output.",
    )
    label_column: str = setting(
        "label",
        "Column of the label; causal-lm: a column that groups the examples (such as "
        "`task`), if it is there.",
    )
    encoding: str = setting(
        "",
        "Encoding of text files (empty = found: UTF-8 or UTF-16, else cp1252).",
    )
    separator: str = setting(
        "",
        "What separates the cells of CSV and TSV files: one character, or `tab` (empty = found).",
    )
    quotes: Literal["auto", "quoted", "text"] = setting(
        "auto",
        "Quotes in CSV and TSV files: around cells, or text in themselves; `auto` is what gives "
        "every row the header's cells.",
    )
    class_names: str = setting(
        "",
        "Comma-separated names of the classes in the order of their ids, one with a comma in "
        "double quotes, or all as a TOML list (empty = as found in the data); nodes "
        "with files of their own need it unless the files name the classes.",
    )
    classes: Count = setting(0, "Keep only the first N classes (0 = all).", unit="classes")
    test_fraction: Fraction = setting(
        0.25, "Share held out for evaluation where there is no test split."
    )
    train_samples: Count = setting(
        0, "Keep only so many training examples, drawn from the seed (0 = all).", unit="samples"
    )
    test_samples: Count = setting(
        0, "Keep only so many test examples, drawn from the seed (0 = all).", unit="samples"
    )
    max_length: PositiveInt = setting(
        128, "Longest text; the rest of a longer one is cut off.", unit="tokens"
    )
    format: Literal["auto", "instruction", "messages", "sharegpt", "prompt-completion", "text"] = (
        setting(
            "auto",
            "causal-lm: what a record is, by its columns where this is `auto`: an instruction "
            "(with `output` and maybe `input`), a conversation (`messages`, or `conversations` as "
            "ShareGPT has them), prompt and completion as they are, or plain text.",
        )
    )
    template: Literal["alpaca", "chat", "plain"] = setting(
        "alpaca",
        "causal-lm: how an instruction becomes a prompt: Alpaca's words, the tokenizer's "
        "own chat template, or the instruction alone.",
    )
    bad_records: Literal["refuse", "skip"] = setting(
        "refuse", "A record that cannot be used stops the run, or is counted and left out."
    )

    @field_validator("class_names")
    @classmethod
    def _names(cls, text: str) -> str:
        split_names(text)
        return text

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        try:
            codecs.lookup(name or "utf-8")
        except LookupError as error:
            raise ValueError(f"Python knows no encoding {name!r}") from error
        return name

    @field_validator("separator")
    @classmethod
    def _one_character(cls, text: str) -> str:
        text = "\t" if text in ("tab", "\\t") else text
        if len(text) > 1 or text in ('"', "\n", "\r"):
            raise ValueError(f"{text!r} cannot separate cells; expected one character or tab")
        return text


class Partition(Table):
    """How one data set is dealt to simulated clients; ``local`` = each node's own files."""

    kind: Literal["iid", "dirichlet", "pathological", "natural", "quantity", "local"] = setting(
        "iid",
        "How one data set is divided among the clients; `local`: every node has its own files.",
    )
    alpha: PositiveFloat = setting(
        0.3,
        "Concentration of `dirichlet` (classes over clients) and `quantity` (sizes of the"
        " clients); smaller is less even.",
    )
    classes_per_client: PositiveInt = setting(
        2, "`pathological`: classes that each client holds.", unit="classes"
    )
    column: str = setting("", "`natural`: column whose values (hospitals, users) stay together.")
    min_samples: Count = setting(10, "Fewest samples of a client.", unit="samples")
    test: Literal["even", "alike"] = setting(
        "even",
        "Where clients evaluate, the part of a common test set that each measures on: one"
        " like the others' (`even`), or one with the classes of its own training part "
        "(`alike`).",
    )

    @model_validator(mode="after")
    def _column(self) -> Self:
        if (self.kind == "natural") != bool(self.column):
            raise ValueError(
                "partition.column and partition.kind natural go together (got kind "
                f"{self.kind!r}, column {self.column!r})"
            )
        return self


class Head(Table):
    """The classification head: trained and averaged beside the adapters, frozen, or personal.

    ``local``: every client trains a head of its own, which it keeps; the adapters are shared.
    """

    mode: Literal["trained", "frozen", "local"] = setting(
        "trained",
        "The classification head is trained and averaged with the adapters, frozen, or "
        "`local`: every client trains and stores one of its own.",
    )
    modules: str = setting(
        "",
        "Comma-separated modules that are trained whole in place of the classifier, such "
        "as `lm_head` (empty = the architecture's classifier; a language model has none).",
    )
    directory: str = setting(
        "",
        "`local`: folder on the client's machine that stores its heads (empty = `heads` "
        "in the run directory).",
    )


class Train(Table):
    """Local training of one client in one round."""

    batch_size: PositiveInt = setting(
        32, "Samples of one optimizer step; a plan may split it into micro-batches.", unit="samples"
    )
    epochs: PositiveInt = setting(1, "Passes over a client's data in one round.", unit="epochs")
    steps: Count = setting(0, "Optimizer steps in one round (0 = whole epochs).", unit="steps")
    learning_rate: PositiveFloat = setting(
        1e-3, "Learning rate of local training, before the schedule."
    )
    weight_decay: NonNegative = setting(0.0, "Decoupled weight decay of local training.")
    max_grad_norm: NonNegative = setting(0.0, "Clip the gradient to this norm (0 = not clipped).")
    optimizer: Optimizer = setting(
        "adamw", "Optimizer of local training; `adamw-8bit` needs bitsandbytes (extra `quantized`)."
    )
    momentum: Share = setting(0.0, "Momentum of `sgd`.")
    moments: Literal["reset", "kept"] = setting(
        "reset",
        "`kept`: a client stores AdamW's second moments from round to round (in `moments`"
        " in the run directory on its machine).",
    )
    head_moment: Literal["method", "number", "tensor"] = setting(
        "method",
        "AdamW's second moments of a head: one for each `number`; one for each `tensor`, "
        "which keeps a client from unlearning the classes that it does not have; or as "
        "the `method` says.",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass instead of storing them; a plan may "
        "switch it on.",
    )
    threads: PositiveInt = setting(1, "Intra-op CPU threads of a client process.", unit="threads")
    schedule: Literal["constant", "linear", "cosine", "step"] = setting(
        "constant", "How the learning rate changes over the rounds."
    )
    schedule_rounds: Count = setting(
        0,
        "Rounds that the schedule spans (0 = `run.rounds`, also when that is raised on a resume).",
        unit="rounds",
    )
    schedule_warm_up: Count = setting(
        0, "Rounds over which the rate first rises to `train.learning-rate`.", unit="rounds"
    )
    schedule_floor: Share = setting(
        0.0, "Rate at the end of `linear` and `cosine`, as a share of `train.learning-rate`."
    )
    schedule_step: PositiveInt = setting(
        50,
        "`step`: rounds after which the rate is multiplied by `train.schedule-factor`.",
        unit="rounds",
    )
    schedule_factor: Fraction = setting(0.5, "`step`: what the rate is multiplied by.")
    proximal: NonNegative = setting(
        0.0, "FedProx: μ of the proximal term μ/2·‖θ − θ⁰‖² (0 = none)."
    )
    label_prior: NonNegative = setting(
        0.0,
        "Weight τ of log prior(label) of the client's own data, added to the logits in "
        "training (0 = plain cross entropy).",
    )
    autocast: Autocast = setting(
        "none",
        "Forward pass in 16 bits where torch.autocast holds it safe, while weights stay "
        "as they are; with fp16, here or in `model.precision`, the loss is scaled.",
    )
    compile: str = setting(
        "", "Backend of torch.compile (`inductor`), anew for each training (empty = not compiled)."
    )
