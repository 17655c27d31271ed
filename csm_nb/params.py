"""Parameters of a stage: checked against its notebook's own cell, resolved, hashed; and the folder its run writes to.

A stage is one notebook. Its parameters are the annotated literals in the cell tagged `parameters`, under the flat YAML
files of `params/` (a language, then a profile), under what the command line says. A run's folder is
`runs_dir/<language>/<stage>/<hash>/`; the hash is of everything that can change the result, so the same question
is answered once.
"""

import ast
import json
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from csm_nb.clean import EncodingError, find_file, read_text
from csm_nb.languages import get_language
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

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
STAGES = ("00_mimi_sanity", "01_anchor", "02_synthetic", "03_adapter", "04_confusion", "05_phonemes")

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}
MODELS = ("codec_model", "base_model", "lid_model", "asr_model", "align_model")  # a folder, or the id of a model on the hub
SHIPPED = ("csm-mini", "lid-mini", "asr-mini")  # under models/, on no hub
RECORDINGS = ("audio", "corpus")  # a manifest, or a folder of audio
FILES = ("lexicon", "marks")
PLACES = ("runs_dir", "device", "price_per_hour")  # where a run happens; no part of what it computes
CHOICES = {
    "method": ("lora", "full"), "schedule": ("cosine", "linear"), "dtype": ("auto", "bfloat16", "float32"),
    "backend": ("transformers", "unsloth"),
}  # fmt: skip
TRAINED = {"lora": "adapter_config.json", "full": "config.json"}  # by method: what a stage leaves in its folder adapter/


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names the file, the key, the value found and what is allowed."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its annotation (`str`, `int`, `float`, `bool` or `list`) and its default."""

    type: str
    default: object


@dataclass(frozen=True)
class Run:
    """One run of one stage. `inputs` maps a parameter that names files or a model to its path (or hub id) and hash."""

    stage: str
    language: str
    dir: Path
    params: dict
    inputs: dict


# Parameters


def resolve_path(path) -> Path:
    """Return an absolute path: `path` itself if it is absolute, else below the project's root, whatever the cwd.

    A name with accents is found in either Unicode form (find_file).
    """
    return find_file(ROOT / Path(path).expanduser())


def find_model(name) -> Path | None:
    """Return where a model is in this project, or None: a path itself, or a hub id's folder under models/ by its last name."""
    if resolve_path(name).exists():
        return resolve_path(name)
    place = ROOT / "models" / str(name).split("/")[-1]
    return place if is_hub_id(name) and place.name not in SHIPPED and os.path.lexists(place) else None


def is_hub_id(name) -> bool:
    """Return whether a model's name has the form of a hub id, owner/name, and is no path: data/mine is one, there or not."""
    owner, *rest = str(name).split("/")
    return len(rest) == 1 and bool(rest[0]) and not owner.startswith((".", "~")) and owner != "" and not (ROOT / owner).is_dir()


def list_models(params: dict) -> dict[str, list[str]]:
    """Return {parameter: the models that it stands for}; by-language, in asr_model, is one for each language that is heard.

    Those are the language of a stage, English in 01_anchor, and both and all others of `compare` where they are compared.
    """
    models = {key: [params[key]] for key in MODELS if params.get(key)}
    if models.get("asr_model") == ["by-language"]:
        heard = (params["language"],)
        if "compare" in params or "anchor_clips" in params:
            heard = ("en", *params.get("compare", ()))
        models["asr_model"] = list(dict.fromkeys(get_language(code).asr for code in heard))
    return models


def show_path(path) -> str:
    """Return `path` as messages and run.json show it: below the project's root relative to it, otherwise absolute."""
    path = resolve_path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_cell(stage: str) -> dict[str, Parameter]:
    """Return the parameters of a stage's notebook by name, in the order of its cell.

    The cell is parsed rather than read through papermill.inspect_notebook, which drops a line with a second "=" in it
    (in a comment, say) and takes seconds to import. Raises ParameterError if the notebook or the cell is not there, or
    if the cell holds anything but annotated literals.
    """
    path = _notebook_path(stage)
    cells = [cell for cell in _code_cells(path) if _is_parameters(cell)]
    if len(cells) != 1:
        raise ParameterError(f"{show_path(path)}: {len(cells)} cells are tagged `parameters`; one is allowed")
    parameters = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        try:
            kind, default = node.annotation.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            kind, default = "", None
        if kind not in TYPES or type(default) is not TYPES[kind]:
            raise ParameterError(
                f"{show_path(path)}: line {node.lineno} of the parameters cell is `{ast.unparse(node)}`; allowed is "
                f"`name: type = literal` with a type of {', '.join(TYPES)} that the literal has"
            )
        parameters[node.target.id] = Parameter(kind, default)
    return parameters


def name_profile(profile: str) -> Path | str:
    """Return the file of a profile, given by its name in params/ or as a YAML file."""
    return Path(profile).resolve() if profile.endswith(".yaml") else f"params/{profile}.yaml"


def load_params(files=(), overrides=None) -> tuple[dict, dict]:
    """Return (values, origins) of flat YAML files, later ones over earlier ones, and of `overrides` over all.

    `origins` says for each key which file (or "command line") its value is from. Raises ParameterError for a file that
    is missing or no flat YAML, and for a key that no notebook has.
    """
    values, origins = {}, {}
    for file in files:
        path = resolve_path(file)
        if not path.is_file():
            others = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
            raise ParameterError(f"{show_path(path)}: no such file; in that folder there are: {others}")
        try:
            content = yaml.safe_load(read_text(path)) or {}
        except EncodingError as error:
            raise ParameterError(str(error)) from error
        except yaml.YAMLError as error:
            raise ParameterError(f"{show_path(path)}: not readable as YAML: {error}") from error
        if not isinstance(content, dict):
            raise ParameterError(f"{show_path(path)}: found {content!r:.80}; allowed are lines of `key: value`")
        values |= content
        origins |= dict.fromkeys(content, show_path(path))
    values |= overrides or {}
    origins |= dict.fromkeys(overrides or {}, "command line")
    known = {name for stage in STAGES if _notebook_path(stage).is_file() for name in read_cell(stage)}
    for key in values:
        if key not in known:
            raise ParameterError(
                f"{origins[key]}: unknown parameter {key!r} (value {values[key]!r}); "
                f"the notebooks' parameters are: {', '.join(sorted(known))}"
            )
    return values, origins


def check_params(stage: str, values: dict, origins: dict | None = None) -> dict:
    """Return the effective parameters of a stage: its cell's defaults, `values` over them, other stages' keys left out.

    An int is turned into a float where a float belongs. Raises ParameterError for a wrong type, an unknown language or
    recordings that are not there, naming the origin, the key, the value and what is allowed.
    """
    effective = {}
    for key, parameter in read_cell(stage).items():
        origin = (origins or {}).get(key, show_path(_notebook_path(stage)))
        effective[key] = value = _check_type(key, values.get(key, parameter.default), parameter, origin)
        try:
            for code in {"language": [value], "compare": value}.get(key, []):
                get_language(code)
        except ValueError as error:
            raise ParameterError(f"{origin}: {key} is {value!r}: {error}") from error
        if value not in CHOICES.get(key, [value]):
            raise ParameterError(f"{origin}: {key} is {value!r}; allowed: {', '.join(CHOICES[key])}")
        if key in MODELS and value not in ("", "by-language") and not is_hub_id(value) and find_model(value) is None:
            there = ", ".join(sorted(path.name for path in (ROOT / "models").glob("*/"))) or "none"
            raise ParameterError(f"{origin}: {key} is {value!r}, and there is no such folder; under models/ there are: {there}")
        if key in (*RECORDINGS, "lexicon") and value and not resolve_path(value).exists():
            allowed = "a file" if key == "lexicon" else "a manifest.jsonl, a folder of audio, or empty"
            raise ParameterError(f"{origin}: {key} is {value!r}, no {resolve_path(value)} exists; allowed: {allowed}")
    return effective


def _check_type(key, value, parameter, origin):
    def refuse(allowed):
        raise ParameterError(f"{origin}: {key} is {value!r} ({type(value).__name__}); allowed is {allowed}")

    if parameter.type == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[parameter.type]:
        hint = ""
        if parameter.type == "float" and isinstance(value, str):
            try:
                mantissa, exponent = f"{float(value):e}".split("e")
                hint = f"; write {float(mantissa)}e{int(exponent):+d}, with the point and the sign"
            except ValueError:
                pass
        refuse(f"{parameter.type}, such as {parameter.default!r}{hint}")
    if parameter.type == "list" and parameter.default:
        kind = type(parameter.default[0])
        if not value or any(type(item) is not kind for item in value):
            refuse(f"a list of {kind.__name__}, such as {parameter.default!r}")
    return value


# Inputs, code and their hash


def find_inputs(params: dict) -> dict[str, dict]:
    """Return {name: {"path", "hash"}} of the files and models that a stage's effective parameters name.

    Models hash as their weights and settings, a hub id that is not under models/ as itself, a manifest as its bytes and its
    clips' sizes, a folder of audio as its names and sizes. Where languages are compared, each adapter in `adapters_dir` is
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
            inputs[key] = {"path": show_path(params[key]), "hash": hash_recordings(resolve_path(params[key]))}
    for key in FILES:
        if params.get(key):
            path = resolve_path(params[key])
            inputs[key] = {"path": show_path(path), "hash": hash_folder(path) if path.is_dir() else hash_file(path)}
    if params.get("init_adapter"):
        folder = _find_adapter(params["init_adapter"], params, inputs)
        inputs["init_adapter"] = {"path": show_path(folder), "hash": hash_folder(folder)}
    for code in params.get("compare", []) if "adapters_dir" in params else []:
        folder = resolve_path(params["adapters_dir"]) / name_trained(params, code)
        if folder.is_dir():
            inputs[folder.name] = {"path": show_path(folder), "hash": hash_folder(folder)}
    return inputs


def name_trained(params: dict, language: str) -> str:
    """Return the name of the folder that 03 leaves in adapters_dir: lora_no, or full_no where everything was trained."""
    return f"{params.get('method', 'lora')}_{language}"


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
            f"({', '.join(STAGES)}), the folder of an adapter, or empty"
        )
    language, runs, base = params["language"], resolve_path(params["runs_dir"]), inputs["base_model"]["hash"]
    for done in sorted(runs.glob(f"{language}/{init_adapter}/*/done.json"), key=os.path.getmtime, reverse=True):
        adapter, made_with = done.parent / "adapter", read_json(done.with_name("run.json"))["inputs"]
        if (adapter / TRAINED[method]).is_file() and made_with.get("base_model", {}).get("hash") == base:
            return adapter
    raise ParameterError(
        f"init_adapter is {init_adapter!r}, and {show_path(runs)}/{language}/{init_adapter} holds no complete run with "
        f"method={method} on {params['base_model']}; run {init_adapter} for {language} first, or give a folder, or empty"
    )


def hash_run(stage: str, params: dict, inputs: dict) -> str:
    """Return the 12 hex digits that name a run's folder. Inputs count by content, so a moved project keeps its runs."""
    named = {key: value for key, value in params.items() if key not in inputs and key not in PLACES}
    cells = [cell for cell in _code_cells(_notebook_path(stage)) if not _is_parameters(cell)]
    code = hash_code("\n".join("".join(cell["source"]) for cell in cells), Path(__file__).parent)
    return hash_value([named, {key: value["hash"] for key, value in inputs.items()}, code])


def _notebook_path(stage):
    if stage not in STAGES:
        raise ParameterError(f"unknown stage {stage!r}; allowed: {', '.join(STAGES)}")
    return NOTEBOOKS / f"{stage}.ipynb"


def _code_cells(path):
    if not path.is_file():
        raise ParameterError(f"{show_path(path)}: no such notebook")
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def _is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


# Runs


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
    """Return whether another living process is writing to a run's folder."""
    record = read_json(folder / "run.json")
    if record.get("status") != "running" or record["process"][0] == os.getpid():
        return False
    try:  # a process id comes round again; with its start time it does not
        return psutil.Process(record["process"][0]).create_time() == record["process"][1]
    except psutil.Error:
        return False


def find_done(base: Path) -> Path | None:
    """Return the newest complete run of a hash (`base`, `base.2` ...), or None."""
    done = [*base.parent.glob(f"{base.name}/done.json"), *base.parent.glob(f"{base.name}.*/done.json")]
    return max(done, key=os.path.getmtime).parent if done else None


def place_run(stage: str, params: dict) -> tuple[Path, dict]:
    """Return (folder, inputs) of a stage with these effective parameters, whatever is in the folder yet."""
    inputs = find_inputs(params)
    return resolve_path(params["runs_dir"]) / params["language"] / stage / hash_run(stage, params, inputs), inputs


def check_verdict(run: Run, ignore_verdict: bool) -> str:
    """Return in words what 00_mimi_sanity said of the codec for this language, for a training stage to print.

    Its newest complete run under `runs_dir` counts. Raises ParameterError on "stop", unless `ignore_verdict` is set: what
    the codec loses, no training brings back.
    """
    runs = resolve_path(run.params["runs_dir"])
    done = max(runs.glob(f"{run.language}/{STAGES[0]}/*/done.json"), key=os.path.getmtime, default=None)
    if done is None:
        return f"no verdict on the codec: {STAGES[0]} was not run for {run.language}"
    verdict, record = read_json(done)["verdict"], read_json(done.with_name("run.json"))
    said = f"{STAGES[0]} says {verdict} of {record['params'].get('codec_model')} ({show_path(done.parent)})"
    if verdict != "stop":
        return said
    if not ignore_verdict:
        raise ParameterError(f"{said}: what the codec loses, no training brings back. Look at its report; to train all the "
                             "same, set ignore_verdict=true (make run SET='ignore_verdict=true')")
    return f"{said}; ignore_verdict is set, so the training goes on with a codec that fails its check"


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
    base, inputs = place_run(stage, params)
    folder = choose_folder(base)
    folder.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    write_json(folder / "run.json", {
        "status": "running", "stage": stage, "language": params["language"], "params": params, "seed": params["seed"],
        "inputs": inputs, **describe_commit(ROOT), "versions": describe_versions(), "host": describe_host(),
        "started": time.time(), "process": [me.pid, me.create_time()],
    })  # fmt: skip
    random.seed(params["seed"])
    np.random.seed(params["seed"])  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(params["seed"])
    pd.set_option("display.max_colwidth", None)  # a reason that is cut off is none
    return Run(stage, params["language"], folder, params, inputs)


def finish_run(run: Run, metrics: dict, verdict: str) -> None:
    """Record what a run found, how long it took and its peak memory, and mark it done; the notebook's last call.

    Writes metrics.json (`metrics` with the verdict, a few words such as "go"), completes run.json, and writes done.json
    last: a run without it does not count. Seconds are from `open_run`, memory is of the whole process.
    """
    import torch

    record = read_json(run.dir / "run.json")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    record |= {"status": "done", "seconds": round(time.time() - record["started"], 1), "peak_memory_bytes": peak}
    if torch.cuda.is_available():
        record["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    write_json(run.dir / "metrics.json", {"verdict": verdict} | metrics)
    write_json(run.dir / "run.json", record)
    write_json(run.dir / "done.json", {"verdict": verdict, "finished": time.time()})
    print(f"done in {record['seconds']:.0f} s, {peak / 2**30:.1f} GiB at most: {show_path(run.dir)}")
