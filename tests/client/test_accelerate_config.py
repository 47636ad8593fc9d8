"""Accelerate's configuration file, as a node gives it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import ComputeEnvironment, DistributedType

from rankfit.client.accelerate_config import DataParallel


def of(tmp_path: Path, text: str, autocast: str = "none") -> DataParallel:
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    return DataParallel.of_file(path, autocast)


def test_what_accelerate_writes(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    common = {"compute_environment": ComputeEnvironment.LOCAL_MACHINE, "debug": False}
    ClusterConfig(
        distributed_type=DistributedType.MULTI_GPU, num_processes=2, gpu_ids="0,3",
        mixed_precision="bf16", use_cpu=False, **common,
    ).to_yaml_file(path)  # fmt: skip
    assert DataParallel.of_file(path, "bf16") == DataParallel(2, "0,3", cpu=False)
    ClusterConfig(
        distributed_type=DistributedType.NO, num_processes=1, mixed_precision="no", use_cpu=False,
        gpu_ids="all", **common,
    ).to_json_file(path)  # fmt: skip
    assert DataParallel.of_file(path, "none") == DataParallel()


def test_words_that_yaml_takes_for_truth(tmp_path: Path) -> None:
    text = "distributed_type: NO\nmixed_precision: no\nnum_processes: 4\n"
    assert of(tmp_path, text) == DataParallel(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distributed_type: FSDP\nnum_processes: 2", "distributed_type FSDP is not supported"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2", "start a SuperNode on each"),
        ("distributed_type: MULTI_GPU\nmixed_precision: fp16", "train.autocast"),
        ("distributed_type: MULTI_GPU\nnum_processes: 0", "num_processes"),
        ("distributed_type: 'NO'\nuse_cpu: true", "CUDA_VISIBLE_DEVICES"),
        ("distributed_type: MULTI_GPU\ngpu_ids: 1", "CUDA_VISIBLE_DEVICES"),
        ("num_processes: 2", "distributed_type"),
        ("- no mapping", "valid dictionary"),
        ("{", "accelerate-config"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        of(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        DataParallel.of_file(tmp_path / "absent.yaml", "none")
