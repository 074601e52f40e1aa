# SPDX-License-Identifier: Apache-2.0
"""How long states live, and how they end with the process."""

from __future__ import annotations

import atexit
import sys
import weakref

from ._library import ops

_lives: weakref.WeakSet[Life] = weakref.WeakSet()
_open: set[int] = set()  # states over MPI that were not shut down, those that are gone as well


class Life:
    """Of one state: it ends with the last of the state and its groups, which all hold it."""

    def __init__(self, number: int, over_mpi: bool):
        self.number = number
        """What operators know the state by."""
        self.closed = False
        """Whether it was shut down or left: no call is made any more."""
        self._end = weakref.finalize(self, ops.drop, number)
        self._end.atexit = False
        if over_mpi:
            _open.add(number)
        _lives.add(self)

    def was_shut_down(self) -> None:
        """In order, with all ranks."""
        _open.discard(self.number)

    def leave(self) -> None:
        """Without the other ranks, unless it was shut down. Ends what another thread calls."""
        self.closed = True
        self._end()


class Handle:
    """Belongs to its process: a copy is the same one, and no other process gets it."""

    def __copy__(self):
        return self

    def __deepcopy__(self, _):
        return self

    def __reduce__(self):
        raise TypeError(f"{type(self).__name__}: belongs to this process, and cannot be pickled")


def finalize_mpi() -> None:
    """Collective. Ends MPI, where the package started it, after the last state was shut down; the
    interpreter's exit does it at the latest."""
    for life in list(_lives):
        if life.closed:
            life.leave()
    ops.finalize_mpi(True)


@atexit.register
def _leave() -> None:
    """Nobody may hang because this process ends. Python does not tell its exit status: where states
    were not shut down, that decides later how MPI ends."""
    ops.interpreter_ends()
    for life in list(_lives):
        life.leave()
    if getattr(sys, "last_type", None) is not None:
        ops.finalize_mpi(False)
    elif _open:
        ops.finalize_mpi_by_status()
    else:
        ops.finalize_mpi(True)
