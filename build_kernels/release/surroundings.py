"""The two surroundings of `reproduce`: whatever a build should not depend on is different."""

from __future__ import annotations

import os
import shutil
import site
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_kernels.building.build import BuildError
from build_kernels.git import GitError, NoGitError, git

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkout: its files as they are now, and the commit that they are of.

    changed: whether a file differs from that commit. epoch: the commit's time.
    """

    root: Path
    files: tuple[str, ...]
    commit: str
    epoch: int
    changed: bool


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a build finds around it. modified: the time of its files. backwards: how it lists them.

    folder: the name of the folder that holds its checkout, home and output.
    """

    name: str
    folder: str
    timezone: str
    locale: str
    umask: int
    hash_seed: int
    jobs: int
    modified: int
    backwards: bool


def two_surroundings() -> tuple[Surroundings, Surroundings]:
    """Return the surroundings of the first build and of the second."""
    first = Surroundings(
        name="first",
        folder="first",
        timezone="UTC0",
        locale="C",
        umask=0o022,
        hash_seed=0,
        jobs=1,
        modified=1_000_000_000,
        backwards=False,
    )
    second = Surroundings(
        name="second",
        folder="second/in_another-place",
        timezone="EAST-14",  # another day for 14 hours of 24
        locale="C.UTF-8",
        umask=0o077,
        hash_seed=4242,
        jobs=len(os.sched_getaffinity(0)) + 1,
        modified=1_700_000_000,
        backwards=True,
    )
    return first, second


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folders of one build, in one of the two surroundings."""

    surroundings: Surroundings
    base: Path
    epoch: int

    @property
    def checkout(self) -> Path:
        return self.base / "checkout"

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def log(self) -> Path:
        return self.base / "log"

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the build's processes."""
        around = self.surroundings
        # A cache from before would be the same in both.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
        customised = [str(self.base / "python")] if around.backwards else []
        path = [*customised, str(self.checkout), os.environ.get("PYTHONPATH", "")]
        return kept | {
            "HOME": str(self.base / "home"),
            "TMPDIR": str(self.base / "tmp"),
            # The packages of a user are below HOME.
            "PYTHONUSERBASE": site.getuserbase(),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONHASHSEED": str(around.hash_seed),
            "TZ": around.timezone,
            "LANG": around.locale,
            "LC_ALL": around.locale,
            "SOURCE_DATE_EPOCH": str(self.epoch),
        }


def read_source() -> Source:
    """Read which files this checkout has; BuildError if git cannot tell."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    commit, epoch = _git("log", "-1", "--format=%H %ct").split()
    return Source(
        root=_ROOT,
        # A tracked file that was deleted is listed too.
        files=tuple(sorted(name for name in listed.split("\0") if (_ROOT / name).is_file())),
        commit=commit,
        epoch=int(epoch),
        changed=bool(_git("status", "--porcelain", "--untracked-files=normal")),
    )


def make_place(base: Path, around: Surroundings, source: Source, built: Sequence[str]) -> Place:
    """Copy the checkout, and of its artifacts those that are `built`, into a new place."""
    place = Place(surroundings=around, base=base / around.folder, epoch=source.epoch)
    mask = os.umask(around.umask)
    try:
        for name in ("home", "tmp", "python", "output"):
            (place.base / name).mkdir(parents=True)
        # A file system may list files in the order in which they were made.
        for name in sorted({*source.files, *built}, reverse=around.backwards):
            path = place.checkout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.root / name, path)
            mode = (source.root / name).stat().st_mode | 0o666
            path.chmod(mode & ~around.umask & 0o777)
            os.utime(path, (around.modified, around.modified))
        listing = Path(__file__).with_name("reversed_listing.py")
        shutil.copyfile(listing, place.base / "python" / "sitecustomize.py")
    finally:
        os.umask(mask)
    return place


def _git(*arguments: str) -> str:
    problem = "" if (_ROOT / "pyproject.toml").is_file() else f"{_ROOT} is none"
    try:
        # A name need not be text.
        output = git(*arguments, folder=_ROOT).decode(errors="surrogateescape")
    except NoGitError:
        problem = "git is not installed"
    except GitError as error:
        problem = str(error)
    if problem:
        raise BuildError(
            "reproduce takes the files and the date of a commit, so it needs git and a checkout: "
            f"{problem}; clone the repository and run it there"
        )
    return output
