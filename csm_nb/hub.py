"""A model by its name: a folder of this project, or a hub id; or an error that says what is wrong and what brings it here."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from csm_nb import paths
from csm_nb.clean import EncodingError, read_text
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path, show_path

# What from_pretrained (transformers 5.17) looks for, in this order, where config.json names no transformers_weights.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = (".json", ".jinja", ".model", ".txt", ".md")  # what is read or looked at beside them, all of it small
POINTER = b"version https://git-lfs"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
# What a model has to hold besides config and weights, by the parameter that names it.
PARTS = {"base_model": {"a tokenizer": TOKENIZER, "a processor": PROCESSOR},
         "asr_model": {"a tokenizer": TOKENIZER, "a processor": PROCESSOR},
         "align_model": {"a tokenizer": TOKENIZER, "a processor": PROCESSOR}, "lid_model": {"a processor": PROCESSOR}}
# What a model is by its config.json, by the parameter that names it: field, what it must match there, and that in words.
KINDS = {"base_model": ("model_type", r"csm", "a CSM model"), "codec_model": ("model_type", r"csm|mimi", "Mimi, or a CSM model"),
         "lid_model": ("architectures", r".*Classification", "a language ID (audio classification)"),
         "asr_model": ("architectures", r"(?!Csm|Mimi).*(?<!Classification)", "a speech recogniser"),
         "align_model": ("architectures", r".*CTC.*", "a CTC recogniser: others, such as Whisper, give no times")}
HUB_ERRORS = (HfHubHTTPError, httpx.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError)


class ModelError(ValueError):
    """A model that is not there or not whole; the message says what was looked for and how to get it."""


def fetch_model(name, use: str = "") -> Path:
    """Return the folder of a model, whole: a hub id's below models/ by its last name, a path itself, or the hub's copy.

    `use` is the parameter that it is for: what that needs besides config.json and weights must be in it (PARTS). The hub is
    asked only for a model that is neither in the project nor in the hub's own cache. Raises ModelError, with the file, what
    is wrong and the command that brings it, where a model is not whole, and where there is neither a folder nor a hub.
    """
    place = find_model(name)
    if place is not None and place.is_dir():
        return check_folder(place, name, use)
    if place is not None and not place.exists():
        raise ModelError(f"{name}: {show_path(place.parent)}/{find_fault(place)}")
    if not is_hub_id(name):
        there = ", ".join(sorted(p.name for p in (paths.ROOT / "models").glob("*/"))) or "none"
        found = "a file, where a folder is wanted" if place else "no such folder"
        raise ModelError(f"{name}: {found} ({paths.ROOT / str(name)}); under models/ there are: {there}")
    return find_cached(name, use) or check_folder(download_model(name), name, use)


def find_cached(name, use: str = "") -> Path | None:
    """Return the folder of a hub id in the hub's own cache, if it is whole for `use`, without asking the hub; else None."""
    try:
        folder = Path(snapshot_download(str(name), local_files_only=True))
    except HUB_ERRORS:
        return None
    return None if find_faults(folder, use) else folder


def download_model(name, folder: Path | None = None) -> Path:
    """Bring a hub id's files to `folder` (None: the hub's cache), those that from_pretrained reads, and return where they are.

    Its file list comes first: a repository may hold its weights several times (sesame/csm-1b: its original ones beside
    those that transformers reads, 6 GB more). A download that was cut off goes on. Raises ModelError where there is no hub.
    """
    try:
        files, _ = list_remote(name, folder)  # of no commit by its hash: the cache is later looked up by the branch
        return Path(snapshot_download(str(name), allow_patterns=files, local_dir=folder, etag_timeout=5))
    except HUB_ERRORS as error:
        raise ModelError(
            f"{name} is a hub id, and the hub gave no copy of it ({type(error).__name__}). Where there is a network run\n"
            f"    {tell_download(name)}\n"
            f"(accept the model's terms on its page first if it has any) and copy the folder to {place_model(name)} here, where "
            "it is looked for; or name another folder in the profile in params/"
        ) from error


def list_remote(name, folder: Path | None = None) -> tuple[list[str], object]:
    """Return (files that from_pretrained needs, the hub's description with the sizes of all) of a hub id.

    config.json, and the index of its weights where there is one, are fetched for that (to `folder`, or the cache).
    """
    info = HfApi().model_info(str(name), files_metadata=True, timeout=10)
    names = [file.rfilename for file in info.siblings if "/" not in file.rfilename]

    def read(file):
        return json.loads(Path(hf_hub_download(str(name), file, local_dir=folder, etag_timeout=5)).read_bytes())

    if importlib.util.find_spec("pyctcdecode"):  # a recogniser's n-grams, without which the pipeline does as well
        names += [file.rfilename for file in info.siblings if file.rfilename.startswith("language_model/")]
    kept = [file for file in names if Path(file).suffix in SETTINGS or file.startswith(("LICENSE", "language_model/"))]
    weights = list_weights(names, read) if "config.json" in names else [f for f in names if f.endswith(".safetensors")]
    kept = [file for file in kept if not file.endswith(".index.json") or file in weights]
    return sorted({*kept, *weights}), info


def list_weights(names, read) -> list[str]:
    """Return which of a model's files from_pretrained takes its weights from, an index first; `read(file)` returns its JSON.

    The file or index that config.json names (transformers_weights), or the usual ones; where there are none of them, every
    .safetensors and .bin file.
    """
    config = read("config.json")
    first = (config.get("transformers_weights") if isinstance(config, dict) else None) or next(
        (file for file in WEIGHTS if file in names), None)
    if first is None:
        return sorted(file for file in names if file.endswith((".safetensors", ".bin")))
    if not first.endswith(".index.json") or first not in names:
        return [first]
    return [first, *sorted(set(read(first)["weight_map"].values()))]


def find_weights(folder: Path) -> list[Path]:
    """Return the weight files of a folder that from_pretrained reads, without an index; see list_weights."""
    names = [path.name for path in folder.iterdir()]
    return [folder / file for file in list_weights(names, lambda file: json.loads((folder / file).read_bytes()))
            if not file.endswith(".json")]


def place_model(name) -> str:
    """Return the folder below the project's root where a hub id is looked for."""
    return f"models/{str(name).split('/')[-1]}"


def tell_download(name, folder: str | None = None) -> str:
    """Return the command that brings a hub id to a folder, by default the one where it is looked for."""
    return f"hf download {name} --local-dir {folder or place_model(name)} --exclude '*.pt'"


def check_models(settings) -> None:
    """Check each model that is here and that some of `settings` (dicts of a stage's parameters) name; a few milliseconds each.

    Raises ModelError for the first that is not whole. Of moshi's models, which are laid out otherwise, every file is looked at.
    """
    for key, name, moshi in _list_named(settings):
        place = find_model(name)
        if place is not None and place.is_dir() and not moshi:
            _check_kind(place, name, key)
            check_folder(place, name, key)
        elif place is not None:
            files = [place] if not place.is_dir() else [*place.glob("*.safetensors"), *place.glob("*.json")]
            if faults := [fault for path in files if (fault := find_fault(path))]:
                raise ModelError(f"{name}: {'; '.join(faults[:3])}. {_tell_remedy(place, name, faults[0])}")


def _check_kind(folder, name, use):
    """Raise ModelError for a model of another kind, as its config.json says; one that says nothing passes."""
    field, pattern, wanted = KINDS[use]
    try:
        said = json.loads((folder / "config.json").read_bytes())[field]
    except (OSError, ValueError, LookupError, TypeError):  # check_folder says what of it there is to say
        return
    kinds = said if isinstance(said, list) else [said]
    if said and not any(re.fullmatch(pattern, str(kind)) for kind in kinds):
        raise ModelError(f"{name}: {show_path(folder)}/config.json says {field} {', '.join(map(str, kinds))}; allowed for "
                         f"{use} is {wanted}")


def list_missing(settings) -> list[str]:
    """Return the hub ids that some of `settings` name and that are neither below models/ nor, whole, in the hub's cache."""
    return list(dict.fromkeys(name for key, name, moshi in _list_named(settings) if not moshi
                              and is_hub_id(name) and find_model(name) is None and find_cached(name, key) is None))


def _list_named(settings):
    """Return (parameter, model, whether moshi reads it), each once."""
    return dict.fromkeys((key, name, key == "codec_model" and "moshi" in params.values())
                         for params in settings for key, names in list_models(params).items() for name in names)


def check_folder(folder: Path, name, use: str = "") -> Path:
    """Return `folder` if it is a whole model; ModelError, with each fault and the command that mends it, if it is not."""
    faults = find_faults(folder, use)
    if faults:
        said = "; ".join(faults[:3])
        raise ModelError(f"{name}: {folder} is not whole: {said}. {_tell_remedy(folder, name, said)}")
    return folder


def _tell_remedy(folder, name, said):
    shown = show_path(folder)
    if folder == paths.ROOT / "models" / folder.name and folder.name in SHIPPED:
        return f"It is shipped with the workbook: git checkout -- {shown}, or make it anew: python -m csm_nb.mini all"
    pull = f"git -C {shown} lfs pull, or " if "git-lfs" in said and (folder / ".git").exists() else ""
    owner = name if is_hub_id(name) else f"OWNER/{folder.name}"
    cached = is_hub_id(name) and find_model(name) is None
    return f"Copy it again from where it came from, or: {pull}{tell_download(owner, None if cached else shown)}"


def find_faults(folder: Path, use: str = "") -> list[str]:
    """Return what keeps a folder from being a whole model, [] if nothing does: by names, sizes and headers alone.

    A file that is missing, empty, a dangling link, a git-lfs pointer, no JSON, or cut off (safetensors say in their header how
    long they are); weights that the index names and that are not there; what `use` needs (PARTS). Weights that from_pretrained
    does not read may be as they like.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    small = [file for file in names if Path(file).suffix in (".json", ".jinja", ".model") or file in TOKENIZER]
    faults = [fault for file in small if (fault := find_fault(folder / file))]
    weights, lacking = [], [] if "config.json" in names else ["config.json"]
    if not faults and not lacking:
        try:
            weights = list_weights(names, lambda file: json.loads((folder / file).read_bytes()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            faults.append(f"its index of weights can not be used ({type(error).__name__}: {error})")
        faults += [fault for file in weights if (fault := find_fault(folder / file))]
    if not weights and not any(file.endswith((".safetensors", ".bin")) for file in names):
        lacking.append("weights (*.safetensors)")
    lacking += [part for part, files in PARTS.get(use, {}).items() if not set(files) & set(names)]
    return [f"it lacks {' and '.join(lacking)}"] * bool(lacking) + faults


def find_fault(path: Path) -> str:
    """Return what is wrong with one file, "" if nothing is: a few bytes of it are read, all of a JSON file."""
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to {path.readlink()}, which is not there"
    if not path.is_file():
        return f"{path.name} is not there"
    size = path.stat().st_size
    if size == 0:
        return f"{path.name} is empty"
    with open(path, "rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        return f"{path.name} is a git-lfs pointer of {size} bytes, not the file itself"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "np"):  # compares the sizes in its header with the file's
                pass
        elif start.startswith(b"PK") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off at {size} bytes"
    except ValueError as error:
        return f"{path.name} is no JSON ({error})"
    except (SafetensorError, OSError) as error:
        return f"{path.name} is cut off or no safetensors file ({size} bytes: {error})"
    return ""


def describe_model(name) -> str:
    """Return the name of a model and the first paragraph of its card, for the first lines of a report.

    What a reader has to know of a model before any figure (a miniature, synthetic speech, not for commercial use)
    stands in its card. A model without a card is named as such.
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", read_card(name), flags=re.S)
    prose = [part for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith(("#", "<", "!", "|"))]
    return f"{name}: {' '.join(prose[0].replace('**', '').split()) if prose else 'has no model card'}"


def read_card(name) -> str:
    """Return a model's card (README.md), "" where it has none; without fetching the model, which may be more than is used."""
    place = find_model(name)
    if place is None:
        try:
            card = Path(hf_hub_download(str(name), "README.md", etag_timeout=5))
        except HUB_ERRORS:
            card = fetch_model(name) / "README.md"  # which says what is wrong
    else:
        card = (place.parent if place.is_file() else place) / "README.md"
    if not card.is_file():
        return ""
    try:
        return read_text(card)
    except EncodingError:  # only shown
        return card.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def count_free_disk() -> int:
    """Return the bytes that are left where models go."""
    place = paths.ROOT / "models"
    return shutil.disk_usage(place if place.is_dir() else paths.ROOT).free


MODELS = ("codec_model", "base_model", "lid_model", "asr_model", "align_model")  # a folder, or the id of a model on the hub
SHIPPED = ("csm-mini", "lid-mini", "asr-mini")  # under models/, on no hub


def find_model(name) -> Path | None:
    """Return where a model is in this project, or None: a path itself, or a hub id's folder under models/ by its last name."""
    if resolve_path(name).exists():
        return resolve_path(name)
    place = paths.ROOT / "models" / str(name).split("/")[-1]
    return place if is_hub_id(name) and place.name not in SHIPPED and os.path.lexists(place) else None


def is_hub_id(name) -> bool:
    """Return whether a model's name has the form of a hub id, owner/name, and is no path: data/mine is one, there or not."""
    owner, *rest = str(name).split("/")
    named = len(rest) == 1 and bool(rest[0]) and owner != "" and not owner.startswith((".", "~"))
    return named and not (paths.ROOT / owner).is_dir()


def list_models(params: dict) -> dict[str, list[str]]:
    """Return {parameter: the models that it stands for}; by-language, in asr_model, is one for each language that is heard.

    That is the language of a stage and those that its adapter is taught beside it (`also`), and English, the base's own, and
    all of `compare` where they are compared.
    """
    models = {key: [params[key]] for key in MODELS if params.get(key)}
    if models.get("asr_model") == ["by-language"]:
        taught = (params["language"], *params.get("also", []))
        heard = ("en", *params["compare"], *taught) if "compare" in params else taught
        models["asr_model"] = list(dict.fromkeys(get_language(code).asr for code in heard))
    return models
