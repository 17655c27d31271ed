"""A run's folder: named by everything that can change its result, taken by one process, marked when it is done."""

import contextlib
import os
import random
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from csm_nb import paths
from csm_nb.claims import MOMENT, claim, is_held, name_holder
from csm_nb.corpora.listed import find_listed, find_remote, identify_stream, split_corpora
from csm_nb.hub import find_model, list_models
from csm_nb.languages import LANGUAGES
from csm_nb.paths import STAGES, TRAINING, resolve_path, show_path
from csm_nb.processes import count_cores, identify_process, is_running
from csm_nb.provenance import (
    describe_commit,
    describe_host,
    describe_versions,
    hash_code,
    hash_file,
    hash_folder,
    hash_recordings,
    hash_value,
    read_json,
    write_json,
)
from csm_nb.recipe import TRAINED, ParameterError, pick_fields, suggest
from csm_nb.runs.kernel import watch_cells
from csm_nb.runs.params import (
    FILES,
    PLACES,
    RECORDINGS,
    _code_cells,
    _is_parameters,
    _list_optional,
    _notebook_path,
    check_inputs,
    check_params,
    read_cell,
)

HANDED_DOWN = "CSM_NB_RUN_DIR"  # the environment variable by which the runner tells a notebook its folder
RUNNER = "runner.json"  # in a run's folder: which processes of csm_nb.runs and papermill are at work on it, on their host
# In a run's folder: what its kernel claims, and what is claimed by who runs it through papermill.
RECORD, NOTEBOOK = "run.json", "notebook.ipynb"
# Parameters that change no number and nothing that is shown
QUIET = {*PLACES, "log_every", "save_every", "keep_checkpoints", "price", "budget", "concurrency"}
_HELD = {}  # the claim on the folder that this process's notebook writes to


@dataclass(frozen=True)
class Run:
    """One run of one stage: where its parameters are read after `open_run`, as `run.corpus_clips`.

    `params` are the checked ones, as run.json has them; a global that a cell changed later is not what ran. `inputs` maps a
    parameter that names files or a model to its path (or hub id) and hash. `origins` says where the recipe's fields are from.
    """

    stage: str
    language: str
    dir: Path
    params: dict
    inputs: dict
    origins: dict = field(default_factory=dict)

    def __getattr__(self, name):
        """Return a parameter of the run by its name. Raises AttributeError with the names there are."""
        params = self.__dict__.get("params", {})
        if name in params:
            return params[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"a run has no {name!r}{suggest(name, params)} It has dir, place, data, inputs and the parameters "
                             f"{', '.join(params)}")

    @property
    def languages(self) -> list[str]:
        """The languages that its adapter is taught: its own, and those of `also`."""
        return [self.language, *self.params.get("also", [])]

    @property
    def place(self) -> str:
        """The run's folder as a page shows it: below the project's root relative to it."""
        return show_path(self.dir)

    @property
    def data(self) -> Path:
        """Where tokens, trainings and speech are kept, for all runs of one runs_dir: data/ beside it."""
        return resolve_path(self.params["runs_dir"]).parent / "data"


# Inputs, code and their hash


def find_inputs(params: dict) -> dict[str, dict]:
    """Return {name: {"path", "hash"}} of the files and models that a stage's effective parameters name.

    Models hash as their weights and settings, a hub id that is not under models/ as itself, a manifest and a folder of audio
    as all their bytes, a listed corpus also as how it is read. Where languages are compared, each adapter in `adapters_dir` is
    an input.
    """
    inputs = {}
    for key, names in list_models(params).items():
        places = [find_model(name) for name in names]
        digests = [name if place is None else hash_folder(place) if place.is_dir() else hash_file(place)
                   for name, place in zip(names, places, strict=True)]
        shown = [name if place is None else show_path(place) for name, place in zip(names, places, strict=True)]
        inputs[key] = {"path": ", ".join(shown), "hash": digests[0] if len(digests) == 1 else hash_value(digests)}
    for key in RECORDINGS:
        if params.get(key):
            parts = split_corpora(params[key])
            parts = [(_hash_corpus(name, params["language"]), hours) for name, hours in parts]
            one = len(parts) == 1 and parts[0][1] is None
            inputs[key] = {"path": show_path(params[key]), "hash": parts[0][0] if one else hash_value(parts)}
    for key in FILES:
        if params.get(key):
            path = resolve_path(params[key])
            inputs[key] = {"path": show_path(path), "hash": hash_folder(path) if path.is_dir() else hash_file(path)}
    if params.get("init_adapter"):
        folder = _find_adapter(params["init_adapter"], params, inputs)
        inputs["init_adapter"] = {"path": show_path(folder), "hash": hash_folder(folder)}
    compared = [*params["compare"], params["language"]] if {"compare", "adapters_dir"} <= params.keys() else []
    for code in compared:
        folder = resolve_path(params["adapters_dir"]) / name_trained(params, code)
        if folder.is_dir():
            inputs[folder.name] = {"path": show_path(folder), "hash": hash_folder(folder)}
    return inputs


def _hash_corpus(name, language):
    """Return a hash of one corpus and of how it is read, which changes its rows; of the hub, of its id and that alone."""
    if remote := find_remote(language, name):
        return identify_stream(remote)
    content, entry = hash_recordings(resolve_path(name)), find_listed(language, name)
    read = [entry.get("config"), entry.get("columns"), *filter(None, [entry.get("filters")])]
    return hash_value([content, read]) if any(read) else content


def name_trained(params: dict, language: str) -> str:
    """Return the name of the folder that 03 leaves in adapters_dir: lora_no, or full_no where everything was trained.

    One that is taught several languages (`also`) has them all, in the order of csm_nb.languages: lora_no+sv+da.
    """
    taught = {params.get("language"), *params.get("also", [])}
    codes = [code for code in LANGUAGES if code in taught] if language in taught else [language]
    return f"{params.get('method', 'lora')}_{'+'.join(codes)}"


def find_adapter(init_adapter: str, run: Run) -> Path | None:
    """Return the folder, of an adapter or a fully trained model, that a run goes on from; None for "".

    `init_adapter` is a stage's name (its newest complete run of the same language on the same base model under
    `runs_dir`, folder `adapter/`) or a folder. Raises ParameterError that says which stage to run first.
    """
    if not init_adapter:
        return None
    if init_adapter == run.params.get("init_adapter"):  # what its hash was made of, even if newer ones came
        return resolve_path(run.inputs["init_adapter"]["path"])
    return _find_adapter(init_adapter, run.params, run.inputs)


def _find_adapter(init_adapter, params, inputs):
    method = params.get("method", "lora")
    if init_adapter not in STAGES:
        folder = resolve_path(init_adapter)
        for candidate in (folder, folder / "adapter"):
            if (candidate / TRAINED[method]).is_file():
                return candidate
        raise ParameterError(
            f"init_adapter is {init_adapter!r}, and {folder} holds no {TRAINED[method]}; allowed: a stage "
            f"({', '.join(TRAINING)}), the folder of an adapter, or empty"
        )
    language, runs, base = params["language"], resolve_path(params["runs_dir"]), inputs["base_model"]["hash"]
    for done in sorted(runs.glob(f"{language}/{init_adapter}/*/done.json"), key=os.path.getmtime, reverse=True):
        adapter, record = done.parent / "adapter", read_json(done.with_name("run.json"))
        alike = _list_taught(record["params"]) == _list_taught(params)
        if (adapter / TRAINED[method]).is_file() and record["inputs"].get("base_model", {}).get("hash") == base and alike:
            return adapter
    tag, also = _list_taught(params)
    taught = f", tag={tag}" * (tag != "none") + f", also={also}" * bool(also)
    raise ParameterError(
        f"init_adapter is {init_adapter!r}, and {show_path(runs)}/{language}/{init_adapter} holds no complete run with "
        f"method={method}{taught} on {params['base_model']}; run {init_adapter} for {language} first, or give a folder, or empty"
    )


def _list_taught(params):
    return params.get("tag", "none"), sorted(params.get("also", []))


def hash_run(stage: str, params: dict, inputs: dict) -> str:
    """Return the 12 hex digits that name a run's folder. Inputs count by content, so a moved project keeps its runs.

    Out of it are QUIET parameters, docstrings, comments, and the sentences of languages that the stage does not ask for.
    """
    named = _drop_quiet({key: value for key, value in params.items() if key not in inputs})
    cells = [cell for cell in _code_cells(_notebook_path(stage)) if not _is_parameters(cell)]
    asked = {"en", params["language"], *params.get("compare", []), *params.get("also", [])}
    code = hash_code("\n".join("".join(cell["source"]) for cell in cells), paths.PACKAGE, ("runs.templates",),
                     tuple(sorted(LANGUAGES.keys() - asked)))
    return hash_value([named, {key: value["hash"] for key, value in inputs.items()}, code, *_list_optional(stage, params)])


def _drop_quiet(value):
    if isinstance(value, dict):
        return {key: _drop_quiet(item) for key, item in value.items() if key not in QUIET}
    return value


def choose_folder(base: Path) -> Path:
    """Return the folder that the next run of a hash writes to: `base`, or `base.2`, `base.3` ...

    An unfinished one is taken up again, so that training resumes; one that is done, or that another living process is
    writing to, is never touched.
    """
    count, folder = 1, base
    while (folder / "done.json").is_file() or is_alive(folder):
        count += 1
        folder = base.with_name(f"{base.name}.{count}")
    return folder


def is_alive(folder: Path) -> bool:
    """Return whether other living processes, of any host, are at work on a run's folder (name_worker)."""
    return bool(name_worker(folder))


def name_worker(folder: Path) -> str:
    """Return who else is at work on a run's folder, its kernel or who runs papermill: "process 4711 on gpu-3", or ""."""
    places = () if folder in _HELD else (folder / RECORD, folder / NOTEBOOK)
    return next((name_holder(place) for place in places if is_held(place)), "")


def claim_notebook(base: Path):
    """Return (folder, claim) of the next run of a hash (choose_folder), held until the claim is released.

    Who runs a notebook through papermill holds it, also before there is a kernel, and hands the folder down.
    """
    while True:
        folder = choose_folder(base)
        lease = claim(folder / NOTEBOOK, 0)
        with contextlib.suppress(Timeout):  # another was faster
            lease.acquire()
            return folder, lease


def find_orphans(folder: Path) -> list:
    """Return the processes ([id, start time]) of this host at work on a run's folder whose csm_nb.runs was killed.

    A notebook that was opened by hand is none. On another host they end by themselves or hold their claim.
    """
    runner = read_json(folder / RUNNER)
    if not runner.get("runner") or is_running(runner["runner"]):
        return []
    record = read_json(folder / "run.json")
    kernel = record.get("process") if record.get("status") == "running" else None
    return [identity for identity in (runner.get("papermill"), kernel) if is_running(identity)]


def _claim_folder(base):
    """Return the folder that the runner handed down, else choose_folder's, held by this process until its run is finished.

    The runner decided once, and both have to mean the same.
    """
    handed = os.environ.get(HANDED_DOWN)
    handed = Path(handed) if handed and Path(handed).parent == base.parent else None  # else it is run by hand
    if handed and handed.name.split(".")[0] != base.name:
        raise ParameterError(f"{show_path(handed)} was chosen for this run, and by now its parameters, inputs or code ask for "
                             f"{base.name}: something was edited while it started. Run it again")
    folder = handed or choose_folder(base)
    if folder not in _HELD:
        _release_claims()  # of a run that was left unfinished in this process
        lease = claim(folder / RECORD, MOMENT)
        try:
            lease.acquire()
        except Timeout:
            if handed is None:
                return _claim_folder(base)  # another was faster; the next free one
            raise ParameterError(f"{name_holder(folder / RECORD)} is at work in {show_path(folder)}; stop it, or wait for its "
                                 "end, and run this again") from None
        _HELD[folder] = lease
    return folder


def _release_claims():
    while _HELD:
        _HELD.popitem()[1].release()


def find_done(base: Path) -> Path | None:
    """Return the newest complete run of a hash (`base`, `base.2` ...), or None."""
    done = [*base.parent.glob(f"{base.name}/done.json"), *base.parent.glob(f"{base.name}.*/done.json")]
    return max(done, key=os.path.getmtime).parent if done else None


def place_run(stage: str, params: dict) -> tuple[Path, dict]:
    """Return (folder, inputs) of a stage with these effective parameters, whatever is in the folder yet."""
    inputs = find_inputs(params)
    return resolve_path(params["runs_dir"]) / params["language"] / stage / hash_run(stage, params, inputs), inputs


def open_run(stage: str, namespace: dict) -> Run:
    """Return the run that a notebook's parameters ask for, its folder made and everything random seeded.

    The notebook's first call: `run = open_run("01_anchor", globals())`. The parameters are checked, and recorded in
    run.json with their inputs, the commit, versions and machine. Raises ParameterError.
    """
    import numpy as np
    import pandas as pd
    import torch

    missing = [name for name in read_cell(stage) if name not in namespace]
    if missing:
        raise ParameterError(f"{stage}: {', '.join(missing)} not set; run the parameters cell first")
    params = check_params(stage, namespace)
    check_inputs(stage, params)
    base, inputs = place_run(stage, params)
    folder = _claim_folder(base)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {
        "status": "running", "stage": stage, "language": params["language"], "params": params, "seed": params["seed"],
        "inputs": inputs, **describe_commit(paths.ROOT), "versions": describe_versions(), "host": describe_host(),
        "started": time.time(), "process": identify_process(),
    })  # fmt: skip
    if HANDED_DOWN not in os.environ:  # else the runner says how it ended, and makes its page
        watch_cells(folder / RECORD)
    if ":" in params["device"]:  # transformers' Trainer asks nobody and takes the first GPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = params["device"]
    torch.set_num_threads(min(torch.get_num_threads(), count_cores()))  # torch itself knows nothing of a container's quota
    random.seed(params["seed"])
    np.random.seed(params["seed"])  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(params["seed"])
    pd.set_option("display.max_colwidth", None, "display.max_rows", 300)  # a reason that is cut off is none
    return Run(stage, params["language"], folder, params, inputs, _find_origins(stage, namespace, folder))


def _find_origins(stage, namespace, folder):
    """Where the recipe's fields are from that are not at their defaults: what the runner handed down, or the notebook."""
    if str(folder) == os.environ.get(HANDED_DOWN):
        return read_json(folder / RUNNER).get("recipe", {})
    return dict.fromkeys(pick_fields(namespace.get("recipe", {}), stage), "this notebook")


def note_used(run: Run, **kept) -> None:
    """Record in run.json what a run used of what is kept: `note_used(run, tokens=path, training=path)`.

    Each is a path or a list of them, written relative to the project's root where it is below it. A later call adds to
    what an earlier one wrote, so that a run that fails half way still says what it used.
    """
    record = read_json(run.dir / "run.json")
    used = record.get("used", {})
    for name, places in kept.items():
        places = places if isinstance(places, list | tuple) else [places]
        used[name] = list(dict.fromkeys([*used.get(name, []), *map(show_path, places)]))
    write_json(run.dir / "run.json", record | {"used": used})


def finish_run(run: Run, metrics: dict, verdict: str) -> None:
    """Record what a run found, how long it took and its peak memory, and mark it done; the notebook's last call.

    Writes metrics.json (`metrics` with the verdict, a few words such as "go"), completes run.json, and writes done.json
    last: a run without it does not count. Seconds are from `open_run`, memory is of the whole process.
    """
    import torch

    record = {key: value for key, value in read_json(run.dir / "run.json").items() if key != "error"}  # it was overcome
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    record |= {"status": "done", "seconds": round(time.time() - record["started"], 1), "peak_memory_bytes": peak}
    if torch.cuda.is_available():
        record["peak_gpu_memory_bytes"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    write_json(run.dir / "metrics.json", {"verdict": verdict} | metrics)
    write_json(run.dir / "run.json", record)
    write_json(run.dir / "done.json", {"verdict": verdict, "finished": time.time()})
    _release_claims()
    print(f"done in {record['seconds']:.0f} s, {peak / 2**30:.1f} GiB at most: {show_path(run.dir)}")
