"""Claims: one process at a time works in a folder, on whichever of the machines that share its disk."""

import contextlib
from pathlib import Path

from filelock import SoftFileLease, Timeout

from csm_nb.paths import show_path

LEASE = 30.0  # seconds without a sign of life from the holder after which another may take over


def claim(folder, timeout: float = -1) -> SoftFileLease:
    """Return a context manager that holds `folder` for this process; its marker lies beside the folder, as .<name>.lease.

    The marker is refreshed every few seconds, which a network disk shows to every host; flock does not reach that far. A
    holder that died is replaced after LEASE seconds. `timeout` is in seconds, 0 does not wait, -1 waits for as long as it
    takes. Raises filelock.Timeout when somebody else still holds it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return SoftFileLease(folder.with_name(f".{folder.name}.lease"), timeout=timeout, lease_duration=LEASE, thread_local=False)


@contextlib.contextmanager
def hold(folder, wait: bool = True):
    """Hold `folder` (claim) in a with block, which gets the lease; its `compromise` tells whether another took over meanwhile.

    While somebody else holds it this one says so and waits; without `wait` it raises filelock.Timeout at once.
    """
    lease = claim(folder, 0)
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
    lease = claim(folder, 0)
    if not Path(lease.lock_file).exists():
        return False
    try:
        lease.acquire()
    except Timeout:
        return True
    lease.release()
    return False


def name_holder(folder) -> str:
    """Return who holds `folder` in words: "process 4711 on gpu-3"."""
    owner = claim(folder, 0).owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "another process"
