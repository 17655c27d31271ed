"""Processes that records name, so that a later call knows which of them are at work; and how many cores and bytes there are."""

import os
import time
from pathlib import Path

import psutil

SAME = 2.0  # s; a start time is counted from the clock, which is set now and then; no process id comes round as soon
CGROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes; cgroup v1 writes no limit as a number near 2**63


def identify_process(pid: int | None = None) -> list:
    """Return [process id, start time] of a process, this one by default: a process id alone comes round again.

    One that is gone by now, or is a zombie, gets the time 0 and so counts as not running.
    """
    try:
        process = psutil.Process(pid)
        return [process.pid, process.create_time()]
    except psutil.Error:
        return [pid, 0.0]


def is_running(identity) -> bool:
    """Return whether the process of `identity` ([id, start time], or None) is at work.

    A zombie has ended: it only waits for its parent to ask how, and in many containers nobody ever asks.
    """
    return _find_process(identity) is not None


def _find_process(identity):
    if not identity:
        return None
    try:
        process = psutil.Process(identity[0])
        same = abs(process.create_time() - identity[1]) < SAME
        return process if same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None
    except psutil.Error:
        return None


def end_processes(identities, seconds: float = 5.0) -> list[int]:
    """End processes and all that descends from them, and return the ids of those that were at work.

    They are asked to end (SIGTERM), and killed if they have not after `seconds`. What they wrote last is on disk, then.
    """
    roots = [process for identity in identities if (process := _find_process(identity))]
    family = {}
    for root in roots:
        try:
            family |= {member.pid: member for member in (*root.children(recursive=True), root)}
        except psutil.Error:
            continue
    family.pop(os.getpid(), None)
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for member in family.values():
            try:
                send(member)
            except psutil.Error:
                continue
        if not _wait_for(family.values(), seconds):
            break
    return sorted(family)


def _wait_for(processes, seconds):
    """Return those that still run after `seconds`. psutil.wait_procs waits for a zombie as well."""
    waiting = [identify_process(process.pid) for process in processes]
    for _ in range(int(seconds / 0.05)):
        waiting = [identity for identity in waiting if is_running(identity)]
        if not waiting:
            break
        time.sleep(0.05)
    return waiting


def count_cores() -> int:
    """Return how many cores this process may use: those it may run on, and no more than its container's quota pays for.

    A quota of 1.5 cores is one: threads beyond it are stopped in the middle of a step.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(read_quota())))


def read_quota() -> float:
    """Return the cores that the control groups of this process pay for; more than any machine has where none limits it."""
    quotas = [float("1e6")]
    for folder in _list_groups("cpu"):
        limit = _read_words(folder / "cpu.max") or _read_words(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        if len(limit) == 2 and limit[0].isdigit() and int(limit[1]):  # without a limit "max", or -1
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas)


def read_memory_left() -> int | None:
    """Return the bytes that the control groups of this process leave it, None where none limits it.

    A group's limit less what its processes hold; what it keeps of files is given back when it is needed.
    """
    left = []
    for folder in _list_groups("memory"):
        limit = _read_words(folder / "memory.max") or _read_words(folder / "memory.limit_in_bytes")
        if limit and limit[0].isdigit() and int(limit[0]) < UNLIMITED:
            held = dict(zip(*[iter(_read_words(folder / "memory.stat"))] * 2, strict=False))
            names = ("anon", "shmem") if "anon" in held else ("total_rss", "total_shmem")
            left.append(max(0, int(limit[0]) - sum(int(held.get(name, 0)) for name in names)))
    return min(left, default=None)


def _list_groups(controller):
    """Return the folders of this process's control groups for a controller, of cgroup v2 and v1: its own and all above.

    A container often sees its own group as the root, and under a name that is another outside: what is not there is skipped.
    """
    lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines() if OWN_GROUPS.is_file() else []
    folders = [CGROUP, CGROUP / controller]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "" or controller in controllers.split(","):
            mounts = [CGROUP, CGROUP / "unified"] if controllers == "" else [CGROUP / controllers, CGROUP / controller]
            for mount in mounts:
                group = Path(path.lstrip("/"))
                folders += [mount / part for part in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def _read_words(*files):
    try:
        return [word for file in files for word in file.read_text(encoding="utf-8").split()]
    except OSError:
        return []
