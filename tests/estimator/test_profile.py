"""Calibration profiles: what they replace, and for which devices."""

from pathlib import Path

import pytest

from rankfit.configs.settings import ConfigError, from_flat
from rankfit.estimator.calibration import TERMS, Calibration, Profile, Term
from rankfit.estimator.plan_search import Estimate, Estimator

from .small import MIB, device, images, vit_config

H100 = device(4096, "cuda", name="NVIDIA H100")


def test_a_profile_replaces_terms_of_its_kind_of_device_alone():
    context = Term("cuda-context", 600 * MIB, "test")
    profile = Profile("NVIDIA H100", "9.0", {"cuda-context": context})
    assert profile.calibration(H100).context == 600 * MIB
    assert profile.calibration(H100).cublas_workspace == Calibration.of(H100).cublas_workspace
    other = device(4096, "cuda", name="NVIDIA L4", compute_capability="8.9")
    assert profile.calibration(other) == Calibration.of(other)
    assert profile.calibration(device(4096)) == Calibration()
    assert Profile().calibration(H100) == Calibration.of(H100)


def test_a_workspace_counts_for_its_own_kind_of_chip():
    terms = {
        name: Term(name, value, "test")
        for name, value in (("cublas-workspace", 1 * MIB), ("cublas-workspace-sm90", 2 * MIB))
    }
    profile = Profile(terms=terms)
    assert profile.calibration(H100).cublas_workspace == 2 * MIB
    ada = device(4096, "cuda", compute_capability="8.9")
    assert profile.calibration(ada).cublas_workspace == 1 * MIB


def test_a_profile_is_written_read_and_used(tmp_path: Path):
    path = tmp_path / "profiles" / "h100.toml"
    profile = Profile("NVIDIA H100", "9.0", {"cuda-context": Term("cuda-context", 3 * MIB, "hand")})
    profile.save(path)
    assert Profile.load(str(path)) == profile
    peaks = []
    for calibration in ("", str(path)):
        settings = from_flat(
            {"lora.rank": 4, "train.batch-size": 2, "plan.calibration": calibration}
        )
        fit = Estimator.for_run(settings, vit_config(), images(16)).fit(H100)
        assert isinstance(fit, Estimate)
        peaks.append(fit.plan.peak_bytes)
    assert peaks[0] - peaks[1] == TERMS["cuda-context"].value - 3 * MIB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[terms.warp-size]\nvalue = 1", "unknown term 'warp-size'; expected one of cublas"),
        ("[terms.cuda-context]\nvalue = -1", "value of cuda-context is -1"),
        ("[terms.cuda-context]\nvalue = 'big'", "value of cuda-context is 'big'"),
        ("[terms", "cannot be read"),
    ],
)
def test_a_bad_profile_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Profile.load(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.load(str(tmp_path / "absent.toml"))
