"""HRALoRA's Table IV on a GPU: each component of the estimate beside the allocator's figure."""

import json

import pytest

from tests.stub_gpu.gpu import ROOT, Gpu, environment, run

COMPONENTS = """
import json, sys
from benchmarks.gpu_memory import MODELS, TRACES, Case, spec_of
from rankfit.estimator.calibration import Calibration
from rankfit.estimator.components import measure_components
from rankfit.estimator.memory import Footprint
capability = sys.argv[1]
for name in MODELS:
    for precision, checkpointing in (("fp32", False), ("bf16", True)):
        case = Case(name, "sdpa", precision, checkpointing, 16, MODELS[name][2])
        spec = spec_of(case, capability)
        footprint = Footprint((TRACES(spec),), Calibration.cuda(capability))
        ranks = dict.fromkeys(spec.targets, 16)
        split, replay = footprint.breakdown(ranks), footprint.replays(16)[0]
        print(json.dumps([vars(split), replay.reserved, measure_components(spec, ranks)]))
"""
FEDERATION = """
import sys
from pathlib import Path
from tests.server.federation import run, settings_for
run(settings_for(Path(sys.argv[1]), "gpu", "fleet.memory-mib=", "run.rounds=1"))
"""


@pytest.mark.parametrize("capability", ["8.9", "9.0"])
def test_every_component_is_within_a_hundredth_of_its_estimate(on, capability):
    program = COMPONENTS.replace("sys.argv[1]", repr(capability))
    cases = [json.loads(line) for line in on(program, Gpu(81920, capability)).splitlines()]
    assert len(cases) == 6
    for estimated, reserved, measured in cases:
        for component, nbytes in estimated.items():
            assert nbytes == pytest.approx(measured[component], rel=0.01), component
        assert reserved == pytest.approx(sum(measured.values()), rel=0.02)


def test_the_command_measures_what_a_run_on_this_gpu_took(tmp_path):
    gpu = environment(tmp_path / "state", Gpu(8192, "8.9"))
    run(gpu, "-c", FEDERATION.replace("sys.argv[1]", repr(str(tmp_path))))
    command = ("-m", "rankfit.cli.main", "memory-report", str(tmp_path / "gpu"), "--measure")
    for row in json.loads(run(gpu, *command, "--format", "json")):
        estimated, measured = row["components"]["estimated"], row["components"]["measured"]
        assert set(estimated) == set(measured) > {"unused", "context"}
        for component, nbytes in estimated.items():
            assert nbytes == pytest.approx(measured[component], rel=0.01), component
    other = environment(tmp_path / "state", Gpu(8192, "8.0"))
    rows = json.loads(run(other, *command, "--format", "json"))
    assert all("measured" not in row["components"] for row in rows), "not a GPU of that kind"
    assert str(ROOT) not in run(gpu, *command, "--format", "latex")
