"""One run, one folder: a second process is refused while the first is at work there."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxseg.problem import Problem
from jaxseg.run.writers import naming

NAME = ".owner"


class OwnershipProblem(Problem, RuntimeError):
    """Another process works in the folder; the message says which."""


@contextlib.contextmanager
def owning(workdir: str | Path) -> Iterator[None]:
    """Keeps the folder of a run to this process while the context lasts.

    The lock is the kernel's: it is free again as soon as the process is gone, however it ended. The
    file that carries it stays, and names who held it last.

    Args:
      workdir: existing folder.
    Raises:
      OwnershipProblem: another run, in this or another process, works there.
      OSError: the folder can not be written, or its file system has no locks.
    """
    path = os.path.join(workdir, NAME)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid, host = [*file.read().decode().split(), "unknown", "unknown"][:2]
            raise OwnershipProblem(
                f"process {pid} on host {host} is training in {workdir}: wait until it is done, "
                "stop it, or give this run a folder of its own with --config.workdir=DIR"
            ) from None
        with naming(path):
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
