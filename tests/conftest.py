"""Shared fixtures. The environment is set before anything imports torch or Flower."""

import os
import sys
from pathlib import Path

# The tests run as `.venv/bin/python -m pytest` does, also in an activated environment: nothing may
# rest on the environment's commands being found by name.
_BESIDE = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join(
    place for place in os.environ.get("PATH", os.defpath).split(os.pathsep) if place != _BESIDE
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# A stalled example says something of the machine alone.
hypothesis.settings.register_profile("loaded", deadline=None)
hypothesis.settings.load_profile("loaded")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
#: Each of their processes imports torch; above the limits of their own waits.
PROCESSES_SECONDS = 1500


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``-n 2``: a file stays on one worker, and the tests that start processes on one of them.

    Those measure time and fill a core by themselves. (``--dist loadgroup`` is for this, but
    pytest-xdist 3.8 does nothing with the groups under pytest 9.2.)
    """
    from xdist.scheduler import LoadFileScheduling

    class ProcessesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            if file.startswith("tests/processes/"):
                return "processes"
            # Whole runs of seconds each: dealt one by one, so that both workers end together.
            return nodeid if file.startswith("tests/server/") else file

    return ProcessesTogether(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests with processes first, and deselect those whose data folder is absent."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)
    for item in items:
        if item.get_closest_marker("processes"):
            item.add_marker(pytest.mark.timeout(PROCESSES_SECONDS))
    if SHARED_DATA.is_dir():
        return
    away = [item for item in items if item.get_closest_marker("shared_data")]
    if away:
        items[:] = [item for item in items if not item.get_closest_marker("shared_data")]
        config.hook.pytest_deselected(items=away)


def pytest_report_header() -> str | None:
    if SHARED_DATA.is_dir():
        return None
    return "shared_data: that folder is not here, so the tests that need it are deselected"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The developers' data folder."""
    return SHARED_DATA
