r"""Write ``constraints-hashed.txt``: what ``constraints.txt`` names, by content.

    pip install --dry-run --ignore-installed --no-deps --only-binary :all: \
        --report report.json -r constraints.txt
    python docker/hash_constraints.py report.json [report-of-another-index.json …]

pip says in its report which wheels it would install, with their SHA-256. A package that several
indexes have in builds of their own (torch) gets the hash of each.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# The wheels of constraints.txt for Python 3.11 on Linux (x86-64), by content; torch in the builds
# of PyPI (CUDA) and of PyTorch's CPU index. Made by docker/hash_constraints.py.
#   pip install --no-deps --require-hashes -r constraints-hashed.txt
"""


def main(reports: list[str]) -> None:
    """Write the hashes of all reports."""
    hashes: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        for one in json.loads(Path(report).read_text())["install"]:
            version = one["metadata"]["version"].partition("+")[0]
            name = one["metadata"]["name"].lower().replace("_", "-")
            digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
            hashes[f"{name}=={version}"].add(digest)
    lines = [
        " ".join([pinned, *(f"--hash=sha256:{digest}" for digest in sorted(hashes[pinned]))])
        for pinned in sorted(hashes)
    ]
    (ROOT / "constraints-hashed.txt").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
