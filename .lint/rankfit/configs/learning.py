"""The settings of what is learnt: task, model, data, partition, head and local training."""

from typing import Literal, Self

from pydantic import model_validator

from rankfit.configs.table import (
    Count,
    Fraction,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Share,
    Table,
    split_list,
)

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
    """What is learnt."""

    kind: Literal["image-classification", "text-classification", "causal-lm"] = (
        "image-classification"
    )
    #: Labels of text are classes, or numbers (STS-B): one output, squared error.
    problem: Literal["classification", "regression"] = "classification"
    #: Comma-separated figures of an evaluation ("" = the problem's: accuracy, macro-f1, micro-f1;
    #: or pearson, spearman). ``f1`` is that of class 1 of two; ``mcc`` is Matthews' correlation.
    metrics: str = ""
    #: causal-lm: tokens that the loss is taken over.
    loss: Literal["answers", "all"] = "answers"
    #: causal-lm: several examples in one row, each attending to itself alone.
    packing: bool = False
    #: causal-lm: by what the model writes, by which of the choices it finds likeliest, or by its
    #: loss alone.
    evaluate: Literal["generation", "likelihood", "loss"] = "generation"
    #: causal-lm: how the answer is found in what was written: a suite's pattern, or all of it.
    suite: Literal["none", "commonsense"] = "none"
    #: causal-lm: tokens that an evaluation writes at most.
    max_new_tokens: PositiveInt = 32

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

    source: str = "builtin:font-vit"
    revision: str = "main"
    attention: Literal["sdpa", "eager"] = "sdpa"
    precision: Precision = "fp32"
    #: The frozen base in 4 or 8 bits through bitsandbytes (extra ``quantized``). The scales of
    #: ``nf4`` are quantised too, those of ``nf4-single`` are not.
    quantization: Quantization = "none"
    trust_remote_code: bool = False

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

    source: str = "sklearn:digits"
    #: Configuration name on the hub, or the subfolder of a local copy of it ("" = default).
    name: str = ""
    #: Split name on the hub, or file pattern under ``source`` when it is a local folder.
    train: str = "train"
    test: str = "test"
    #: "" = the task's default (image: ``image`` or ``img``; text: ``text``). Two names, separated
    #: by a comma, are a pair of texts.
    input_column: str = ""
    #: causal-lm: a column that groups the examples (such as ``task``), if it is there.
    label_column: str = "label"
    #: Comma-separated names of the classes in the order of their ids ("" = as found in the data).
    #: Nodes that hold files of their own need it unless the files name the classes (ClassLabel).
    class_names: str = ""
    #: Keep only the first N classes (0 = all).
    classes: Count = 0
    #: Share held out for evaluation when there is no test split.
    test_fraction: Fraction = 0.25
    #: Keep only so many examples, drawn from the seed (0 = all).
    train_samples: Count = 0
    test_samples: Count = 0
    #: Tokens per text.
    max_length: PositiveInt = 128
    #: causal-lm: columns ``instruction``, ``input`` (may be absent) and ``output``; or ``messages``
    #: with roles; or ``text`` alone.
    format: Literal["instruction", "messages", "text"] = "instruction"
    #: causal-lm: how an instruction becomes a prompt: Alpaca's words, the tokenizer's own chat
    #: template, or the instruction alone.
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    #: A record that cannot be used stops the run, or is counted and left out.
    bad_records: Literal["refuse", "skip"] = "refuse"


class Partition(Table):
    """How one data set is dealt to simulated clients; ``local`` = each node's own files."""

    kind: Literal["iid", "dirichlet", "pathological", "natural", "quantity", "local"] = "iid"
    #: Of ``dirichlet`` (classes over clients) and ``quantity`` (sizes of the clients).
    alpha: PositiveFloat = 0.3
    classes_per_client: PositiveInt = 2
    #: ``natural``: column whose values (hospitals, users) stay together.
    column: str = ""
    min_samples: Count = 10
    #: Where clients evaluate, the part of a common test set that each measures on: one like the
    #: others' (``even``), or one with the classes of its own training part (``alike``).
    test: Literal["even", "alike"] = "even"

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

    mode: Literal["trained", "frozen", "local"] = "trained"
    #: Comma-separated modules trained whole in place of the classifier, such as ``lm_head``
    #: ("" = the architecture's classifier; a language model has none).
    modules: str = ""
    #: ``local``: folder on the client's machine that keeps its heads ("" = ``heads`` in the run
    #: directory).
    directory: str = ""


class Train(Table):
    """Local training of one client in one round."""

    batch_size: PositiveInt = 32
    epochs: PositiveInt = 1
    #: Optimizer steps per round (0 = whole epochs).
    steps: Count = 0
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 0.0
    #: ``adamw-8bit`` needs bitsandbytes (extra ``quantized``).
    optimizer: Optimizer = "adamw"
    #: Of ``sgd``.
    momentum: Share = 0.0
    #: ``kept``: a client keeps AdamW's second moments from round to round (``moments`` in the run
    #: directory on its machine).
    moments: Literal["reset", "kept"] = "reset"
    #: AdamW's second moments of a head: one for each ``number``, one for each ``tensor``, which
    #: keeps a client from unlearning the classes that it does not have; or as the ``method`` says.
    head_moment: Literal["method", "number", "tensor"] = "method"
    gradient_checkpointing: bool = False
    #: Intra-op CPU threads per client process.
    threads: PositiveInt = 1
    #: Learning rate over the rounds: see :mod:`rankfit.configs.rates`.
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    #: Rounds that the schedule spans (0 = ``run.rounds``, also when that is raised on a resume).
    schedule_rounds: Count = 0
    #: Rounds over which the rate first rises to ``learning-rate``.
    schedule_warm_up: Count = 0
    #: Rate at the end of ``linear`` and ``cosine``, as a share of ``learning-rate``.
    schedule_floor: Share = 0.0
    #: ``step``: the rate is multiplied by the factor every so many rounds.
    schedule_step: PositiveInt = 50
    schedule_factor: Fraction = 0.5
    #: FedProx: μ of the proximal term μ/2·‖θ − θ⁰‖² (0 = none).
    proximal: NonNegative = 0.0
    #: Weight τ of log prior(label) of the client's own data, added to the logits in training
    #: (0 = plain cross entropy).
    label_prior: NonNegative = 0.0
    #: Forward pass in 16 bits where torch.autocast holds it safe; weights stay as they are. With
    #: fp16, here or in ``model.precision``, the loss is scaled.
    autocast: Autocast = "none"
    #: Backend of torch.compile (``inductor``), anew for each training ("" = not compiled).
    compile: str = ""
