"""What bitsandbytes' layers and the optimizers take, on meta tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from rankfit.adapters.names import WHOLE
from rankfit.estimator.step_spec import StepSpec
from rankfit.tasks.optimizers import build_optimizer

#: Weights that share one scale, and scales that share one of a second level (QLoRA).
BLOCK, NESTED_BLOCK = 64, 256
#: Share of the columns of an input that LLM.int8() multiplies in 16 bits. Its paper
#: (arXiv:2208.07339) finds outliers in 0.1 % of the features of a model.
OUTLIERS = 0.01


class QuantizedLinear(nn.Linear):
    """A frozen layer whose weight lies in ``stored`` tensors; only their bytes are right."""

    scales: Tensor

    def __init__(self, layer: nn.Module, spec: StepSpec) -> None:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor) and isinstance(bias, nn.Parameter | None)
        outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=weight.dtype)
        self.spec = spec
        self.computed = weight.dtype
        stored = _int8(outputs, inputs) if spec.quantization == "int8" else _nf4(spec, weight)
        self.weight = nn.Parameter(stored.pop("weight"), requires_grad=False)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """As bitsandbytes' layer: a product whose backward pass unpacks the weight again."""
        product = _Int8Product if self.spec.quantization == "int8" else _Nf4Product
        result: Tensor = product.apply(x, self)  # type: ignore[no-untyped-call]
        return result


def _int8(outputs: int, inputs: int) -> dict[str, Tensor]:
    """A byte for each weight, a scale for each output."""
    return {
        "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
        "scales": torch.empty(outputs, device="meta"),
    }


def _nf4(spec: StepSpec, weight: Tensor) -> dict[str, Tensor]:
    """Two weights in a byte, a scale for 64 of them, which is quantised again or not."""
    packed, blocks = -(-weight.numel() // 2), -(-weight.numel() // BLOCK)
    stored = {
        "weight": torch.empty(packed, 1, dtype=torch.uint8, device="meta"),
        "code": torch.empty(16, device="meta"),
    }
    if spec.quantization == "nf4-single":
        return stored | {"scales": torch.empty(blocks, device="meta")}
    return stored | {
        "scales": torch.empty(blocks, dtype=torch.uint8, device="meta"),
        "scales_of_scales": torch.empty(-(-blocks // NESTED_BLOCK), device="meta"),
        "code_of_scales": torch.empty(256, device="meta"),
        "offset": torch.empty((), device="meta"),
    }


class _Nf4Product(torch.autograd.Function):
    """bitsandbytes' ``MatMul4Bit``: keeps no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        if layer.spec.accelerator == "cuda":  # on a CPU inside the operator, and not seen
            _unpacked(layer)
        return _linear(x, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = _unpacked(ctx.layer).to(gradient.dtype)
        return torch.matmul(gradient, weight), None


class _Int8Product(torch.autograd.Function):
    """bitsandbytes' ``MatMul8bitFp`` (CPU) and ``MatMul8bitLt`` (GPU): both keep their input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.x = layer, x
        if layer.spec.accelerator == "cpu":
            weight = _scaled(layer, x.dtype)
            return torch.nn.functional.linear(x, weight, layer.bias)
        rows, columns = x.numel() // x.shape[-1], max(1, int(OUTLIERS * x.shape[-1]))
        x = x.reshape(rows, -1)
        small = _int8_input(x)
        ctx.outliers = x.new_empty(rows, columns)
        whole = torch.empty(rows, layer.out_features, dtype=torch.int32, device=x.device)
        result = x.new_empty(rows, layer.out_features)
        del whole, small
        result = result.addmm(ctx.outliers, x.new_empty(columns, layer.out_features))
        return result.view(*ctx.x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shape = ctx.x.shape
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        weight = _scaled(ctx.layer, ctx.x.dtype)
        return torch.matmul(gradient.to(ctx.x.dtype), weight).view(shape), None


def _linear(x: Tensor, layer: QuantizedLinear) -> Tensor:
    return x.new_empty(*x.shape[:-1], layer.out_features)


def _unpacked(layer: QuantizedLinear) -> Tensor:
    """The whole weight in the type of the computation; scales of scales are unpacked first."""
    scales = None
    if layer.spec.quantization == "nf4":
        scales = torch.empty(layer.scales.numel(), device="meta")
    weight = torch.empty(layer.out_features, layer.in_features, dtype=layer.computed, device="meta")
    del scales
    return weight


def _scaled(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    weight = layer.weight.to(dtype)
    return weight.mul_(layer.scales.unsqueeze(1).mul(1.0))


def _int8_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits with their scales, after a search for outliers in fp16."""
    half = x.to(torch.float16)
    scales = torch.empty(len(x), device=x.device)
    rows = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    outliers = half.abs() >= 6.0
    del outliers
    return rows, scales


def _adapted(module: LoraLinear, layer: QuantizedLinear, x: Tensor) -> Tensor:
    """PEFT's layer around a quantised one: it casts and adds in another order than its usual one.

    The result has the type of the base's.
    """
    result: Tensor = layer(x)
    if layer.spec.quantization != "int8":
        result = result.clone()
    # PEFT asks for the autocast of a GPU.
    casts = layer.spec.autocast == "none" or layer.spec.accelerator == "cpu"
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        if casts:
            x = x.to(down.weight.dtype)
        output = up(down(module.lora_dropout[adapter](x))) * module.scaling[adapter]
        result = result + (output.to(result.dtype) if casts else output)
    return result


def quantize(model: PreTrainedModel, spec: StepSpec) -> None:
    """Replace the layers of an empty base that bitsandbytes would, in place.

    All linear layers but the output layer, tied ones, those that the architecture keeps in float32
    (T5's ``wo``), and the heads, which are trained.
    """
    kept = (*get_keys_to_not_convert(model), *spec.heads)
    exact = tuple(model._keep_in_fp32_modules or ())
    for name, module in list(model.named_modules()):
        whole = any(name == each or name.startswith(f"{each}.") for each in kept)
        if name.rpartition(".")[2] in exact:
            module.float()
            continue
        if isinstance(module, nn.Linear | Conv1D) and not whole:
            model.set_submodule(name, QuantizedLinear(module, spec))


def adapt(model: nn.Module) -> None:
    """Let the adapters of quantised layers run as PEFT's for them do."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            layer = module.get_base_layer()
            if isinstance(layer, QuantizedLinear):
                module.forward = partial(_adapted, module, layer)


#: bitsandbytes keeps the state of smaller tensors in float32.
LEAST_8BIT = 4096
#: Numbers that share one float32 scale there.
BLOCK_8BIT = 256

State = dict[str, Tensor]


class StandIn(torch.optim.Optimizer):
    """Takes the memory of an optimizer.

    Parameters
    ----------
    trained : dict of str to nn.Parameter
        By their names in the model.
    make : callable
        From the name and a parameter to its state.
    """

    def __init__(
        self, trained: dict[str, nn.Parameter], make: Callable[[str, Tensor], State]
    ) -> None:
        super().__init__(list(trained.values()), {})
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._make = make

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the state of the parameters that have a gradient and none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    name = self._names[id(parameter)]
                    self.state[parameter] = self._make(name, parameter)


def make_optimizer(spec: StepSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer as it runs there: foreach on a GPU, one tensor at a time on a CPU."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if next(iter(trained.values())).device.type == "meta":
        if spec.optimizer == "adamw-fused":
            return StandIn(trained, partial(_fused, spec.whole_head))
        if spec.optimizer == "adamw-8bit":
            return StandIn(trained, _EightBit())
    # One rate, where those of a method may be several: foreach's temporaries are of a group.
    heads = {name for name in trained if spec.whole_head and not _factor(name)}
    groups: list[dict[str, Any]] = [{"params": [p for n, p in trained.items() if n not in heads]}]
    if heads:
        groups.append({"params": [trained[name] for name in sorted(heads)], WHOLE: True})
    foreach = spec.accelerator == "cuda"
    return build_optimizer(
        spec.optimizer, groups, rate=1e-3, momentum=spec.momentum, foreach=foreach
    )


def _factor(name: str) -> bool:
    return ".lora_" in name


def _fused(whole_head: bool, name: str, parameter: Tensor) -> State:
    if whole_head and not _factor(name):
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros((), device=parameter.device),
        }
    return {
        "step": torch.zeros((), device=parameter.device),  # on the device, unlike foreach's
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class _EightBit:
    """State of AdamW in 8 bits: a byte a number, a scale for 256 of them, two shared code books.

    Both the scale of the last numbers and the switch to float32 below 4096 numbers are no multiples
    of the rank: the scales are rounded up for each unit of rank, and the float32 state of a small
    rank is held at every rank. For each state of a factor that is too much by at most 12 KiB, and
    by 4 bytes a unit of rank where its width is no multiple of 256.
    """

    def __init__(self) -> None:
        self._books: State = {}

    def __call__(self, name: str, parameter: Tensor) -> State:
        if not self._books:
            books = {f"qmap{i}": torch.empty(256, device=parameter.device) for i in (1, 2)}
            self._books.update(books)
        rank = parameter.shape[0] if ".lora_A." in name else 1
        rank = parameter.shape[1] if ".lora_B." in name else rank
        width = parameter.numel() // rank
        if rank == 1 and width < LEAST_8BIT:
            return {f"state{i}": torch.zeros_like(parameter) for i in (1, 2)}
        state = dict(self._books)
        short = 3 * ((LEAST_8BIT - 1) // width) * width
        for i in (1, 2):
            state[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.uint8)
            scales = rank * -(-width // BLOCK_8BIT)
            state[f"absmax{i}"] = torch.zeros(scales, device=parameter.device)
            if short:
                state[f"short{i}"] = torch.empty(short, dtype=torch.uint8, device=parameter.device)
        return state
