"""Claims: one process at a time works in a folder, on whichever of the machines that share its disk."""

import contextlib
import socket
from pathlib import Path

import psutil
from filelock import SoftFileLease, Timeout

from csm_nb.paths import show_path

LEASE = 30.0  # seconds without a sign of life from the holder after which another may take over
MOMENT = 2.0  # seconds; whoever asks whether a folder is held holds it for as long as that takes


def claim(folder, timeout: float = -1) -> SoftFileLease:
    """Return a context manager that holds `folder` for this process; its marker lies beside the folder, as .<name>.lease.

    The marker is refreshed every few seconds, which a network disk shows to every host; flock does not reach that far. A
    holder that died is replaced at once on its own host, and after LEASE seconds on another. `timeout` is in seconds, 0 does
    not wait, -1 waits for as long as it takes. Raises filelock.Timeout when somebody else still holds it.
    """
    marker = _find_marker(folder)
    marker.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(marker, timeout=timeout, lease_duration=LEASE, thread_local=False)
    if (owner := lease.owner) and _is_zombie(owner):
        lease.force_break()
    return lease


def _find_marker(folder):
    return Path(folder).with_name(f".{Path(folder).name}.lease")


def _is_zombie(owner):
    """Tell whether a holder of this host has ended and waits for a parent that never asks; filelock takes it for alive."""
    try:
        return owner.hostname.partition("?")[0] == socket.gethostname() and (
            psutil.Process(owner.pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextlib.contextmanager
def hold(folder, wait: bool = True):
    """Hold `folder` (claim) in a with block, which gets the lease; its `compromise` tells whether another took over meanwhile.

    While somebody else holds it this one says so and waits; without `wait` it raises filelock.Timeout.
    """
    lease = claim(folder, MOMENT)
    try:
        lease.acquire()
    except Timeout:
        if not wait:
            raise
        print(f"{name_holder(folder)} is at work in {show_path(folder)}: waiting for what it leaves", flush=True)
        lease.acquire(timeout=-1)
    try:
        yield lease
    finally:
        lease.release()


def is_held(folder) -> bool:
    """Return whether a living process, of this host or another, holds `folder`; this process counts as well."""
    if not _find_marker(folder).exists():
        return False
    try:
        with claim(folder, 0):
            return False
    except Timeout:
        return True


def name_holder(folder) -> str:
    """Return who holds `folder` in words: "process 4711 on gpu-3"."""
    owner = SoftFileLease(_find_marker(folder), lease_duration=LEASE).owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
