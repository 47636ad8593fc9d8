"""One recording: every allocation and release of a training step, and the bytes that are alive."""

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from rankfit.configs.settings import ConfigError
from rankfit.estimator.meta_kernels import MATMULS, aten, autocast_on_meta, kernels, scratch
from rankfit.estimator.step import Phase, build, empty_batch, filled_batch, run_steps
from rankfit.estimator.step_spec import StepSpec

ALL_DEVICES = frozenset({"cpu", "meta", "cuda"})


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which every tensor storage is counted from its allocation to its release.

    A storage counts once whatever the number of its views, with its bytes as asked for (no
    rounding). What an operator allocates and releases inside its kernel is not seen. Tensors that
    exist before the context is entered count from :meth:`count` or :meth:`baseline`.

    Parameters
    ----------
    cap_bytes : int, optional
        Budget of a simulated device: an operator that takes the live bytes above it raises
        ``torch.OutOfMemoryError``. None = no budget.
    devices : frozenset of str
        Device types whose storages are counted.

    Attributes
    ----------
    current, peak : int
        Live bytes now, and at most since the start or the last :meth:`reset_peak`.

    Examples
    --------
    >>> with LiveMemory(cap_bytes=256 * 2**20).baseline(model) as live:
    ...     model(**batch).loss.backward()
    >>> live.peak
    """

    def __init__(
        self, *, cap_bytes: int | None = None, devices: frozenset[str] = ALL_DEVICES
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if cap_bytes is not None and cap_bytes <= 0:
            raise ValueError(f"cap_bytes is {cap_bytes}; expected bytes above 0, or None")
        self.cap_bytes = cap_bytes
        self.devices = devices
        self.current = 0
        self.peak = 0
        #: Storage identity → weak reference whose callback reports the release.
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def baseline(self, model: torch.nn.Module) -> Self:
        """Count what a model already holds: parameters, buffers and gradients."""
        self.count(model.parameters())
        self.count(model.buffers())
        return self.count(p.grad for p in model.parameters() if p.grad is not None)

    def count(self, tensors: Iterable[torch.Tensor]) -> Self:
        """Count tensors that exist already, a batch for instance; counted ones are skipped."""
        for tensor in tensors:
            self._see(tensor)
        return self

    def reset_peak(self) -> None:
        """Forget the peak: it starts again at the bytes live now."""
        self.peak = self.current

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see_all(result)
        if self.cap_bytes is not None and self.current > self.cap_bytes:
            raise torch.OutOfMemoryError(
                f"{func} took the live tensors to {self.current} bytes; this device is declared "
                f"to have {self.cap_bytes}"
            )
        return result

    def allocated(self, storage: int, tensor: torch.Tensor, nbytes: int) -> None:
        """Note a new storage; subclasses extend it to record."""
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def released(self, storage: int, nbytes: int) -> None:
        """Note the end of a storage; subclasses extend it to record."""
        self.current -= nbytes

    def _see_all(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for item in result:
                self._see_all(item)

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type not in self.devices:
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._live:
            return
        nbytes = storage.nbytes()

        def forget(_: object) -> None:
            del self._live[identity]
            self.released(identity, nbytes)

        self._live[identity] = weakref.ref(storage, forget)
        self.allocated(identity, tensor, nbytes)


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


#: Operators that make data out of numbers.
FACTORIES = frozenset(
    {
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default,
        aten.ones.default, aten.zeros.default, aten.scalar_tensor.default,
    }
)  # fmt: skip
#: Numbers in a tensor whose data are followed, at most.
KNOWN_NUMBERS = 2**22


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


class KnownValues:
    """Data of those meta tensors that follow from the batch alone, computed on the CPU beside.

    A model reads some of them to decide what it runs: whether a batch is padded, how many of its
    tokens attend globally. What depends on weights is not known.
    """

    def __init__(self) -> None:
        self._data: Any = WeakIdKeyDictionary()

    def set(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        """Know a tensor's data."""
        self._data[tensor] = data

    def get(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Data of a tensor; None = not known."""
        found: torch.Tensor | None = self._data.get(tensor)
        return found

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute an operator on known data; None where not all of it is known."""
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if not given and func not in FACTORIES:
            return None
        if any(each.device.type == "meta" and self.get(each) is None for each in given):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None

        def host(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                return self.get(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        try:
            return func(*tree_map(host, args), **tree_map(host, dict(kwargs)))
        except (NotImplementedError, RuntimeError):
            return None  # no CPU kernel, or none for this type

    def keep(self, func: Any, args: tuple[Any, ...], result: Any, data: Any) -> None:
        """Know the results of an operator, or no longer know what it wrote into."""
        if data is None:
            if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
                self._data.pop(args[0], None)
            return
        for tensor, own in zip(tree_leaves(result), tree_leaves(data), strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            if tensor.shape == own.shape and own.numel() <= KNOWN_NUMBERS:
                self._data[tensor] = own


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
        self._known = KnownValues()

    def batch(self) -> dict[str, torch.Tensor]:
        """Make the next batch; its data are known."""
        batch = empty_batch(self.spec)
        with _disable_current_modes():  # what is known is no part of the step
            for name, data in filled_batch(self.spec).items():
                self._known.set(batch[name], data)
        return batch

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
        operator, known = func, self._known.follow(func, args, kwargs or {})
        if func is aten.nonzero.default and known is not None:
            func, args = aten.empty.memory_format, (list(known.shape),)
            kwargs = {"dtype": known.dtype, "device": torch.device("meta")}
        self._operator = str(func)
        backward = self.phase == "backward"  # in torch's own thread; all else in one
        if self.spec.accelerator == "cuda" and func in MATMULS and backward not in self._threads:
            self._threads.add(backward)
            self._begin(Allocation(str(func), 1, (), WORKSPACE))
        written = self.phase == "optimizer" and func in IN_PLACE
        if written and args[0].device.type == "meta":
            return args[0]
        other = args[1] if func in ELEMENTWISE else 1.0
        if (func in ELEMENTWISE or func in UNARY) and _alike(args[0], other):
            func, args, kwargs = torch.empty_like, (args[0],), None
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._known.keep(operator, args, result, known)
        if self.spec.accelerator == "cuda" and (inside := scratch(func, args, self.spec.family)):
            taken = [
                self._begin(Allocation(str(func), nbytes, (), SCRATCHPAD))
                for nbytes in inside
                if nbytes
            ]
            for index in reversed(taken):
                self._end(index)
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
        """Answer what a model reads: what is known, else as ``mask.all()``; and norms."""
        known = self._known.get(scalar)
        if known is not None:
            return known.item()
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
    spec: StepSpec, ranks: Mapping[str, int], remainder_ranks: Mapping[str, int] | None = None
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
    model = build(spec, ranks, remainder_ranks)
    recorder = Recorder(spec)
    recorder.baseline(model)
    trained = [recorder.index(p) for p in model.parameters() if p.requires_grad]
    try:
        with collector_paused(), kernels(spec.accelerator, spec.family), _casts(spec), recorder:
            optimizer = run_steps(spec, model, recorder.batch, recorder.enter)
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
