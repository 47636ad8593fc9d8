"""What became of each client in a round, and the totals of a round."""

from collections.abc import Iterable
from dataclasses import dataclass

from rankfit.configs.settings import RunSettings
from rankfit.strategies.replies import Metrics


@dataclass(frozen=True)
class Outcome:
    """What became of one client in a round.

    Attributes
    ----------
    client : str
        Name of the client.
    rank : int
        Rank that it was asked to train.
    merged : bool
        Whether its update is part of the merge.
    reason : str
        Why not ("" when merged).
    metrics : Mapping[str, int | float]
        What it measured, as it said (empty when nothing came).
    upload_bytes, download_bytes : int
        Bytes of adapter from and to it.
    parameters : int
        Values that it was asked to train.
    """

    client: str
    rank: int
    merged: bool
    reason: str
    metrics: Metrics
    upload_bytes: int
    download_bytes: int
    parameters: int = 0


def summarise(outcomes: Iterable[Outcome]) -> dict[str, int | float]:
    """Totals of a round: loss and seconds weighted or summed over the merged updates."""
    listed = list(outcomes)
    merged = [outcome for outcome in listed if outcome.merged]
    samples = sum(float(o.metrics["num-examples"]) for o in merged)
    weighted = sum(
        float(o.metrics.get("train-loss", 0.0)) * float(o.metrics["num-examples"]) for o in merged
    )
    total: dict[str, int | float] = {
        "updates": len(merged),
        "dropped": len(listed) - len(merged),
        "num-examples": int(samples),
        "upload-bytes": sum(o.upload_bytes for o in listed),
        "download-bytes": sum(o.download_bytes for o in listed),
        "trained-parameters": sum(o.parameters for o in listed),
    }
    return total | ({"train-loss": weighted / samples} if samples else {})


def spent(settings: RunSettings, metrics: Metrics) -> tuple[float, int]:
    """Seconds of training and samples trained on in a round, as its metrics say."""
    held, train = int(metrics["num-examples"]), settings.train
    examples = train.steps * min(train.batch_size, held) if train.steps else train.epochs * held
    return float(metrics.get("train-seconds", 0.0)), examples
