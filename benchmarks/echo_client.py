"""A ClientApp of the same messages that imports no torch: what Flower's message hop alone costs.

``deployment.py`` puts it in the place of RankFit's own. It answers the query like RankFit, and a
training with an adapter of the same size.
"""

from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("capabilities")
def capabilities(message: Message, context: Context) -> Message:
    """Answer with the device report."""
    # Imported here: a training needs nothing but Flower.
    from rankfit.client.device import device_report
    from rankfit.configs.settings import from_flat

    settings = from_flat(context.run_config)
    report = device_report(context.node_config, settings, node_id=context.node_id)
    return Message(RecordDict({"device": ConfigRecord(report.to_dict())}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send the adapter back, changed: the SuperLink would not fetch arrays that it knows."""
    adapter = cast(ArrayRecord, message.content["adapter"])
    changed = {name: Array(array.numpy() + np.float32(1e-6)) for name, array in adapter.items()}
    plan = cast(ConfigRecord, message.content["plan"])
    metrics = {
        "num-examples": 1,
        "train-loss": 0.0,
        "train-seconds": 0.0,
        "peak-memory-bytes": cast(int, plan["peak-bytes"]),
    }
    content = {
        "adapter": ArrayRecord(changed),
        "metrics": MetricRecord(metrics),
        "origin": ConfigRecord({"round": plan["round"], "run": plan["run"]}),
    }
    return Message(RecordDict(content), reply_to=message)
