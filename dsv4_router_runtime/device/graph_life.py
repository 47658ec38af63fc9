"""The end of a CUDA graph's life, seen from the process that captured it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from . import driver

# sizeof(sem_t) is 32 on 64-bit Linux.
_SEMAPHORE_BYTES = 64


class GraphLife:
    """Tells whether a graph, and every executable graph and copy made from it, is gone.

    The graph retains a user object. The driver calls the object's destructor once nothing can
    replay the graph any more and the last replay has ended. It calls it on a thread of its own,
    where a function may neither call CUDA nor block. A Python callback would wait for the
    interpreter's lock there, and would crash a process whose interpreter has ended. The destructor
    is therefore sem_post of the C library, on memory that is freed only after it was called.
    """

    def __init__(self, graph: Any) -> None:
        cuda, libc = driver.bindings(), _libc()
        self._semaphore = libc.calloc(1, _SEMAPHORE_BYTES)
        if not self._semaphore or libc.sem_init(self._semaphore, 0, 0):
            raise MemoryError("no memory for a semaphore")
        post = cuda.CUhostFn(ctypes.cast(libc.sem_post, ctypes.c_void_p).value)
        unsynchronised = cuda.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        made = cuda.cuUserObjectCreate(self._semaphore, post, 1, unsynchronised)
        if int(made[0]) != 0:
            libc.free(self._semaphore)
        user_object = driver.checked("making a user object", made)
        move = cuda.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        retained = cuda.cuGraphRetainUserObject(graph, user_object, 1, move)
        if int(retained[0]) != 0:
            # Not the semaphore's bytes: the destructor posts it on the driver's thread, later.
            cuda.cuUserObjectRelease(user_object, 1)
        driver.checked("giving the captured graph a user object", retained)

    def has_ended(self) -> bool:
        """Return whether the graph is gone."""
        libc = _libc()
        if self._semaphore and libc.sem_trywait(self._semaphore) == 0:
            semaphore, self._semaphore = self._semaphore, 0
            libc.free(semaphore)
        return not self._semaphore


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    libc.sem_post.argtypes = libc.sem_trywait.argtypes = [ctypes.c_void_p]
    return libc
