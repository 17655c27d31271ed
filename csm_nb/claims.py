"""Claims: one process at a time works in a folder, on whichever of the machines that share its disk."""

from pathlib import Path

from filelock import SoftFileLease

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
