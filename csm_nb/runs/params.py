"""Parameters of a stage: found, read from its notebook's own cell, and checked before anything starts."""

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from csm_nb import paths
from csm_nb.clean import EncodingError, read_text
from csm_nb.corpora.listed import check_listed, is_source, list_corpora, take_corpus
from csm_nb.hub import MODELS, find_model, is_hub_id
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.paths import STAGES, TRAINING, resolve_path, show_path
from csm_nb.recipe import FIELDS, ParameterError, Recipe, check_value, merge_recipes, pick_fields, suggest
from csm_nb.text.sentences import count_sentences

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
RECORDINGS = ("audio", "corpus")  # a manifest, or a folder of audio
FILES = ("lexicon", "marks")
# Where a run happens, not what it computes
PLACES = ("runs_dir", "device", "price_per_hour", "log_seconds", "save_minutes", "workers")
CHOICES = {"method": ("lora", "full"), "tag": ("none", "text", "token"), "codec_backend": ("transformers", "moshi"),
           "also": tuple(LANGUAGES), "f0_method": ("praat", "pyin", "torchcrepe")}
# What a number may be (recipe.check_value); those that stand in no row are 0 or more. A recipe's fields say it themselves.
RANGES = {
    "[1, inf)": "clips anchor_clips synthetic_clips phoneme_clips sentences codebooks",
    "[2, inf)": "corpus_clips",  # one of them is held out
    "[-40, 0]": "loudness",
    "[0, 1]": "pseudo_labels max_cer",
    "[0, 5]": "min_dnsmos margin",
    "[0, 2147483648)": "seed",  # NumPy takes twice that; stages add to it
}
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
    """Return (values, origins) of YAML files, later ones over earlier ones, and of `overrides` over all.

    Files are flat but for their section `recipe` (recipe.pick_fields), of which an override may name a field alone (`rank`),
    and a language's own for its list of `corpora` (corpora.listed), which is checked and left out.
    `origins` says for each key, and each field of the recipe, which file (or "command line") its value is from. Raises
    ParameterError for a file that is missing or no such YAML, and for a key that no notebook has.
    """
    values, origins, known = {}, {}, _list_known()
    overrides = dict(overrides or {})
    layers = [_read_yaml(file) for file in files]
    alone = {key: overrides.pop(key) for key in list(overrides) if key in FIELDS and key not in known}
    given = overrides.get("recipe", {})
    if alone and isinstance(given, dict):  # what else it may be is refused below
        for key in alone.keys() & given.keys():
            raise ParameterError(f"command line: {key} is given twice, as {alone[key]!r} and in recipe as {given[key]!r}; "
                                 "leave one")
        overrides["recipe"] = given | alone
    layers.append(("command line", overrides))
    for place, content in layers:
        if "language" in content:  # a language's own file, which lists its corpora (corpora.listed)
            check_listed(place, content.pop("corpora", {}))
        for key in content:
            if key in FIELDS and key not in known:
                raise ParameterError(f"{place}: {key} is a field of the recipe; write it under `recipe:`")
            if key not in known:
                raise ParameterError(f"{place}: unknown parameter {key!r} (value {content[key]!r})"
                                     f"{suggest(key, sorted({*known, *FIELDS}))} The notebooks' parameters are: "
                                     f"{', '.join(sorted(known))}; and those of a recipe: {', '.join(FIELDS)}")
        recipe = content.get("recipe", {})
        if not isinstance(recipe, dict):
            raise ParameterError(f"{place}: recipe is {recipe!r}; allowed are fields such as {{rank: 32}}")
        for stage in STAGES:
            origins |= {(stage, field): place for field in pick_fields(recipe, stage, place)}
        values |= content | ({"recipe": merge_recipes(values.get("recipe", {}), recipe)} if recipe else {})
        origins |= dict.fromkeys(content, place)
    left = {(stage, field) for stage in STAGES for field in pick_fields(values.get("recipe", {}), stage)}
    origins = {key: place for key, place in origins.items() if isinstance(key, str) or key in left}  # of two lengths, one
    return values, origins


def _list_known():
    return {name for stage in STAGES if _notebook_path(stage).is_file() for name in read_cell(stage)}


def _read_yaml(file):
    """Return the place of a parameters file as messages name it, and its content."""
    path = resolve_path(file)
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
        raise ParameterError(f"{show_path(path)}: no such file; in that folder there are: {others}")
    try:
        content = yaml.load(read_text(path), StrictLoader) or {}
    except EncodingError as error:
        raise ParameterError(str(error)) from error
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ParameterError(f"{show_path(path)}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{show_path(path)}: found {content!r:.80}; allowed are lines of `key: value`")
    return show_path(path), content


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand once: of two, plain YAML takes the last without a word."""

    def construct_mapping(self, node, deep=False):
        """Return a mapping as plain YAML does. Raises ValueError for a key that stands twice, with the lines."""
        lines = {}
        for key, _ in node.value:
            name, line = key.value if isinstance(key, yaml.ScalarNode) else id(key), key.start_mark.line + 1
            if name in lines:
                where = f"in lines {lines[name]} and {line}" if lines[name] != line else f"in line {line}"
                raise ValueError(f"{name} is given twice, {where}; leave one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def check_params(stage: str, values: dict, origins: dict | None = None) -> dict:
    """Return the effective parameters of a stage: its cell's defaults, `values` over them, other stages' keys left out.

    An int is turned into a float where a float belongs; `recipe` holds every field, as this stage trains. Raises
    ParameterError for a value that no run could have (its type, RANGES, CHOICES, an unknown language, a folder or file that is
    not there), naming origin, key, value and what is allowed.
    """
    effective = {}
    for key, parameter in read_cell(stage).items():
        origin = (origins or {}).get(key, show_path(_notebook_path(stage)))
        allowed = CHOICES.get(key) or next((interval for interval, keys in RANGES.items() if key in keys.split()), "[0, inf)")
        effective[key] = value = check_value(f"{origin}: {key}", values.get(key, parameter.default), parameter.default, allowed)
        found = f"{origin}: {key} is {value!r}"
        try:
            for code in {"language": [value], "compare": value}.get(key, []):
                get_language(code)
            if key == "also" and len({effective["language"], *value}) <= len(value):
                raise ValueError("allowed are languages beside the one that is taught, each once")
        except ValueError as error:
            raise ParameterError(f"{found}: {error}") from error
        if key == "engine" and value:
            from csm_nb.synth import engines  # it imports what reads audio, which takes seconds

            try:
                engines.read_engine(value)
            except engines.EngineError as error:
                raise ParameterError(f"{origin}: {error}") from error
        if key == "recipe":
            effective[key] = _check_recipe(stage, value, origins or {}, origin)
        if key == "device" and not re.fullmatch(DEVICES, value):
            raise ParameterError(f"{found}; allowed: auto, cpu, cuda, cuda:<number>, mps")
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
        if key in RECORDINGS and value:
            effective[key] = value = take_corpus(found, value, effective["language"], key == "corpus")
        if key in (*RECORDINGS, *FILES) and value and not (key == "corpus" and is_source(effective["language"], value)) and (
                not resolve_path(value).exists()):
            allowed = "a file" + " or a folder" * (key == "marks")
            if key in RECORDINGS:
                names = ", ".join(list_corpora(effective["language"])) or "none"
                allowed = f"a manifest.jsonl, a folder of audio or of a published corpus, the name of a listed one ({names})"
                allowed += ", owner/name of the hub" * (key == "corpus")
            raise ParameterError(f"{found}, no {resolve_path(value)} exists; allowed: {allowed}, or empty (relative paths start "
                                 "at the project's root)")
    return effective


def _names_model(key, value, parameter):
    """Whether a model is here, or may be on the hub: which of those that are here are whole, hub.check_models asks."""
    if value == "":
        return parameter.default == ""
    return is_hub_id(value) or find_model(value) is not None or key == "asr_model" and value == "by-language"


def _check_recipe(stage, section, origins, where):
    """All fields of the recipe of a stage, those of its section over the defaults; seed is a parameter of its own."""
    given = pick_fields(section, stage, where)
    for name, value in given.items():
        place = f"{stage}: {name}" if name in section.get(stage, {}) else name  # as it is written in a file
        one = FIELDS[name]
        check_value(f"{origins.get((stage, name), where)}: {place}", value, one.default, one.metadata["allowed"])
    recipe = asdict(Recipe(**given))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items() if name in FIELDS}


def check_inputs(stage: str, params: dict, origins: dict | None = None) -> None:
    """Raise ParameterError where what effective parameters name can not be used here, and would end a run half way.

    That is a device that is not there, more codebooks than the codec has, more sentences than there are, a package that is
    missing.
    """
    params = params | params.get("recipe", {})

    def refuse(key, message):
        origin = (origins or {}).get((stage, key)) or (origins or {}).get(key, show_path(_notebook_path(stage)))
        raise ParameterError(f"{origin}: {key} is {params[key]!r}: {message}")

    wanted = {"four_bit": params.get("four_bit") is True and "bitsandbytes",
              "backend": params.get("backend") == "unsloth" and "unsloth"}
    cuda = _count_devices(params["device"], any(wanted.values()), refuse)
    if params.get("f0_method") == "torchcrepe" and importlib.util.find_spec("torchcrepe") is None:
        refuse("f0_method", "it needs a package: uv pip install torchcrepe")
    if params.get("min_dnsmos") and not all(map(importlib.util.find_spec, ("speechmos", "onnxruntime"))):
        refuse("min_dnsmos", "it needs the packages speechmos and onnxruntime: make setup EXTRAS=filters")
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
    if params.get("engine"):
        from csm_nb.synth import engines

        try:
            engine, voices, _ = engines.read_engine(params["engine"])
            engines.check_engine(engine, params["language"], voices)
        except engines.EngineError as error:
            refuse("engine", str(error))
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
    """Return the codebooks of a Mimi or CSM folder by its config; None where it does not say, or is not here yet."""
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
