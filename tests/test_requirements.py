"""What pip installs: ranges for users, and locks with hashes for the tests and the scripts."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = sorted(ROOT.glob("requirements/*.lock"))
CORE = "torch", "numpy", "nltk", "tensorboard", "tqdm"


def entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """The packages of a lock with their hashes."""
    found = []
    for text in re.split(r"\n(?=\S)", lock.read_text().strip()):
        if not text.startswith("#"):
            first, *hashes = (line.strip(" \\") for line in text.splitlines())
            found.append((Requirement(first), hashes))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda x: x.name)
def test_each_locked_package_has_one_version_and_its_hashes(lock):
    assert entries(lock)
    for package, hashes in entries(lock):
        assert re.fullmatch(r"==[\w.+]+", str(package.specifier)), package
        assert hashes, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", x) for x in hashes), package


def test_users_get_ranges_that_hold_the_tested_versions():
    locked = {x.name: x.specifier for name in ("core", "torch") for x, _ in entries_of(name)}
    wanted = [Requirement(x) for x in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(x.name for x in wanted) == sorted(CORE)
    for package in wanted:
        tested = str(locked[package.name]).removeprefix("==")
        assert "==" not in str(package.specifier), "users choose"
        assert package.specifier.contains(tested), package


def test_the_locks_agree_with_each_other():
    """A script may install two of them, one after the other."""
    versions = {}
    for lock in LOCKS:
        for package, _ in entries(lock):
            found = str(package.specifier).removesuffix("+cpu")
            versions.setdefault((package.name, str(package.marker)[:24]), set()).add(found)
    assert {x: found for x, found in versions.items() if len(found) > 1} == {}


def test_what_the_tests_ask_for_is_locked():
    for file in ROOT.glob("requirements/*.txt"):
        locked = {x.name for x, _ in entries(file.with_suffix(".lock"))}
        locked |= {x.name for x, _ in entries_of("core")}
        assert {re.match(r"[\w-]+", x)[0] for x in file.read_text().split()} <= locked


def test_this_environment_has_the_locked_versions():
    """Skipped where the tests run in an environment of the user's own."""
    wrong = []
    for name in ("core", "tests"):
        for package, _ in entries_of(name):
            if package.marker is None or package.marker.evaluate():
                try:
                    found = version(package.name)
                except PackageNotFoundError:
                    found = "nothing"
                if not package.specifier.contains(found):
                    wrong.append(f"{package}: {found}")
    if wrong and Path(sys.prefix) != ROOT / ".venv":
        pytest.skip(f"another environment: {wrong[0]}")
    assert not wrong


def test_lock_requirements_names_what_it_lacks(tmp_path):
    """uv is no package of the tests."""
    script = ROOT / "scripts" / "lock_requirements.py"
    (tmp_path / "uv.py").write_text('raise SystemExit("No module named uv")')
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert done.stderr == "error: scripts/lock_requirements.py needs uv: pip install uv\n"


def entries_of(name: str) -> list[tuple[Requirement, list[str]]]:
    return entries(ROOT / "requirements" / f"{name}.lock")
