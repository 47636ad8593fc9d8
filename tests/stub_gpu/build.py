"""Makes the stub GPU: torch's CUDA build in a folder of its own, and the libraries under it.

    python tests/stub_gpu/build.py .stub-gpu      # once: a download of 530 MB; afterwards seconds

Every symbol that torch and bitsandbytes take from a CUDA library becomes a function that answers
"success"; the C files of ``libraries`` hold those that must do more. No file of NVIDIA's is needed.
"""

import collections
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "libraries"
NVML = HERE.parent / "client" / "nvml_stub" / "nvml_stub.c"
WHEELS = HERE / "wheels.txt"

#: The C file of a library that does more than answer.
OWN = {
    "libcudart.so.13": "cudart.c",
    "libcuda.so.1": "cuda.c",
    "libcublas.so.13": "cublas.c",
    "libcublasLt.so.13": "cublaslt.c",
    "libcudnn.so.9": "cudnn.c",
    "libcusolver.so.12": "cusolver.c",
    "libnccl.so.2": "nccl.c",
}
#: Libraries whose symbols carry no version, by how these begin.
UNVERSIONED = {
    "libcuda.so.1": r"cu(?!File)[A-Z]",
    "libnccl.so.2": "nccl",
    "libcusparseLt.so.0": "cusparseLt",
    "libcufile.so.0": "cuFile",
    "libnvshmem_host.so.3": "nvshmem",
    "libcupti.so.13": "cupti",
}
#: Where the version of a library's symbols is not its name.
VERSIONS = {"libnvshmem_host.so.3": "NVSHMEM"}


def install(home: Path) -> Path:
    """Install the pinned wheels apart from the environment; returns the folder to import from.

    pip's own cache makes a second installation quick.
    """
    site = home / f"site-{_digest(WHEELS)}"
    if not site.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            made = str(Path(folder) / "site")
            # --isolated: a folder of wheels that the machine's settings name may hold torch's CPU
            # build of the same version.
            command = [sys.executable, "-m", "pip", "--isolated", "install", "-q", "--no-deps"]
            command += ["--no-compile", "--require-hashes", "--target", made, "-r", str(WHEELS)]
            subprocess.run(command, check=True)
            Path(made).rename(site)
    return site


def build(home: Path, site: Path) -> Path:
    """Compile the libraries; returns their folder, for ``LD_LIBRARY_PATH``."""
    sources = [*sorted(SOURCES.iterdir()), NVML, Path(__file__), WHEELS]
    libraries = home / f"libraries-{_digest(*sources)}"
    if not libraries.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            made = Path(folder)
            _compile(made / "libnvidia-ml.so.1", NVML)
            for name, versioned, symbols in _taken(site):
                _library(made / name, versioned, symbols)
            shutil.copytree(made, libraries, ignore=shutil.ignore_patterns("*.c", "*.map"))
    return libraries


def _taken(site: Path) -> list[tuple[str, bool, set[str]]]:
    """CUDA libraries that the wheels need: name, whether symbols have versions, and the symbols."""
    needed: set[str] = set()
    by_version: dict[str, set[str]] = collections.defaultdict(set)
    bare: set[str] = set()
    binaries = [*(site / "torch" / "lib").glob("*.so"), *site.glob("bitsandbytes/*_cuda130.so")]
    for binary in binaries:
        needed |= set(re.findall(r"Shared library: \[(.*?)\]", _output("readelf", "-d", binary)))
        for line in _output("nm", "-D", "--undefined-only", binary).splitlines():
            name, _, version = line.split()[-1].partition("@")
            by_version[version.lstrip("@")].add(name) if version else bare.add(name)
    taken = []
    for library in sorted(name for name in needed if re.match(r"lib(cu|nv|nccl)", name)):
        versioned = by_version.get(VERSIONS.get(library, library), set())
        symbols = set(versioned)
        if library in UNVERSIONED:
            symbols |= {name for name in bare if re.match(UNVERSIONED[library], name)}
        taken.append((library, bool(versioned), symbols))
    return taken


def _library(path: Path, versioned: bool, symbols: set[str]) -> None:
    """Compile one library: an answer for each symbol, and its own C file in their place."""
    answers, script = path.with_suffix(".c"), path.with_suffix(".map")
    answers.write_text(
        "".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in symbols)
    )
    own = [SOURCES / OWN[path.name]] if path.name in OWN else []
    flags = []
    if versioned:
        version = VERSIONS.get(path.name, path.name)
        script.write_text(f"{version} {{ global: *; }};\n")
        flags.append(f"-Wl,--version-script={script}")
    _compile(path, answers, *own, flags=flags)


def _compile(path: Path, *sources: Path, flags: list[str] | None = None) -> None:
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{SOURCES}"]
    command += [*(flags or []), "-o", str(path), *map(str, sources), "-lpthread", "-ldl"]
    subprocess.run(command, check=True)


def _output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    print(build(place, install(place)))
