"""Fisher scores against the formula, one sample and one log-probability at a time."""

import numpy as np
import pytest
import torch

from rankfit.configs.compose import compose
from rankfit.tasks import load_task
from rankfit.tasks.base_model import load_base, target_modules
from rankfit.tasks.lora import eject, fisher_scores, inject


def test_scores_are_mean_squares_of_log_probability_gradients_over_all_samples() -> None:
    """HRALoRA's code squares the logit's gradient, of the first batch's four samples only."""
    settings = compose(["quickstart"])
    task = load_task(settings)
    base = load_base(settings, task.labels)
    targets = target_modules(base, "default")[:2]
    torch.manual_seed(0)
    model = inject(base, {targets[0]: 2, targets[1]: 3}, scale=1.0, dropout=0.0, heads=())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    rows = np.arange(9)
    found = fisher_scores(model, task.train, rows, torch.device("cpu"))
    assert set(found) == set(targets)
    for target in targets:
        own = [p for n, p in model.named_parameters() if f"{target}.lora_" in n]
        sums = [torch.zeros_like(p) for p in own]
        for row in rows:
            batch = task.train.collate([int(row)])
            logits = model(pixel_values=batch["pixel_values"]).logits
            log_p = torch.log_softmax(logits, 1)[0, batch["labels"][0]]
            for total, gradient in zip(sums, torch.autograd.grad(log_p, own), strict=True):
                total += gradient.square() / len(rows)
        exact = sum(float(t.sum()) for t in sums) / sum(t.numel() for t in sums)
        assert found[target] == pytest.approx(exact, rel=1e-4)
    fewer = fisher_scores(model, task.train, rows[:4], torch.device("cpu"))
    assert fewer[targets[0]] != pytest.approx(found[targets[0]], rel=1e-3)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())
    eject(model)
