"""The learning rate of a round."""

import math

from rankfit.configs.settings import RunSettings


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
