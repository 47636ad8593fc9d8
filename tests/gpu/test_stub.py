"""The stub itself: genuine torch, NVML and NCCL find the same devices, and memory is counted."""

import json
import subprocess
import sys

import pynvml
import pytest
import torch

from tests.stub_gpu.gpu import MIB, ROOT, Gpu, environment, uuid

DEVICE = torch.device("cuda", 0)


def test_cuda_and_nvml_tell_of_the_same_device():
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    of_nvml = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    properties = torch.cuda.get_device_properties(0)
    assert f"GPU-{properties.uuid}" == pynvml.nvmlDeviceGetUUID(handle)
    assert properties.total_memory == of_nvml.total - of_nvml.reserved
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).free
    held = torch.empty(100 * MIB, dtype=torch.uint8, device=DEVICE)
    assert before - pynvml.nvmlDeviceGetMemoryInfo(handle).free >= held.nbytes
    del held
    torch.cuda.empty_cache()
    assert (
        pynvml.nvmlDeviceGetMemoryInfo(handle).free <= before
    )  # the other test process trains too


ALLOCATES = """
import ctypes, os, subprocess, sys
runtime = ctypes.CDLL("libcudart.so.13")
place, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
code = runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(1000 << 20))
runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
print(code, free.value >> 20, flush=True)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, "-c", os.environ["PROGRAM"], "second"])
"""


def test_processes_compete_for_one_device_and_it_is_free_when_they_end(on):
    gpu = Gpu(2400, reserved_mib=0)
    for _ in range(2):  # the second time, nothing of the first is left
        first, second = on(ALLOCATES, gpu, PROGRAM=ALLOCATES).splitlines()
        assert first == f"0 {2400 - 470 - 1000}"
        assert second == f"2 {2400 - 470 - 1000 - 470}"  # 2: out of memory


@pytest.mark.parametrize(
    ("visible", "order", "expected"),
    [
        (None, None, [1, 0]),  # fastest first
        (None, "PCI_BUS_ID", [0, 1]),
        ("1", "PCI_BUS_ID", [1]),
        (uuid(0), None, [0]),
        ("", None, []),
        ("7", None, []),
    ],
)
def test_visible_devices_are_those_of_cuda(on, visible, order, expected):
    chosen = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    said = on(
        "import torch; print([f'GPU-{torch.cuda.get_device_properties(i).uuid}' "
        "for i in range(torch.cuda.device_count())])",
        Gpu(8192, "7.5"),
        Gpu(24576, "9.0"),
        **{key: value for key, value in chosen.items() if value is not None},
    )
    assert said.strip() == str([uuid(index) for index in expected])


def test_integers_are_computed():
    numbers = torch.arange(10, device=DEVICE)
    assert numbers[numbers > 6].tolist() == [7, 8, 9]
    assert bool((numbers.cumsum(0) == 45).any())
    assert torch.nonzero(numbers > 7).tolist() == [[8], [9]]


TRAINS = """
import json, torch
from torch import nn
import torch.nn.functional as F

def losses(device):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(.1)
    model = nn.Sequential(*layers, nn.Linear(512, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    images, labels = torch.randn(16, 3, 8, 8).to(device), torch.randint(10, (16,)).to(device)
    found = []
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found

def attention(device, dtype, heads):
    torch.manual_seed(0)
    made = [torch.randn(2, h, 16, 32, dtype=dtype).to(device) for h in (4, heads, heads)]
    made = [tensor.detach().requires_grad_() for tensor in made]
    out = F.scaled_dot_product_attention(*made, is_causal=True, enable_gqa=heads < 4)
    out.float().square().sum().backward()
    return [t.float().cpu() for t in (out, *(tensor.grad for tensor in made))]

apart = 0.0
for dtype in (torch.float32, torch.bfloat16):
    for heads in (4, 2):
        pairs = zip(attention("cpu", dtype, heads), attention("cuda:0", dtype, heads))
        apart = max(apart, *(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
print(json.dumps([losses("cpu"), losses("cuda:0"), apart, torch.cuda.max_memory_allocated()]))
"""


@pytest.mark.parametrize("capability", ["8.0", "9.0"])  # flash and memory-efficient; cuDNN's
def test_all_is_computed_where_it_is_asked_for(on, capability):
    on_cpu, on_gpu, apart, peak = json.loads(on(TRAINS, Gpu(8192, capability), compute="all"))
    assert on_gpu == on_cpu
    assert apart < 0.01
    *_, lighter = json.loads(on(TRAINS, Gpu(8192, capability)))
    assert lighter == peak


def test_cudnn_takes_the_workspace_that_is_set(monkeypatch):
    convolution = torch.nn.Conv2d(3, 16, 4, 4).to(DEVICE)
    images = torch.zeros(2, 3, 32, 32, device=DEVICE)
    peaks = []
    for size in (0, 64 * MIB):
        monkeypatch.setenv("STUB_GPU_CUDNN_WORKSPACE", str(size))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        # Plans are kept by shape: another one is asked for.
        out = convolution(images[..., : 16 if size else 32])
        peaks.append(torch.cuda.max_memory_allocated() - before - out.untyped_storage().nbytes())
    assert peaks[1] - peaks[0] >= 63 * MIB


GROUP = """
import os, torch
from torch import distributed
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
distributed.init_process_group("nccl")
device = torch.device("cuda", rank)
sums = torch.tensor([rank + 1.0, 10.0], device=device, dtype=torch.float64)
distributed.all_reduce(sums)
largest = torch.tensor(rank, device=device)
distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
wide = torch.full((700_000,), rank + 1.0, device="cpu").to(device)
distributed.all_reduce(wide)
free, total = torch.cuda.mem_get_info()
print(sums.tolist(), int(largest), float(wide.cpu().sum()), (total - free) >> 20)
distributed.destroy_process_group()
"""


def test_groups_add_up_through_nccl(tmp_path):
    environ = environment(tmp_path / "state", Gpu(), Gpu()) | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP],
            env=environ | {"RANK": str(rank)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-3000:]
        *words, taken = out.split()
        assert words == ["[3.0,", "20.0]", "1", "2100000.0"]
        assert int(taken) >= 470 + 544


def test_expandable_segments_are_counted(on):
    said = on(
        "import torch\n"
        "a = torch.empty(300 * 2**20, dtype=torch.uint8, device='cuda')\n"
        "free, total = torch.cuda.mem_get_info()\n"
        "print((total - free) >> 20, torch.arange(3, device='cuda').sum().item())\n"
        "del a; torch.cuda.empty_cache(); print((torch.cuda.mem_get_info()[0] - free) >> 20)",
        Gpu(2048, reserved_mib=0),
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )
    assert said.split() == ["770", "3", "300"]


def test_bitsandbytes_runs_its_cuda_backend():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float16, quant_type="nf4")
    layer = layer.to(DEVICE)
    assert layer.weight.dtype == torch.uint8
    assert layer(torch.zeros(2, 64, device=DEVICE, dtype=torch.float16)).shape == (2, 64)


def test_a_driver_that_is_too_old_and_a_lost_device(on, tmp_path):
    assert on("import torch; print(torch.cuda.is_available())", Gpu(), STUB_GPU_DRIVER="12040") == (
        "False\n"
    )
    (tmp_path / "state" / "lost-0").touch()
    said = on(
        "import torch\n"
        "try: torch.zeros(3, device='cuda')\n"
        "except Exception as error: print(type(error).__name__, error)",
        Gpu(),
    )
    assert "unknown error" in said


def test_kernel_choice_is_torchs_at_each_capability(on):
    program = (
        "import torch\n"
        "q = torch.empty(1, 8, 64, 64, device='cuda', dtype=torch.bfloat16)\n"
        "print(torch._fused_sdp_choice(q, q, q))"
    )
    # 0 mathematics, 1 flash, 3 cuDNN's
    found = {cc: int(on(program, Gpu(8192, cc))) for cc in ("7.5", "8.0", "9.0")}
    assert found == {"7.5": 0, "8.0": 1, "9.0": 3}
