"""A Ray of two nodes does what this machine does, and a worker of it that is killed loses nothing."""

import errno
import os
import signal
import sys

import psutil
import pytest
import ray
import test_workers
from ray.cluster_utils import Cluster
from test_run import call, find_run, put_cell, start
from test_workers import CLIPS, codec, find_waiting, rows, small_shards, wait_for, whole, write_at_gate  # noqa: F401  fixtures

from csm_nb.corpora import tokens
from csm_nb.corpora.tokens import TokensError, write_tokens
from csm_nb.processes import identify_process, is_running
from csm_nb.provenance import read_json


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two nodes with a core each on this machine, which is gone afterwards."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        for module in (sys.modules[__name__], test_workers):  # nodes know the package, and not its tests
            ray.cloudpickle.register_pickle_by_value(module)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", made.address)
            yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_two_nodes_write_the_same_bytes_and_where_a_worker_is_killed_nothing_is_lost(write_at_gate, whole, cluster):  # noqa: F811
    assert write_at_gate(True, "ray") == whole


def refuse_shard(codec, job):  # noqa: F811
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_shard_raises_on_a_node_is_raised_here(rows, codec, tmp_path, monkeypatch, cluster):  # noqa: F811
    monkeypatch.setattr(tokens, "_make_shard", refuse_shard)
    with pytest.raises(TokensError, match="no room left on the disk.* 0 of 13 shards are there, and stay"):
        write_tokens(rows, codec, tmp_path, "ray")


GATE = """
import os, pathlib, time
gate = pathlib.Path({gate!r})
(gate / f"at-{{os.getpid()}}").touch()
while not (gate / "open").exists(): time.sleep(0.01)
"""


def test_notebooks_run_on_nodes_and_where_a_worker_is_killed_they_run_again(project, tmp_path_factory, cluster):
    gate = tmp_path_factory.mktemp("gate")
    put_cell(project, "01_anchor", GATE.format(gate=str(gate)))
    runner = start(project, "--langs", "da", "sv", "--stages", "01_anchor", "02_synthetic", "--engine", "ray")
    try:
        kernels = wait_for(lambda: (len(found := find_waiting(gate)) == 2 and found) or runner.poll() is not None)
        assert kernels is not True, runner.communicate()[0]
        kernel = identify_process(kernels[0])
        worker = next(parent for parent in psutil.Process(kernels[0]).parents() if parent.name().startswith("ray::"))
        os.kill(worker.pid, signal.SIGKILL)
        wait_for(lambda: not is_running(kernel))  # it does not train on beside the one that replaces it
        (gate / "open").touch()
        output = runner.communicate(timeout=300)[0]
    finally:
        runner.kill()
    assert runner.returncode == 0, output
    for stage in ("01_anchor", "02_synthetic"):
        for language in ("da", "sv"):
            folder = find_run(project, stage, language)  # one, and no other beside it
            assert read_json(folder / "run.json")["status"] == "done" and (folder / "notebook.html").is_file()
    assert len(find_waiting(gate)) == 3
    code, output = call(project, "--langs", "da", "--stages", "01_anchor", "--engine", "ray")
    assert code == 0 and "skipped: done before" in output
