"""Who does the shards of a corpus: this process, processes beside it, or Ray."""

import io
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import get_context

import torch

from csm_nb import cluster
from csm_nb.recipe import ENGINES, ParameterError

# A worker starts in 6 to 10 s (it imports torch and transformers). So many clips of 3 s take csm-mini 20 s on one core, a
# full-size Mimi 150 s; with fewer it does not pay.
FEWEST_CLIPS = 512
GPU_SHARE = 0.5  # two workers share a GPU: while one reads or writes, the other encodes
RETRIES = 5  # of a shard whose Ray worker or node died


def run_jobs(work, codec, jobs, clips: int, workers: str = "local"):
    """Yield work(codec, job) of each of `jobs`, in the order in which they are done; `clips` is how many they hold together.

    `local` is this process; on a CPU, with FEWEST_CLIPS and more, as many processes as torch was given threads; on a GPU two
    threads, so that one reads while the other encodes. `ray` is one task per job, on the cluster of RAY_ADDRESS or on a
    local Ray that is started and stopped here, with half a GPU each where there are GPUs. What a job raises is raised here.
    Where a process is killed, this one does what is left; a killed Ray worker's job is done by another. `work` and the jobs
    must be picklable. Raises ParameterError for other workers, or where Ray is missing.
    """
    jobs = list(jobs)
    if workers not in ENGINES:
        raise ParameterError(f"workers is {workers!r}; allowed: {', '.join(ENGINES)}")
    if workers == "ray":
        yield from _run_by_ray(work, codec, jobs)
    elif codec.device.type != "cpu":
        with ThreadPoolExecutor(min(2, len(jobs)) or 1) as pool:
            yield from pool.map(partial(work, codec), jobs)
    elif (count := min(torch.get_num_threads(), len(jobs))) > 1 and clips >= FEWEST_CLIPS:
        yield from _run_by_processes(work, codec, jobs, count)
    else:
        yield from map(partial(work, codec), jobs)


def _pack(codec):
    """Return a codec as bytes: multiprocessing would put it into /dev/shm, which holds 64 MB in many containers."""
    file = io.BytesIO()
    torch.save(codec, file)
    return file.getvalue()


def _unpack(packed, device="cpu"):
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False).to(device)


# Processes. They are spawned: a forked one would inherit the locks and threads of torch and of a notebook.


def _run_by_processes(work, codec, jobs, count):
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(count, context, _start_process, (_pack(codec), ours)) as pool:
        undone = {pool.submit(_work_in_process, work, job): job for job in jobs}
        try:
            for done in as_completed(list(undone)):
                yield done.result()
                del undone[done]
        except BrokenProcessPool:
            print(f"one of {count} processes that encode was killed, perhaps for want of memory: going on in one", flush=True)
        finally:
            theirs.close()  # whoever is still at work ends: after an error, an interrupt, or this process's own end
            pool.shutdown(cancel_futures=True)
    yield from map(partial(work, codec), undone.values())


def _start_process(packed, ours):
    global _CODEC
    threading.Thread(target=_end_with, args=(ours,), daemon=True).start()
    torch.set_num_threads(1)
    _CODEC = _unpack(packed)


def _end_with(pipe):
    """End this process when nobody is left at the other end of `pipe`, as when the one that started it was killed."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


def _work_in_process(work, job):
    return work(_CODEC, job)


# Ray


def _run_by_ray(work, codec, jobs):
    own = cluster.start_ray()
    import ray

    resources = ray.cluster_resources()
    gpu = {"num_gpus": GPU_SHARE, "max_calls": 0} if resources.get("GPU") else {}  # 0: its process stays, with its codec
    task = ray.remote(_work_by_ray).options(num_cpus=1, max_retries=RETRIES, **gpu)
    ahead = 2 * int(resources.get("CPU", 1)) + 2  # so that the rows of a large corpus are not all in flight
    try:
        kept, waiting, running = ray.put(_pack(codec)), deque(jobs), []
        while waiting or running:
            while waiting and len(running) < ahead:
                running.append(task.remote(work, [kept], waiting.popleft()))
            (done,), running = ray.wait(running)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            yield result
    finally:
        for task in running:
            ray.cancel(task, force=True)
        if own:
            ray.shutdown()


def _work_by_ray(work, kept, job):
    torch.set_num_threads(1)
    return work(_fetch_codec(kept[0]), job)


@cache  # per process of Ray, which does many shards
def _fetch_codec(kept):
    import ray

    return _unpack(ray.get(kept), "cuda" if ray.get_gpu_ids() else "cpu")
