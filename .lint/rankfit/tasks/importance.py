"""Importance of the modules of an adapter: the diagonal of the empirical Fisher information."""

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from rankfit.adapters import names
from rankfit.tasks.adapted import learnt, place
from rankfit.tasks.inject import TRAINED
from rankfit.tasks.task import Split


def fisher_scores(
    model: PeftModel, split: Split, rows: NDArray[np.int64], device: torch.device
) -> dict[str, float]:
    """F of each adapted module: mean over samples, and over its factors' values, of g².

    g = ∂ log p(y|x)/∂θ, one sample at a time, over all samples given (the code published with
    HRALoRA squares the gradient of the logit, of the first batch's four samples only).

    Parameters
    ----------
    model : PeftModel
        With the adapter in it; factors that are frozen count as if they moved. Left as it was.
    rows : NDArray
        Samples of the split.
    """
    factors = _parameters(model)
    was_training = model.training
    model.eval()
    moved = {name: parameter.requires_grad for name, parameter in factors.items()}
    sums = dict.fromkeys(factors, 0.0)
    try:
        for parameter in factors.values():
            parameter.requires_grad_(True)
        for row in rows:
            batch = place(split.collate([row]), model, device)
            loss = model(**batch).loss * learnt(batch["labels"])  # −log p(y|x), up to a constant
            gradients = torch.autograd.grad(loss, list(factors.values()))
            for name, gradient in zip(factors, gradients, strict=True):
                sums[name] += float(gradient.double().square().sum())
    finally:
        for name, parameter in factors.items():
            parameter.requires_grad_(moved[name])
        model.train(was_training)
    totals: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, total in sums.items():
        module = names.parse(name)[0]
        totals[module] = totals.get(module, 0.0) + total
        sizes[module] = sizes.get(module, 0) + factors[name].numel()
    return {module: total / len(rows) / sizes[module] for module, total in totals.items()}


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Factors of the trained adapter under PEFT's saved names."""
    mark = f".{TRAINED}.weight"
    return {
        f"{name.removesuffix(mark)}.weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith((f".lora_A{mark}", f".lora_B{mark}"))
    }
