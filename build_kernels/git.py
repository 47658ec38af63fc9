"""Run git: the one place that does."""

from __future__ import annotations

import subprocess
from pathlib import Path


class NoGitError(Exception):
    """git cannot be run, or does not end; the message is the system's reason."""


class GitError(Exception):
    """git ran and failed; the message is what it told."""


def git(*arguments: str, folder: Path | None = None, seconds: float | None = None) -> bytes:
    """Return the output of a git command in a folder, the current one by default."""
    place = [] if folder is None else ["-C", str(folder)]
    try:
        done = subprocess.run(
            ["git", *place, *arguments], capture_output=True, timeout=seconds, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise NoGitError(str(error)) from error
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip()
        raise GitError(told or f"git exits {done.returncode}")
    return done.stdout
