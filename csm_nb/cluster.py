"""Ray, where there is one: connect to it or start it, and run a stage's command on one of its nodes, which share the disk.

`python -m csm_nb.cluster FOLDER COMMAND...` is that command as a process of this machine: its exit code is the command's, and
when it ends, however that is, the command ends.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from csm_nb import paths
from csm_nb.claims import hold
from csm_nb.processes import end_processes, identify_process
from csm_nb.recipe import ParameterError

RETRIES = 3  # of a stage whose node died
# What a node is told of this machine's environment, beside what the runner sets itself: a node has its own, its keys too
HANDED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "JUPYTER_PREFER_ENV_PATH", "PYDEVD_DISABLE_FILE_VALIDATION", "PYTHONPATH",
          "TOKENIZERS_PARALLELISM", "CSM_NB_RUN_DIR", "HF_HUB_OFFLINE")


def start_ray() -> bool:
    """Connect to the Ray of RAY_ADDRESS or start a local one, unless it is there already; return whether this call did.

    Who did stops it (ray.shutdown). Its workers import this package from where it is here. Raises ParameterError where the
    package ray is missing, or nothing answers at RAY_ADDRESS.
    """
    try:
        import ray
    except ImportError as error:
        raise ParameterError("Ray is asked for, and the package is not installed: make setup EXTRAS=scale") from error
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    own = os.pathsep.join([str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": own}},
                 **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ParameterError(f"RAY_ADDRESS is {address!r}, and no Ray answers ({error}); allowed is the address that "
                             "`ray start --head` says, or none: a local one is started") from error
    return True


def share_cores(jobs: int) -> int:
    """Return the cores of the Ray that is connected for each of `jobs` stages at once: no more than its smallest node has."""
    import ray

    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = [count for count in cores if count]
    return max(1, min(min(cores, default=1), sum(cores) // jobs))


def run_on_node(folder: Path, command: list[str]) -> int:
    """Run a command on a node of Ray, its output at the end of log.txt in `folder`, and return its exit code.

    It takes as many cores as OMP_NUM_THREADS says, no more than the smallest node has, and a GPU where Ray has some. Where its
    node dies it is run again on another; on SIGTERM and Ctrl-C it is ended.
    """
    start_ray()
    import ray

    environment = {name: os.environ[name] for name in HANDED if name in os.environ}
    environment["RAY_ADDRESS"] = ""  # what a stage asks of Ray would wait for the cores that it holds itself
    cores = min(int(os.environ.get("OMP_NUM_THREADS", 1)), share_cores(1))  # more than a node has would wait for ever
    environment["OMP_NUM_THREADS"] = str(cores)
    needs = {"num_cpus": cores, "num_gpus": int(ray.cluster_resources().get("GPU", 0) > 0)}
    task = ray.remote(_run_here).options(max_retries=RETRIES, retry_exceptions=False, **needs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    running = task.remote(str(folder), command, environment)
    try:
        return ray.get(running)
    except KeyboardInterrupt:
        ray.cancel(running)
        ray.wait([running], timeout=4)
        return -signal.SIGTERM


def _run_here(folder, command, environment):
    """Run a command on this node, tied to this process, so that it does not outlive it."""
    with hold(Path(folder) / "run.json"):  # the kernel on a node that died holds it for a while yet
        pass
    with open(Path(folder) / "log.txt", "ab") as log:
        tied = [sys.executable, "-m", "csm_nb.cluster", "--tied", *command]
        process = subprocess.Popen(tied, env=os.environ | environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                                   start_new_session=True)
        try:
            return process.wait()
        finally:
            process.stdin.close()
            process.wait()


def _run_tied(command):
    """Run a command until it ends or standard input does, as when the process at its other end was killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end():
        os.read(0, 1)  # nothing is ever written; sys.stdin's lock would be in the way when this process ends
        end_processes([identify_process(process.pid)])  # with its kernel, which is a session of its own

    threading.Thread(target=end, daemon=True).start()
    return process.wait()


def main(words) -> int:
    """Run the command that the words hold, and return its exit code, negative for a signal as subprocess says it."""
    if words[0] == "--tied":
        return _run_tied(words[1:])
    return run_on_node(Path(words[0]), words[1:])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    if code < 0:  # end as the command did
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
