"""List folders backwards: one build of `reproduce` finds this file as its `sitecustomize`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

_listdir, _scandir = os.listdir, os.scandir


class _Reversed:
    """An iterator like os.scandir's."""

    def __init__(self, *place: Any) -> None:
        with _scandir(*place) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        self._entries = iter(found)

    def __iter__(self) -> Iterator[os.DirEntry[Any]]:
        return self._entries

    def __next__(self) -> os.DirEntry[Any]:
        return next(self._entries)

    def __enter__(self) -> _Reversed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: all entries were read at once."""


vars(os).update(
    listdir=lambda *place: sorted(_listdir(*place), reverse=True),
    scandir=_Reversed,
)
