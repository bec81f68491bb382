"""Write the files of the tested versions, with the hash of every file that pip may install.

    pip install uv
    python scripts/lock_requirements.py --wheels /path/to/wheels       # what is locked, again
    python scripts/lock_requirements.py --upgrade numpy --wheels ...   # with the newest numpy

requirements.txt has the ranges for users; requirements/NAME.txt is what the tests, the server and
so on need besides. The locks are for Linux, macOS and Windows and for Python 3.11 and newer.
core.lock is what training needs besides torch, torch.lock is torch with its libraries for GPUs,
torch-cpu.lock its build for the CPU (from --wheels, a folder of such wheels), NAME.lock what
NAME.txt needs besides core.lock. A lock names all packages, so pip installs it with
--require-hashes --no-deps (scripts/environment.sh does it).
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.arguments import Parser
from util.cli import InputError, replacing, run

FOLDER = ROOT / "requirements"
TORCH = re.compile(r"torch$|nvidia-|cuda-|triton$")  # torch, and what its build for GPUs needs


def compile_lock(files: list[Path], known: dict[str, str], upgrade: list[str]) -> list[str]:
    """The locked packages that requirement files ask for, a text of several lines each.

    Packages that are `known`, by name, keep their versions, unless they are named in `upgrade`. The
    result is added to them.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "all.lock")
        out.write_text("\n".join(known.values()))  # uv keeps the versions that its output has
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--output-file", str(out), *map(str, files)]
        command += [x for name in upgrade for x in ("--upgrade-package", name)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "No module named uv" in done.stderr:
            raise InputError("scripts/lock_requirements.py needs uv: pip install uv")
        if done.returncode:
            raise InputError(f"uv could not resolve the requirements: {done.stderr.strip()}")
        packages = packages_of(out)
    known |= {name_of(package): package for package in packages}
    return packages


def packages_of(lock: Path) -> list[str]:
    """The packages of a lock."""
    return [x for x in re.split(r"\n(?=\S)", lock.read_text().strip()) if not x.startswith("#")]


def name_of(package: str) -> str:
    """The name of a locked package."""
    return re.match(r"[\w.-]+", package)[0].lower().replace("_", "-")


def cpu_build(torch: str, wheels: list[Path]) -> list[str]:
    """Torch's build for the CPU, whose version is that of the locked torch with a +cpu behind it.

    Returns the package with the hashes of its wheels, or nothing if there are none.
    """
    version = re.search(r"==([\w.]+)", torch)[1] + "+cpu"
    hashes = [
        f"--hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
        for wheel in wheels
        if wheel.name.startswith(f"torch-{version}-")
    ]
    return [" \\\n    ".join([f"torch=={version}", *hashes])] if hashes else []


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Lock the tested versions, with hashes.")
    parser.add_argument("--upgrade", nargs="+", default=[], metavar="NAME", help="packages")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of torch for the CPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    wheels = sorted(opt.wheels.glob("*.whl")) if opt.wheels else []
    locks = [x for x in FOLDER.glob("*.lock") if "cpu" not in x.stem]
    known = {name_of(package): package for lock in locks for package in packages_of(lock)}
    core = compile_lock([ROOT / "requirements.txt"], known, opt.upgrade)
    names = {name_of(package) for package in core}
    of_torch = [x for x in core if TORCH.match(name_of(x))]
    torch = next(x for x in of_torch if name_of(x) == "torch")
    locks = {
        "core.lock": [x for x in core if x not in of_torch],
        "torch.lock": of_torch,
        "torch-cpu.lock": cpu_build(torch, wheels),
    }
    for file in sorted(FOLDER.glob("*.txt")):
        found = compile_lock([ROOT / "requirements.txt", file], known, opt.upgrade)
        locks[f"{file.stem}.lock"] = [x for x in found if name_of(x) not in names]
    for name, packages in locks.items():
        if not packages:
            print(f"notice: requirements/{name} stays as it is: no wheels of it in --wheels")
            continue
        with replacing(FOLDER / name) as part, open(part, "w") as file:
            file.write(f"# Made by scripts/{os.path.basename(__file__)}; do not edit.\n")
            file.writelines(f"{package}\n" for package in packages)
        print(f"requirements/{name}: {len(packages)} packages")


if __name__ == "__main__":
    run(main)
