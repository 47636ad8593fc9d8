"""The device report over the genuine nvidia-ml-py and a stub driver library."""

from pathlib import Path

import pytest

from tests.client.nvml_stub.driver import MIB, Asked, ask, ask_many, build, gpu

A = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
B = "GPU-ab000000-1111-0000-0000-000000000000"
SLICES = {
    "MIG": "1",
    "SLICES": "7",
    "MIG1_NAME": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "MIG1_UUID": "MIG-11111111-0000-0000-0000-000000000000",
    "MIG1_TOTAL": str(9856 * MIB),
    "MIG1_FREE": str(9800 * MIB),
    "MIG1_RESERVED": str(16 * MIB),
    "MIG3_NAME": "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "MIG3_UUID": "MIG-33333333-0000-0000-0000-000000000000",
    "MIG3_TOTAL": str(40448 * MIB),
    "MIG3_FREE": str(40000 * MIB),
}
T4 = {"name": "Tesla T4", "capability": "7.5", "total_mib": 15360, "free_mib": 14900}


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("old-driver"), "-DOLD_DRIVER")


def two_unlike() -> dict[str, str]:
    return gpu(0) | gpu(1, uuid=B, **T4)


def two_alike() -> dict[str, str]:
    return gpu(0) | gpu(1, uuid=B, free_mib=30000)


def assert_no_gpu(report: Asked, *words: str) -> None:
    assert report["accelerator"] == "cpu" and report["source"] == "ram" and report["uuid"] == ""
    assert int(str(report["total-bytes"])) >= int(str(report["free-bytes"])) > 0
    for word in ("no GPU", *words):
        assert word in str(report["note"])


def test_one_gpu(driver: Path) -> None:
    report = ask(driver, gpu(PIDS="11,12,13"), samples=42)
    assert report == {
        "client": report["client"],
        "accelerator": "cuda",
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": A,
        "compute-capability": "9.0",
        "total-bytes": 81559 * MIB,
        "free-bytes": 81000 * MIB,
        "reserved-bytes": 500 * MIB,
        "processes": 3,
        "source": "nvml",
        "note": "",
        "upload-mbps": 0.0,
        "download-mbps": 0.0,
        "samples": 42,
        "group-size": 1,
        "context-bytes": -1,
    }
    assert str(report["client"]).endswith(f"-{A}")


def test_a_group_of_gpus_has_the_memory_of_the_tightest(driver: Path) -> None:
    both = ask(driver, two_alike(), group={"size": 2})
    assert both["uuid"] == f"{A},{B}" and both["group-size"] == 2
    assert both["free-bytes"] == 30000 * MIB
    declared = ask(driver, two_alike(), {"memory-mib": 40000}, group={"size": 2})
    assert declared["free-bytes"] == 30000 * MIB and "capped" in str(declared["note"])
    turned = ask(driver, two_alike(), group={"size": 2, "gpus": "1,0"})
    assert turned["uuid"] == f"{B},{A}"
    short = ask(driver, gpu(0), group={"size": 2})
    assert "asks for 2 GPUs: 1 GPUs are visible" in str(short["error"])
    none = ask(None, group={"size": 2})
    assert "asks for 2 GPUs: no GPU" in str(none["error"])
    processor = ask(None, group={"size": 2, "cpu": True})
    whole = ask(None)
    assert processor["total-bytes"] == int(str(whole["total-bytes"])) // 2


def test_t4_has_15360_mib_whatever_its_label_says(driver: Path) -> None:
    report = ask(driver, gpu(**T4))
    assert report["total-bytes"] == 15360 * MIB and report["compute-capability"] == "7.5"


def test_shared_gpu_reports_what_is_free_and_who_else_is_there(driver: Path) -> None:
    report = ask(driver, gpu(free_mib=3000, PIDS="100,101"))
    assert report["free-bytes"] == 3000 * MIB and report["processes"] == 2


def test_own_process_is_not_counted(driver: Path) -> None:
    assert ask(driver, gpu(PIDS="5,SELF,6"))["processes"] == 2


def test_nothing_heavy_is_imported(driver: Path) -> None:
    modules = ask_many(driver, [{"environment": gpu()}]).modules
    assert "pynvml" in modules
    assert not modules & {"torch", "flwr", "ray", "transformers", "numpy"}


def test_old_driver_has_no_v2_memory_and_no_v3_processes(old_driver: Path) -> None:
    report = ask(old_driver, gpu(PIDS="4,5"))
    assert report["source"] == "nvml" and report["reserved-bytes"] == 0
    assert report["total-bytes"] == 81559 * MIB and report["processes"] == 2


@pytest.mark.parametrize("code", [3, 13, 25], ids=["not-supported", "no-symbol", "version"])
def test_memory_v2_refused_falls_back_to_v1(driver: Path, code: int) -> None:
    report = ask(driver, gpu() | {"NVML_STUB_FAIL": f"nvmlDeviceGetMemoryInfo_v2={code}"})
    assert report["source"] == "nvml" and report["reserved-bytes"] == 0


def test_unified_memory_counts_ram(driver: Path) -> None:
    fail = "nvmlDeviceGetMemoryInfo_v2=3,nvmlDeviceGetMemoryInfo=3"
    ram = ask(None)
    for environment in (
        gpu(name="NVIDIA GB10", capability="12.1") | {"NVML_STUB_FAIL": fail},
        gpu(name="NVIDIA GB10", capability="12.1", total_mib=0, free_mib=0, reserved_mib=0),
    ):
        report = ask(driver, environment)
        assert report["accelerator"] == "cuda" and report["name"] == "NVIDIA GB10"
        assert report["source"] == "ram" and "unified memory" in str(report["note"])
        assert report["total-bytes"] == ram["total-bytes"]


def test_figures_that_the_driver_does_not_tell(driver: Path) -> None:
    fail = ",".join(
        f"nvmlDeviceGet{name}"
        for name in (
            "ComputeRunningProcesses_v3=3",
            "ComputeRunningProcesses_v2=4",
            "Name=3",
            "CudaComputeCapability=3",
        )
    )
    report = ask(driver, gpu() | {"NVML_STUB_FAIL": fail})
    assert report["processes"] == -1 and report["compute-capability"] == ""
    assert report["name"] == "NVIDIA GPU" and report["source"] == "nvml"


def test_no_driver_library() -> None:
    assert_no_gpu(ask(None), "NVML Shared Library Not Found", "install the NVIDIA driver")


INIT_ERRORS = {
    1: "Uninitialized",
    2: "Invalid Argument",
    3: "Not Supported",
    4: "Insufficient Permissions",
    9: "Driver Not Loaded",
    10: "Timeout",
    13: "Function Not Found",
    15: "GPU is lost",
    16: "GPU requires restart",
    17: "operating system has blocked",
    18: "version mismatch",
    20: "Insufficient Memory",
    28: "stub",  # GPU_NOT_FOUND: a code whose words only the library knows
    999: "Unknown Error",
    4242: "stub",
}
CALLS = ("nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2")


@pytest.mark.parametrize("call", [*CALLS, "nvmlDeviceGetUUID"])
def test_every_error_is_a_typed_no_gpu(driver: Path, call: str) -> None:
    cases = [{"environment": gpu() | {"NVML_STUB_FAIL": f"{call}={code}"}} for code in INIT_ERRORS]
    for words, report in zip(INIT_ERRORS.values(), ask_many(driver, cases).reports, strict=True):
        assert_no_gpu(report, words)


def test_memory_errors_are_a_typed_no_gpu(driver: Path) -> None:
    failing = "nvmlDeviceGetMemoryInfo_v2={0},nvmlDeviceGetMemoryInfo={0}"
    codes = [code for code in INIT_ERRORS if code != 3]
    cases = [{"environment": gpu() | {"NVML_STUB_FAIL": failing.format(code)}} for code in codes]
    for code, report in zip(codes, ask_many(driver, cases).reports, strict=True):
        assert_no_gpu(report, INIT_ERRORS[code])


def test_no_device(driver: Path) -> None:
    assert_no_gpu(ask(driver, {"NVML_STUB_GPUS": "0"}), "the driver sees none")


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ("", ["init", "shutdown"]),
        ("nvmlDeviceGetCount_v2=15", ["init", "shutdown"]),
        ("nvmlDeviceGetUUID=15", ["init", "shutdown"]),
        ("nvmlInitWithFlags=9", []),
    ],
)
def test_shutdown_follows_every_init(
    driver: Path, tmp_path: Path, fail: str, expected: list[str]
) -> None:
    log = tmp_path / "log"
    log.touch()
    ask(driver, gpu() | {"NVML_STUB_FAIL": fail, "NVML_STUB_LOG": str(log)})
    assert log.read_text().split() == expected


def test_shutdown_follows_an_ambiguous_choice_and_may_itself_fail(
    driver: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert "error" in ask(driver, two_unlike() | {"NVML_STUB_LOG": str(log)})
    assert log.read_text().split() == ["init", "shutdown"]
    assert ask(driver, gpu() | {"NVML_STUB_FAIL": "nvmlShutdown=999"})["source"] == "nvml"


@pytest.mark.parametrize("visible", ["", "-1", "none", "5", "0,0", "GPU-zzz", "GPU-a", f"{A},{A}"])
def test_nothing_visible(driver: Path, visible: str) -> None:
    environment = two_alike() | {"CUDA_VISIBLE_DEVICES": visible}
    assert_no_gpu(ask(driver, environment), f"CUDA_VISIBLE_DEVICES={visible!r}")


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [(None, A), ("0", A), ("1", B), ("1,0", B), ("1,-1,0", B), (B, B), ("GPU-ab", B), (A[:9], A)],
)
def test_alike_gpus(driver: Path, visible: str | None, uuid: str) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    report = ask(driver, two_alike() | chosen)
    assert report["uuid"] == uuid
    assert report["free-bytes"] == (81000 if uuid == A else 30000) * MIB


@pytest.mark.parametrize("visible", [None, "0", "1"])
def test_unlike_gpus_are_not_guessed(driver: Path, visible: str | None) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    error = str(ask(driver, two_unlike() | chosen)["error"])
    assert "fastest first" in error and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in error
    assert A in error and B in error and "Tesla T4" in error


@pytest.mark.parametrize(("visible", "uuid"), [(None, A), ("0", A), ("1", B), ("GPU-ab", B)])
def test_unlike_gpus_in_pci_order(driver: Path, visible: str | None, uuid: str) -> None:
    chosen = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    chosen |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert ask(driver, two_unlike() | chosen)["uuid"] == uuid


@pytest.mark.parametrize("own", ["0", "1"])
def test_a_simulated_clients_plan_holds_on_every_gpu_of_the_simulation(
    driver: Path, own: str
) -> None:
    chosen = two_unlike() | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": own}
    smallest = (15360 - 500) * MIB
    whole = ask(driver, chosen, placement={"share": 1.0, "visible": None})
    total, free, reserved = (
        int(str(whole[f"{key}-bytes"])) for key in ("total", "free", "reserved")
    )
    assert min(total - reserved, free) == smallest
    assert whole["compute-capability"] == "7.5"
    assert whole["uuid"] == (A if own == "0" else B)
    quarter = ask(driver, chosen, placement={"share": 0.25, "visible": None})
    assert quarter["free-bytes"] == smallest // 4 and quarter["source"] == "declared"
    assert "0.25 of the smallest of 2 GPUs" in str(quarter["note"])
    if own == "0":  # the small one is not the simulation's
        alone = ask(driver, chosen, placement={"share": 1.0, "visible": "0"})
        assert alone["source"] == "nvml" and alone["free-bytes"] == 81000 * MIB


def test_an_index_means_the_same_gpu_to_cuda_and_nvml() -> None:
    import os

    import rankfit

    assert rankfit.__version__
    assert os.environ["CUDA_DEVICE_ORDER"]


def test_unlike_gpus_by_uuid(driver: Path) -> None:
    report = ask(driver, two_unlike() | {"CUDA_VISIBLE_DEVICES": B})
    assert report["name"] == "Tesla T4" and report["total-bytes"] == 15360 * MIB


def test_same_name_with_other_memory_is_unlike(driver: Path) -> None:
    twelve = gpu(1, uuid=B, total_mib=12288, free_mib=12000)
    assert "error" in ask(driver, gpu(0, total_mib=10240, free_mib=10000) | twelve)


def test_lost_neighbour_leaves_the_indices(driver: Path) -> None:
    lost = two_alike() | {"NVML_STUB_FAIL": "nvmlDeviceGetHandleByIndex_v2@0=15"}
    assert ask(driver, lost | {"CUDA_VISIBLE_DEVICES": "1"})["uuid"] == B
    assert ask(driver, lost | {"CUDA_VISIBLE_DEVICES": B})["uuid"] == B
    assert_no_gpu(ask(driver, lost | {"CUDA_VISIBLE_DEVICES": "0"}), "GPU is lost", "index 0")


@pytest.mark.parametrize(
    ("visible", "total"),
    [(SLICES["MIG3_UUID"], 40448), (SLICES["MIG1_UUID"], 9856), (None, 9856), ("0", 9856)],
)
def test_mig_slice_has_its_own_figures(driver: Path, visible: str | None, total: int) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    report = ask(driver, gpu(**SLICES) | chosen)
    assert report["total-bytes"] == total * MIB
    assert str(report["uuid"]).startswith("MIG-") and "MIG" in str(report["name"])
    assert report["compute-capability"] == "9.0"  # the slice does not tell: the chip does


def test_whole_gpu_in_mig_mode_is_its_first_slice(driver: Path) -> None:
    report = ask(driver, gpu(**SLICES) | {"CUDA_VISIBLE_DEVICES": A})
    assert report["uuid"] == SLICES["MIG1_UUID"]


def test_mig_parent_may_hide_its_figures(driver: Path) -> None:
    fail = "nvmlDeviceGetMemoryInfo_v2@0=4,nvmlDeviceGetMemoryInfo@0=4"
    report = ask(driver, gpu(**SLICES) | {"NVML_STUB_FAIL": fail})
    assert report["total-bytes"] == 9856 * MIB and report["source"] == "nvml"


def test_unknown_slice_and_mig_without_slices(driver: Path) -> None:
    unknown = {"CUDA_VISIBLE_DEVICES": "MIG-99999999"}
    assert_no_gpu(ask(driver, gpu(**SLICES) | unknown), "names no MIG slice")
    assert_no_gpu(ask(driver, gpu(MIG="1", SLICES="7")), "MIG mode is on", "nvidia-smi mig")


def test_cuda_shows_no_whole_gpu_beside_a_slice(driver: Path) -> None:
    environment = gpu(0, uuid=B) | gpu(1, uuid=A, **SLICES)
    assert ask(driver, environment)["uuid"] == SLICES["MIG1_UUID"]
    assert ask(driver, environment | {"CUDA_VISIBLE_DEVICES": "0"})["uuid"] == B


def test_mig_off_is_a_whole_gpu(driver: Path) -> None:
    report = ask(driver, gpu(**(SLICES | {"MIG": "0"})))
    assert report["uuid"] == A and report["total-bytes"] == 81559 * MIB


def test_declared_budget_on_a_gpu(driver: Path) -> None:
    node = {"memory-mib": 4096, "upload-mbps": 7.5, "download-mbps": 20, "client-name": "berlin"}
    report = ask(driver, gpu(), node)
    assert report["total-bytes"] == report["free-bytes"] == 4096 * MIB
    assert (report["reserved-bytes"], report["source"], report["client"]) == (
        0,
        "declared",
        "berlin",
    )
    assert report["name"] == "NVIDIA H100 80GB HBM3" and report["uuid"] == A
    assert (report["upload-mbps"], report["download-mbps"]) == (7.5, 20.0)


def test_declared_above_what_is_free_is_capped(driver: Path) -> None:
    report = ask(driver, gpu(free_mib=3000), {"memory-mib": 4096})
    assert report["free-bytes"] == 3000 * MIB and report["total-bytes"] == 4096 * MIB
    assert "capped to the 3000 MiB" in str(report["note"])
    beyond = ask(driver, gpu(free_mib=81559), {"memory-mib": 10**6})
    assert beyond["free-bytes"] == (81559 - 500) * MIB  # what the driver holds is not free
    full = ask(driver, gpu(free_mib=0), {"memory-mib": 4096})
    assert full["free-bytes"] == 0 and full["source"] == "declared"
