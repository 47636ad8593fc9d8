"""One place decides how many threads numerical work uses, whichever library does it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from threadpoolctl import threadpool_info

from rankfit.adapters import threads
from rankfit.adapters.adapter import Adapter, Factors
from rankfit.adapters.merge import Update
from rankfit.adapters.product_merges import MeanChange
from rankfit.adapters.threads import in_threads, limit_process, one_thread, usable_cores


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000\n"}, 1),
        (  # the parent's limit holds for the child
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
            },
            2,
        ),
        (  # inside a container whose own group is the root of what it sees
            {
                "proc/self/cgroup": "0::/../../on-the-host\n",
                "sys/fs/cgroup/cpu.max": "100000 50000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpuacct:/\n1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_no_more_cores_than_the_cgroup_allows(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert usable_cores(written(tmp_path, files)) == expected


def test_no_more_cores_than_the_affinity_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert usable_cores(tmp_path) == 1


def blas_threads() -> set[int]:
    return {own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas"}


def program(text: str) -> str:
    """What a process prints that has no variable for threads in its environment."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in variables}
    done = subprocess.run(
        [sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_every_library_computes_with_one_thread_and_then_as_before() -> None:
    printed = program(
        "import torch, threadpoolctl as t\n"
        "from rankfit.adapters.threads import one_thread\n"
        "import scipy.linalg\n"
        "def now(): return [torch.get_num_threads(), *sorted(\n"
        "    o['num_threads'] for o in t.threadpool_info() if o['user_api'] == 'blas')]\n"
        "before = now()\n"
        "with one_thread():\n"
        "    with one_thread(): pass\n"
        "    inside = now()\n"
        "print(set(inside) == {1}, now() == before)"
    )
    assert printed == "True True"


def test_blocks_of_several_threads_overlap() -> None:
    before, barrier = blas_threads(), Barrier(4)

    def block(_: int) -> set[int]:
        with one_thread():
            barrier.wait()
            return blas_threads()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(block, range(4))) == [{1}] * 4
    assert blas_threads() == before


def test_a_process_never_gets_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    try:
        limit_process(64)
        assert torch.get_num_threads() == 1
        assert blas_threads() == {1}
    finally:
        torch.set_num_threads(before)


def test_results_come_in_order_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    for count in (0, 1, 3, 64):
        assert in_threads(lambda own: own * own, range(20), count) == [n * n for n in range(20)]
    assert in_threads(lambda _: torch.get_num_threads(), range(20), 0) == [1] * 20
    assert in_threads(abs, [], 0) == []


@pytest.mark.parametrize("tolerance", [0.0, 0.005])
def test_a_merge_does_not_depend_on_the_threads(
    tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    before = torch.get_num_threads()

    def merged(count: int, of_torch: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(0)

        def factors(rank: int) -> Factors:
            return Factors(
                torch.randn(400, rank, generator=random), torch.randn(rank, 600, generator=random)
            )

        start = Adapter({f"layer{n}": factors(8) for n in range(4)}, 1.0)
        merge = MeanChange(start, 0)
        merge.tolerance, merge.threads = tolerance, count
        torch.set_num_threads(of_torch)
        for _ in range(60):
            trained = Adapter({module: factors(8) for module in start.factors}, 1.0)
            merge.add(Update(start, trained, 1.0))
        return merge.finish().state_dict()

    try:
        one, four = merged(1, 1), merged(4, 2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], four[name]) for name in one)
