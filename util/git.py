"""The git commit of a folder of code."""

import os
import subprocess


def commit_of(folder: str | os.PathLike) -> str | None:
    """The commit that a folder is a clone of, 40 digits; `-dirty` behind it if files differ.

    None: the folder is no clone (a folder within another repository is none either), or git is not
    installed or does not answer.
    """
    if not os.path.exists(os.path.join(folder, ".git")):
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    how = {"capture_output": True, "text": True, "timeout": 10}
    how["env"] = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run([*command, "--exclude=*"], **how)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
