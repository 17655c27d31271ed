"""Who is at work, and what a container leaves: zombies have ended, quotas and limits count wherever they are set."""

import subprocess
import sys
import time

import psutil
import pytest

from csm_nb import processes

FOREVER = "import time; time.sleep(600)"


@pytest.fixture
def sleeper():
    child = subprocess.Popen([sys.executable, "-c", FOREVER])
    yield child
    child.kill()
    child.wait()


def test_a_process_runs_until_it_ends_and_a_zombie_has_ended(sleeper):
    identity = processes.identify_process(sleeper.pid)
    assert processes.is_running(identity)
    assert not processes.is_running([identity[0], identity[1] - 60])  # the id is another process's by now
    sleeper.kill()
    deadline = time.time() + 30
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE and time.time() < deadline:
        time.sleep(0.01)
    assert psutil.Process(sleeper.pid).create_time() == identity[1]  # nobody has asked for it yet
    assert not processes.is_running(identity)
    assert not processes.is_running(None) and processes.identify_process(2**30) == [2**30, 0.0]


def test_a_process_is_ended_with_all_that_it_started_even_if_it_ignores_the_request(tmp_path):
    code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += f"subprocess.Popen([sys.executable, '-c', {FOREVER!r}]); print('ready', flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
    identities = [processes.identify_process(member.pid) for member in family]
    assert processes.end_processes(identities[:1], seconds=0.5) == sorted(member.pid for member in family)
    assert len(identities) == 2 and not any(map(processes.is_running, identities))
    assert processes.end_processes(identities) == []
    parent.wait()


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Let control groups be files below a folder; return a function that writes them, and the process's own groups."""
    own = tmp_path / "own"
    monkeypatch.setattr(processes, "CGROUP", tmp_path)
    monkeypatch.setattr(processes, "OWN_GROUPS", own)
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(lines, **files):
        own.write_text(lines)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(("lines", "files", "cores"), [
    ("0::/\n", {"cpu_DOT_max": "300000 100000\n"}, 3),  # v2, in a container's own name space
    ("0::/a/b\n", {"a__cpu_DOT_max": "250000 100000\n", "a__b__cpu_DOT_max": "max 100000\n"}, 2),  # set above the own group
    ("0::/a/b\n", {"a__b__cpu_DOT_max": "50000 100000\n"}, 1),  # half a core is one that stands still now and then
    ("0::/\n", {"cpu_DOT_max": "max 100000\n"}, 16),
    ("4:cpu,cpuacct:/docker/1\n", {"cpu__cpu_DOT_cfs_quota_us": "400000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 4),  # v1
    ("4:cpu:/x\n", {"cpu__x__cpu_DOT_cfs_quota_us": "-1\n", "cpu__x__cpu_DOT_cfs_period_us": "100000\n"}, 16),
    ("", {}, 16),
])  # fmt: skip
def test_cores_are_those_that_the_container_pays_for(groups, lines, files, cores):
    groups(lines, **files)
    assert processes.count_cores() == cores


@pytest.mark.parametrize(("lines", "files", "left"), [
    ("0::/\n", {"memory_DOT_max": "1000\n", "memory_DOT_stat": "anon 400\nfile 100\nshmem 50\n"}, 550),
    ("0::/a/b\n", {"a__memory_DOT_max": "1000\n", "a__memory_DOT_stat": "anon 900\n", "a__b__memory_DOT_max": "800\n",
                   "a__b__memory_DOT_stat": "anon 100\n"}, 100),  # what others of the same pod hold is gone
    ("9:memory:/docker/1\n", {"memory__memory_DOT_limit_in_bytes": "1000\n",
                              "memory__memory_DOT_stat": "cache 5\ntotal_rss 300\ntotal_shmem 0\n"}, 700),
    ("9:memory:/\n", {"memory__memory_DOT_limit_in_bytes": "9223372036854771712\n"}, None),
    ("0::/\n", {"memory_DOT_max": "max\n"}, None),
])  # fmt: skip
def test_memory_left_is_the_narrowest_limit_on_the_way_up(groups, lines, files, left):
    groups(lines, **files)
    assert processes.read_memory_left() == left
