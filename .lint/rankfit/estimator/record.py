"""One recording: every allocation and release of a training step on meta tensors."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rankfit.configs.settings import ConfigError
from rankfit.estimator.autocast import autocast_on_meta
from rankfit.estimator.kernels import MATMULS, SCRATCH, aten, kernels
from rankfit.estimator.live import LiveMemory
from rankfit.estimator.spec import StepSpec
from rankfit.estimator.step import Phase, build, empty_batch, run_steps


class TraceError(ConfigError):
    """A model whose training step cannot be traced, or has no closed form in the ranks."""


#: Sizes that the calibration decides, in place of a tensor's shape.
WORKSPACE, SCRATCHPAD = "workspace", "scratch"


#: Operators whose result is like their operands where these are alike. Torch's own computation of
#: it, in Python, is a third of the time of a recording.
ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
#: The same of one operand; what else they take is numbers.
UNARY = frozenset(
    {
        aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.neg.default,
        aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sqrt.default,
        aten.rsqrt.default,
    }
)  # fmt: skip
#: Operators of an optimizer that write where their first operand lies.
IN_PLACE = frozenset(
    {
        aten.addcmul_.default, aten.addcdiv_.default, aten.lerp_.Scalar, aten.mul_.Tensor,
        aten.add_.Tensor,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Allocation:
    """One storage: who asked for it, its bytes, its shape; ``term`` if a calibration sizes it."""

    operator: str
    nbytes: int
    shape: tuple[int, ...]
    term: str = ""


@dataclass(frozen=True)
class Recording:
    """Allocations, and the events over them in order.

    Attributes
    ----------
    events : list of (int, bool, str)
        Index of the allocation, True as it begins and False as it ends, and the phase.
    trained, state : list of int
        Allocations that are trained parameters, and the optimizer's state.
    """

    allocations: list[Allocation]
    events: list[tuple[int, bool, Phase]]
    trained: list[int]
    state: list[int]


class Recorder(LiveMemory):  # type: ignore[no-untyped-call]
    """Live memory that remembers; also answers for the data that meta tensors do not have."""

    def __init__(self, spec: StepSpec) -> None:
        # On a GPU the optimizer's step counters lie on the host; on a CPU they count.
        super().__init__(
            devices=frozenset({"meta"} if spec.accelerator == "cuda" else {"meta", "cpu"})
        )
        self.spec = spec
        self.phase: Phase = "load"
        self.allocations: list[Allocation] = []
        self.events: list[tuple[int, bool, Phase]] = []
        self._index: dict[int, int] = {}
        self._operator = ""
        self._threads: set[bool] = set()

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        self.phase = phase

    def index(self, tensor: torch.Tensor) -> int:
        """Index of a live tensor's allocation."""
        return self._index[tensor.untyped_storage()._cdata]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._value(args[0])
        self._operator = str(func)
        backward = self.phase == "backward"  # in torch's own thread; all else in one
        if self.spec.accelerator == "cuda" and func in MATMULS and backward not in self._threads:
            self._threads.add(backward)
            self._begin(Allocation(str(func), 1, (), WORKSPACE))
        if self.phase == "optimizer" and func in IN_PLACE and args[0].device.type == "meta":
            return args[0]
        other = args[1] if func in ELEMENTWISE else 1.0
        if (func in ELEMENTWISE or func in UNARY) and _alike(args[0], other):
            func, args, kwargs = torch.empty_like, (args[0],), None
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.spec.accelerator == "cuda" and func in SCRATCH:
            self._end(self._begin(Allocation(str(func), SCRATCH[func](args), (), SCRATCHPAD)))
        return result

    def allocated(self, storage: int, tensor: torch.Tensor, nbytes: int) -> None:
        """Record a new storage."""
        super().allocated(storage, tensor, nbytes)
        self._index[storage] = self._begin(Allocation(self._operator, nbytes, tuple(tensor.shape)))

    def released(self, storage: int, nbytes: int) -> None:
        """Record the end of a storage."""
        super().released(storage, nbytes)
        self._end(self._index.pop(storage))

    def _begin(self, allocation: Allocation) -> int:
        self.allocations.append(allocation)
        self.events.append((len(self.allocations) - 1, True, self.phase))
        return len(self.allocations) - 1

    def _end(self, index: int) -> None:
        self.events.append((index, False, self.phase))

    def _value(self, scalar: torch.Tensor) -> bool | float:
        """Answer ``mask.all()``: True when no batch holds padding. An optimizer may read norms."""
        if self.phase == "optimizer":
            return 0.0
        if scalar.dtype != torch.bool:
            raise TraceError(
                f"this model reads a {scalar.dtype} value out of a tensor to decide what it runs; "
                "the trace has no data to answer with, so its memory cannot be estimated"
            )
        return not self.spec.padded


def _alike(one: Any, other: Any) -> bool:
    """Whether two operands have a result like the first: same layout and type, or a number."""
    if not isinstance(one, torch.Tensor) or one.device.type != "meta" or not one.dim():
        return False
    if not one.is_floating_point() or not one.is_contiguous():
        return False
    if isinstance(other, torch.Tensor) and other.dim():
        same_layout = other.shape == one.shape and other.stride() == one.stride()
        return same_layout and other.dtype == one.dtype and other.device == one.device
    # A number, or a tensor of no dimension, does not change the type of floating-point numbers.
    return not (
        isinstance(other, complex) or (isinstance(other, torch.Tensor) and other.is_complex())
    )


def record(
    spec: StepSpec, ranks: Mapping[str, int], tail_ranks: Mapping[str, int] | None = None
) -> Recording:
    """Run the training step of a spec on the meta device at these ranks.

    Raises
    ------
    TraceError
        If an operator has no implementation for meta tensors, or the model reads a number out of
        one to decide what it runs.
    ModelError
        If the model cannot be built or adapted.
    """
    model = build(spec, ranks, tail_ranks)
    recorder = Recorder(spec)
    recorder.baseline(model)
    trained = [recorder.index(p) for p in model.parameters() if p.requires_grad]
    try:
        with collector_paused(), kernels(spec.accelerator), _casts(spec), recorder:
            optimizer = run_steps(spec, model, lambda: empty_batch(spec), recorder.enter)
    except (NotImplementedError, RuntimeError) as error:
        if not isinstance(error, NotImplementedError) and "fake impl" not in str(error):
            raise
        raise TraceError(
            f"{str(error).splitlines()[0]} The memory of this model cannot be traced: register a "
            "meta implementation (torch.library.register_fake), or set model.attention=eager if it "
            "is an attention kernel"
        ) from error
    state = [
        recorder.index(value)
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.device.type in recorder.devices
    ]
    # What dies with this function is no part of the step.
    shared_once = list(dict.fromkeys(state))
    return Recording(list(recorder.allocations), list(recorder.events), trained, shared_once)


def _casts(spec: StepSpec) -> AbstractContextManager[None]:
    return nullcontext() if spec.autocast == "none" else autocast_on_meta(spec.accelerator)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from releasing tensors at a moment that differs between runs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
