"""util/git.py: the commit of a clone, and of nothing else."""

import re
import subprocess

import pytest

from util.git import commit_of


@pytest.fixture
def clone(tmp_path):
    """A repository with one commit, and a folder within it."""
    folder = tmp_path / "clone"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("1")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_a_clone_has_a_commit(clone):
    found = commit_of(clone)
    assert re.fullmatch("[0-9a-f]{40}", found)
    (clone / "inner" / "file").write_text("2")
    assert commit_of(str(clone)) == f"{found}-dirty"


def test_another_folder_has_none(clone, tmp_path, monkeypatch, capfd):
    assert commit_of(tmp_path) is None
    assert commit_of(clone / "inner") is None  # of another project's repository
    (tmp_path / ".git").mkdir()  # no repository
    assert commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")  # no git
    assert commit_of(clone) is None
    assert capfd.readouterr() == ("", "")
