"""docker/make-credentials.sh: what it makes is what TLS and Flower's node keys need."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "make-credentials.sh"

pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="needs openssl and ssh-keygen",
)


def make(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(SCRIPT), "-o", str(folder), *arguments], capture_output=True, text=True, timeout=60
    )


def verify(folder: Path, *arguments: str) -> bool:
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", *arguments, "server.crt"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("credentials")
    done = make(folder, "-n", "node-1", "-n", "node-2", "superlink", "fl.example.org", "10.1.2.3")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("host", ["localhost", "superlink", "fl.example.org"])
def test_certificate_is_for_the_hosts(made: Path, host: str) -> None:
    assert verify(made, "-purpose", "sslserver", "-verify_hostname", host)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.1.2.3"])
def test_certificate_is_for_the_addresses(made: Path, address: str) -> None:
    assert verify(made, "-purpose", "sslserver", "-verify_ip", address)


def test_certificate_is_for_no_other(made: Path) -> None:
    assert not verify(made, "-verify_hostname", "other.example.org")
    assert not verify(made, "-verify_ip", "10.1.2.4")


def test_node_keys_are_p384_pairs(made: Path) -> None:
    for node in ("node-1", "node-2"):
        private = load_ssh_private_key((made / node).read_bytes(), None)
        public = load_ssh_public_key((made / f"{node}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key().public_numbers() == public.public_numbers()


def test_private_files_are_private(made: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    public = {"ca.crt", "server.crt", "node-1.pub", "node-2.pub"}
    assert modes == {name: 0o644 if name in public else 0o600 for name in modes}
    assert set(modes) == public | {"ca.key", "server.key", "node-1", "node-2"}


def test_files_that_exist_are_kept(made: Path) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    done = make(made, "-n", "node-1", "-n", "later", "superlink")
    assert done.returncode == 0, done.stderr
    after = {path.name: path.read_bytes() for path in made.iterdir()}
    assert set(after) - set(before) == {"later", "later.pub"}
    assert {name: after[name] for name in before} == before


def test_a_kept_certificate_for_other_hosts_is_an_error(made: Path) -> None:
    done = make(made, "elsewhere.example.org")
    assert done.returncode == 1
    assert "elsewhere.example.org" in done.stderr and "remove it" in done.stderr
    assert make(made, "10.9.9.9").returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("-n", "node-1"), ("a b",), ("-n", "ca.crt", "host"), ("-n", "../x", "host"), ("-z", "h")],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = make(tmp_path / "out", *arguments)
    assert done.returncode == 2 and done.stderr
    assert not (tmp_path / "out").exists()
