"""Parameters of a stage: found, read from its notebook's own cell, and checked before anything starts."""

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from csm_nb import paths
from csm_nb.clean import EncodingError, read_text
from csm_nb.hub import MODELS, find_model, is_hub_id
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.paths import STAGES, TRAINING, resolve_path, show_path
from csm_nb.recipe import ParameterError, suggest
from csm_nb.text.sentences import count_sentences

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}
RECORDINGS = ("audio", "corpus")  # a manifest, or a folder of audio
FILES = ("lexicon", "marks")
PLACES = ("runs_dir", "device", "price_per_hour", "log_seconds", "save_minutes")  # where a run happens, not what it computes
CHOICES = {
    "method": ("lora", "full"), "schedule": ("cosine", "linear"), "dtype": ("auto", "bfloat16", "float32"),
    "backend": ("transformers", "unsloth"), "codec_backend": ("transformers", "moshi"),
    "f0_method": ("praat", "pyin", "torchcrepe"), "choice": ("best", "last"),
}  # fmt: skip
# What a number may be: brackets belong to it, parentheses do not. Numbers that stand in no row are 0 or more.
RANGES = {
    "[1, inf)": "clips anchor_clips anchor_steps synthetic_clips synthetic_steps adapter_steps phoneme_clips phoneme_steps "
                " sentences rank alpha batch_size gradient_accumulation keep_checkpoints codebooks",
    "[2, inf)": "corpus_clips",  # one of them is held out
    "[64, inf)": "max_tokens",  # two or three seconds of speech with their text
    "(0, 1]": "lr adapter_lr depth_ratio",
    "[0, 1)": "dropout",
    "[0, 2147483648)": "seed",  # NumPy takes twice that; stages add to it
    "[0, inf)": "patience log_every log_seconds eval_every save_every save_minutes sample_every text_weight price_per_hour "
                "codebook_weights",
}  # fmt: skip
DEVICES = r"auto|cpu|mps|cuda(:\d+)?"
# Packages that one may have or not, by stage: with them, more is measured
OPTIONAL = {STAGES[0]: ("pystoi", "pesq", "torchcrepe")}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its annotation (`str`, `int`, `float`, `bool` or `list`) and its default."""

    type: str
    default: object


def find_params(language: str, profile: str) -> list[Path]:
    """Return the files of params/ that a language and a profile (a name, or a YAML file) are.

    Raises ParameterError for either that is not there, with the nearest name and all that are.
    """
    files = {path.stem: path for path in sorted((paths.ROOT / "params").glob("*.yaml"))}
    taught = {code: entry for code, entry in LANGUAGES.items() if code in files}
    if language not in taught:
        named = {str(name).lower(): code for code, entry in taught.items()
                 for name in (entry.iso3, entry.espeak, entry.whisper, entry.name, code)}
        near = named.get(language.lower()) or named.get("".join(difflib.get_close_matches(language.lower(), named, 1, 0.7)))
        hint = f"; did you mean {near}?" if near else "."
        known = ", ".join(f"{code} ({entry.name}: params/{code}.yaml)" for code, entry in taught.items())
        raise ParameterError(f"no language {language!r} is taught here{hint} The languages are {known}; several are written with "
                             "spaces between them")
    if profile.endswith((".yaml", ".yml")):
        return [files[language], resolve_path(profile)]
    profiles = [name for name in files if name not in LANGUAGES]
    if profile not in profiles:
        raise ParameterError(f"no profile {profile!r}{suggest(profile, profiles)} There are {', '.join(profiles)} "
                             "(params/<profile>.yaml), or give the path of a YAML file")
    return [files[language], files[profile]]


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
            content = yaml.load(read_text(path), _StrictLoader) or {}
        except EncodingError as error:
            raise ParameterError(str(error)) from error
        except (yaml.YAMLError, ValueError, OSError) as error:
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
                f"{origins[key]}: unknown parameter {key!r} (value {values[key]!r}){suggest(key, sorted(known))} "
                f"The notebooks' parameters are: {', '.join(sorted(known))}"
            )
    return values, origins


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand once: of two, plain YAML takes the last without a word."""

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value:
            first = lines.setdefault(key.value if isinstance(key, yaml.ScalarNode) else id(key), key.start_mark.line + 1)
            if first != key.start_mark.line + 1:
                raise ValueError(f"{key.value} is given twice, in lines {first} and {key.start_mark.line + 1}; leave one")
        return super().construct_mapping(node, deep)


def check_params(stage: str, values: dict, origins: dict | None = None) -> dict:
    """Return the effective parameters of a stage: its cell's defaults, `values` over them, other stages' keys left out.

    An int is turned into a float where a float belongs. Raises ParameterError for a value that no run could have (its type,
    RANGES, CHOICES, an unknown language, a folder or file that is not there), naming origin, key, value and what is allowed.
    """
    effective = {}
    for key, parameter in read_cell(stage).items():
        origin = (origins or {}).get(key, show_path(_notebook_path(stage)))
        effective[key] = value = _check_type(key, values.get(key, parameter.default), parameter, origin)
        found = f"{origin}: {key} is {value!r}"
        try:
            for code in {"language": [value], "compare": value}.get(key, []):
                get_language(code)
        except ValueError as error:
            raise ParameterError(f"{found}: {error}") from error
        if key in CHOICES and value not in CHOICES[key]:
            raise ParameterError(f"{found}; allowed: {', '.join(CHOICES[key])}")
        if key == "device" and not re.fullmatch(DEVICES, value):
            raise ParameterError(f"{found}; allowed: auto, cpu, cuda, cuda:<number>, mps")
        _check_numbers(key, value, found)
        if key == "codebooks" and len(set(value)) < len(value):
            raise ParameterError(f"{found}; allowed is each number once")
        if key in MODELS and not _names_model(key, value, parameter):
            more = ", by-language" * (key == "asr_model") + ", empty" * (not parameter.default)
            there = ", ".join(sorted(path.name for path in (paths.ROOT / "models").glob("*/"))) or "none"
            missing = ", and there is no such folder" * bool(value)
            raise ParameterError(f"{found}{missing}; allowed: models/<folder>, owner/name of the hub{more}; under models/ there "
                                 f"are: {there}")
        if key == "init_adapter" and value in STAGES and value not in TRAINING[: STAGES.index(stage) - 1]:
            raise ParameterError(f"{found}; allowed: a stage that trains before {stage} "
                                 f"({', '.join(TRAINING[: STAGES.index(stage) - 1])}), the folder of an adapter, or empty")
        if key in ("runs_dir", "adapters_dir") and not value.strip():
            raise ParameterError(f"{found}; allowed is a folder, such as {parameter.default!r}")
        if key in (*RECORDINGS, *FILES) and value and not resolve_path(value).exists():
            allowed = "a manifest.jsonl, a folder of audio" if key in RECORDINGS else "a file" + " or a folder" * (key == "marks")
            raise ParameterError(f"{found}, no {resolve_path(value)} exists; allowed: {allowed}, or empty (relative paths start "
                                 "at the project's root)")
    return effective


def _names_model(key, value, parameter):
    """Whether a model is here, or may be on the hub: which of those that are here are whole, hub.check_models asks."""
    if value == "":
        return parameter.default == ""
    return is_hub_id(value) or find_model(value) is not None or key == "asr_model" and value == "by-language"


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
        if parameter.type == "str" and not isinstance(value, list | dict):
            hint = '; YAML reads a bare no as false and digits as a number: write them in quotes, such as "no"'
        refuse(f"{parameter.type}, such as {parameter.default!r}{hint}")
    if parameter.type == "list":
        kinds = {type(item) for item in parameter.default[:1]} or {int, float}
        if parameter.default and not value or any(type(item) not in kinds for item in value):
            hint = '; "no" in quotes, YAML reads a bare no as false' if False in value else ""
            refuse(f"a list of {' or '.join(sorted(kind.__name__ for kind in kinds))}, such as {parameter.default!r}{hint}")
    return value


def _check_numbers(key, value, found):
    """Raise ParameterError for a number, or a number in a list, that is out of its row of RANGES."""
    allowed = next((interval for interval, keys in RANGES.items() if key in keys.split()), "[0, inf)")
    low, high = (float(edge) for edge in allowed[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        if type(number) in (int, float):
            above = number >= low if allowed[0] == "[" else number > low
            below = number <= high if allowed[-1] == "]" else number < high
            if not (above and below and math.isfinite(number)):
                words = f"{'from' if allowed[0] == '[' else 'above'} {low:.10g}"
                words += f" {'to' if allowed[-1] == ']' else 'to below'} {high:.10g}" if math.isfinite(high) else " on"
                raise ParameterError(f"{found}; allowed is {words}")


def check_inputs(stage: str, params: dict, origins: dict | None = None) -> None:
    """Raise ParameterError where what effective parameters name can not be used here: a device that is not there, more
    codebooks than the codec has, more sentences than there are, a package that is missing: what would end a run half way."""

    def refuse(key, message):
        origin = (origins or {}).get(key, show_path(_notebook_path(stage)))
        raise ParameterError(f"{origin}: {key} is {params[key]!r}: {message}")

    wanted = {"four_bit": params.get("four_bit") is True and "bitsandbytes",
              "backend": params.get("backend") == "unsloth" and "unsloth"}
    cuda = _count_devices(params["device"], any(wanted.values()), refuse)
    if params.get("f0_method") == "torchcrepe" and importlib.util.find_spec("torchcrepe") is None:
        refuse("f0_method", "it needs a package: uv pip install torchcrepe")
    for key, package in wanted.items():
        if package and not cuda:
            refuse(key, "it needs an NVIDIA GPU (CUDA), and there is none, or device is cpu")
        if package and importlib.util.find_spec(package) is None:
            refuse(key, f"it needs the package {package}, which is not installed: make setup EXTRAS=gpu")
    for key, model, field in (("codebooks", "codec_model", "num_quantizers"),
                              ("codebook_weights", "base_model", "num_codebooks")):
        given, count = params.get(key), _count_codebooks(params.get(model), field)
        if key == "codebooks" and given and count and max(given) > count:
            refuse(key, f"{params[model]} has {count} codebooks; allowed are numbers from 1 to {count}")
        if key == "codebook_weights" and given and (len(given) != (count or len(given)) or not any(given)):
            refuse(key, f"{params[model]} has {count} codebooks; allowed are as many weights, not all 0, or none at all: []")
    _check_sentences(params, refuse)
    for key in ("runs_dir", "adapters_dir"):
        place = resolve_path(params.get(key, "."))
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()  # root may write anywhere by its rights, and can not below /proc
        except OSError as error:
            fault = f"not to be written to ({error.strerror})" if there.is_dir() else "no folder"
            refuse(key, f"{there} is {fault}; allowed is a folder, or one that can be made")


def _count_devices(device, needed, refuse):
    """How many CUDA devices a run with this `device` sees, if it is `needed`; refuses a device that is not there."""
    if device == "cpu" or device == "auto" and not needed:  # importing torch takes seconds
        return 0
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        refuse("device", f"there {'is no CUDA device' if not count else f'are {count}, from cuda:0 on'}; allowed are auto and cpu"
                         + ", cuda" * bool(count))
    if device == "mps" and not torch.backends.mps.is_available():
        refuse("device", "there is no such device; allowed are auto and cpu" + ", cuda" * bool(count))
    return count


def _count_codebooks(model, field):
    """The codebooks of a Mimi or CSM folder by its config; None where that does not say, or the model is not here yet."""
    path = (find_model(model) if model else None) or Path("")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = config.get("codec_config") or config if field == "num_quantizers" else config
        return config.get(field) if type(config.get(field)) is int else None
    except (OSError, ValueError, AttributeError):
        return None


def _check_sentences(params, refuse):
    """Held-out sentences are not made up: there are as many as the templates of the language hold, and of English in 04."""
    key = "sentences" if "sentences" in params else "clips" if params.get("audio") == "" else None
    for code in (params["language"], *["en"] * ("compare" in params)) if key else ():
        there = count_sentences(code, "test")
        if params[key] > there:
            refuse(key, f"the templates of {get_language(code).name} hold {there} held-out sentences; allowed is 1 to {there}")


def _list_optional(stage, params):
    """Names and versions of the optional packages that are here and that this run would use."""
    found = []
    for name in OPTIONAL.get(stage, ()):
        if importlib.util.find_spec(name) and (name != "torchcrepe" or params.get("f0_method") == name):
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                found.append(name)
    return found


def _notebook_path(stage):
    if stage not in STAGES:
        raise ParameterError(f"no stage {stage!r}{suggest(stage, STAGES)} The stages are {', '.join(STAGES)}")
    return paths.NOTEBOOKS / f"{stage}.ipynb"


def _code_cells(path):
    if not path.is_file():
        raise ParameterError(f"{show_path(path)}: no such notebook")
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def _is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])
