"""The corpora that params/<language>.yaml lists: taken by name, and held to what their licences allow."""

import math
import operator
import os
import re
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, HfApi

from csm_nb import paths
from csm_nb.clean import read_text
from csm_nb.hub import HUB_ERRORS, is_hub_id
from csm_nb.languages import LANGUAGES
from csm_nb.paths import resolve_path
from csm_nb.provenance import hash_value, read_json
from csm_nb.recipe import ParameterError, suggest

PLACE = "data/corpora"  # where a corpus that is taken by name lies, as <name>/
USES = ("train", "evaluate", "anchor")
FORBIDS = ("synthesis",)
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_EQUAL = {"": operator.eq, "!=": operator.ne}
# Fields of an entry: the kinds of value, and what is said of another
FIELDS = {
    "id": (str, "owner/name of the hub"),
    "home": (str, "where it is published, if not on the hub"),
    "config": (str, "the name of a configuration"),
    "split": (str, "the names of the splits"),
    "revision": (str, "the revision of the hub that holds it as Parquet, where its main one is a script"),
    "columns": (dict, "{text: ..., speaker: ..., audio: ...} of Parquet; speaker: null for one voice, or where none is said"),
    "filters": (dict, "{column: condition}, such as {bleu_score: '> 0.6', region: '!= foreign', type: IS}"),
    "licence": (str, "its name, or not stated"),
    "hours": ((int, float, str), "a number, or words"),
    "speakers": ((int, str), "a number, or words"),
    "size": (str, "words, such as 5.6 GB"),
    "use": (list, f"a list of {', '.join(USES)}"),
    "forbids": (str, ", ".join(FORBIDS)),
    "noncommercial": (bool, "true or false"),
    "note": (str, "words"),
}  # fmt: skip


def check_listed(place: str, section) -> dict:
    """Return the section `corpora` of a parameters file; raise ParameterError, which names `place`, for what it may not hold."""
    if not isinstance(section, dict):
        raise ParameterError(f"{place}: corpora is {section!r:.60}; allowed are entries such as {{nst: {{id: ...}}}}")
    for name, entry in section.items():
        where = f"{place}: corpora: {name}"
        if not isinstance(entry, dict):
            raise ParameterError(f"{where} is {entry!r:.60}; allowed are the fields {', '.join(FIELDS)}")
        for field, value in entry.items():
            if field not in FIELDS:
                raise ParameterError(f"{where}: unknown field {field!r}{suggest(field, FIELDS)} The fields are "
                                     f"{', '.join(FIELDS)}")
            kind, allowed = FIELDS[field]
            wrong = not isinstance(value, kind) or isinstance(value, bool) and kind is not bool
            among = {"use": USES, "forbids": FORBIDS}.get(field)
            if wrong or among and any(one not in among for one in (value if kind is list else [value])):
                raise ParameterError(f"{where}: {field} is {value!r:.60}; allowed: {allowed}")
        for column, condition in entry.get("filters", {}).items():
            sign, value = _read_condition(condition)
            if type(condition) not in (str, int, float) or not value or sign in _ORDER and not _is_number(value):
                raise ParameterError(f"{where}: the filter {column} is {condition!r:.60}; allowed are a value, != and a value, "
                                     "and <, <=, > or >= and a number")
        lacking = [field for field in ("licence", "use") if field not in entry]
        lacking += ["id or home"] * (not {"id", "home"} & set(entry))
        if lacking:
            raise ParameterError(f"{where} lacks {', '.join(lacking)}")
    return section


def find_failed(cells: dict, filters: dict) -> str:
    """Return the first of `filters` ({column: condition}) that the cells of a line fail, as "column condition"; "" for none.

    A condition is a value, or one of !=, <, <=, >, >= before it. Numbers are compared as numbers, however they are written; a
    cell that is empty, or no number where one is asked for, passes only !=.
    """
    for column, condition in filters.items():
        sign, wanted = _read_condition(condition)
        cell = cells[column]
        if _is_number(wanted) and _is_number(cell):
            cell, wanted = float(cell), float(wanted)
        elif sign in _ORDER:
            return f"{column} {condition}"
        else:
            cell = str(cell)
        if not (_ORDER | _EQUAL)[sign](cell, wanted):
            return f"{column} {condition}"
    return ""


def _read_condition(condition):
    sign, value = re.fullmatch(r"\s*(!=|<=|>=|<|>|)\s*(.*)", str(condition)).groups()
    return sign, value.strip()


def _is_number(value):
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def list_corpora(language: str) -> dict[str, dict]:
    """Return {name: entry} of the corpora that the language's file in params/ lists; {} where there is none."""
    path = paths.ROOT / "params" / f"{language}.yaml"
    if not path.is_file():
        return {}
    content = yaml.safe_load(read_text(path)) or {}
    return check_listed(f"params/{language}.yaml", content.get("corpora", {}))


def find_listed(language: str, corpus) -> dict:
    """Return the entry of the corpus in data/corpora/<name>, or below it; {} for one that lies elsewhere or is not listed.

    Of a corpus elsewhere nothing is known, whatever its folder is called.
    """
    place, home = Path(os.path.abspath(resolve_path(corpus))), paths.ROOT / PLACE  # a link there may lead to another disk
    return list_corpora(language).get(place.relative_to(home).parts[0], {}) if home in place.parents else {}


def split_corpora(corpus) -> list[tuple[str, float | None]]:
    """Return (corpus, hours to draw or None for all) of each in a list: "nst:20, npsc" has two; a path that is there is one."""
    parts = [(str(corpus), None)] if resolve_path(corpus).exists() else []
    for part in filter(str.strip, str(corpus).split(",")) if not parts else ():  # a comma at the end begins none
        name, colon, hours = part.strip().rpartition(":")
        parts.append((name.strip(), float(hours)) if colon and _is_number(hours) else (part.strip(), None))
    return parts or [(str(corpus), None)]


def find_remote(language: str, corpus) -> dict:
    """Return the entry of a corpus that is streamed from the hub; {} for one that is on the disk, or nowhere.

    That is the name of a listed one with an id whose folder is not there, or the id of any data set, listed or not.
    """
    listed, corpus = list_corpora(language), str(corpus)
    if resolve_path(corpus).exists() or corpus in listed and resolve_path(f"{PLACE}/{corpus}").exists():
        return {}
    if "id" in listed.get(corpus, {}):
        return listed[corpus]
    named = next((entry for entry in listed.values() if entry.get("id") == corpus), {"id": corpus})
    return named if is_hub_id(corpus) and Path(corpus).suffix not in (".jsonl", ".txt") else {}


def is_source(language: str, corpus: str) -> bool:
    """Return whether every corpus of a list (split_corpora) is on the disk or is streamed from the hub."""
    return all(resolve_path(name).exists() or find_remote(language, name) for name, _ in split_corpora(corpus))


def identify_stream(entry: dict) -> str:
    """Return a hash of what is streamed and how it is read: what a run or a folder of its clips is named by."""
    return hash_value([entry.get(field) for field in ("id", "config", "split", "revision", "columns", "filters")])


def place_stream(entry: dict, language: str, seed: int) -> Path:
    """Return the folder that keeps what was streamed of a data set (cut.stream_clips), in the order of `seed`."""
    return paths.ROOT / "data" / "streams" / f"{Path(entry['id']).name}-{hash_value([identify_stream(entry), language, seed])}"


def take_corpus(found: str, corpus: str, language: str, train: bool = True) -> str:
    """Return `corpus` as a path: itself, or data/corpora/<name> for the name of a listed one; of a list (split_corpora) each.

    With `train` also a name or an id that the hub has, as it is: cut.stream_clips reads it. Raises ParameterError, which `found`
    begins, for a name whose folder is not there, saying what to fetch and where to put it; and with `train` for a corpus whose
    licence forbids synthesis, or that is listed for something else than training. One that forbids it is refused by its
    folder's name as well, wherever it lies, and for every language.
    """
    parts = split_corpora(corpus) if train else [(corpus, None)]
    if len(parts) == 1 and parts[0][1] is None:
        return _take_one(found, corpus, language, train)
    taken = [_take_one(found, name, language, train) for name, _ in parts]
    places = list(map(resolve_path, taken))
    for place, (name, hours) in zip(taken, parts, strict=True):
        twice = places.count(resolve_path(place)) > 1
        if twice or hours is not None and hours <= 0:
            fault = "is named twice" if twice else f"has {hours:g} h"
            raise ParameterError(f"{found}: {name!r} {fault}; allowed are names and paths with commas between, each once, "
                                 "perhaps with hours: nst:20, npsc:5.5")
        if not find_remote(language, place) and not resolve_path(place).exists():
            raise ParameterError(f"{found}, and {name!r} of it is neither a folder or manifest that is there nor one of "
                                 f"{', '.join(list_corpora(language)) or 'no listed corpora'}")
    return ", ".join(place + (f":{hours:.10g}" if hours else "") for place, (_, hours) in zip(taken, parts, strict=True))


def _take_one(found, corpus, language, train):
    listed, path = list_corpora(language), resolve_path(corpus)
    if corpus in listed and not path.exists():
        path = resolve_path(f"{PLACE}/{corpus}")
        _check_use(found, corpus, listed[corpus], train)
        if path.exists():
            return f"{PLACE}/{corpus}"
        fault = _ask_hub(listed[corpus], language) if train and "id" in listed[corpus] else ""
        if fault is None:
            return corpus
        raise ParameterError(f"{found}, and there is no {PLACE}/{corpus}; {describe_fetch(corpus, listed[corpus])}"
                             f"{f' To stream it, the hub was asked: {fault}' if fault else ''}")
    folder = path.parent if path.suffix == ".jsonl" else path
    forbidden = {name: entry for code in LANGUAGES for name, entry in list_corpora(code).items() if entry.get("forbids")}
    for name, entry in (forbidden | listed).items():  # what Danish lists is no more allowed to teach Norwegian
        named = {name.lower(), Path(entry.get("id", name)).name.lower()}
        own = {folder.name.lower(), folder.parent.name.lower()} & named  # or a configuration's folder in it
        if entry.get("forbids") and own or entry == find_listed(language, path):
            _check_use(found, name, entry, train)
    if train and (entry := find_remote(language, corpus)):
        if "use" in entry:
            _check_use(found, corpus, entry, train)
        if fault := _ask_hub(entry, language):
            raise ParameterError(f"{found}, no {resolve_path(corpus)} exists; allowed: a manifest.jsonl, a folder of audio or of "
                                 f"a published corpus, the name of a listed one ({', '.join(listed) or 'none'}), or the id of a "
                                 f"data set of the hub, which was asked: {fault}")
    return corpus


def _ask_hub(entry, language):
    """Return why a data set can not be streamed, None if it can: some of it is here, or the hub knows it."""
    if any(place_stream(entry, language, 0).parent.glob(f"{Path(entry['id']).name}-*/stream.json")):
        return None
    try:
        HfApi().dataset_info(entry["id"], revision=entry.get("revision"), timeout=10)
    except HUB_ERRORS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _check_use(found, name, entry, train):
    if train and entry.get("forbids"):
        raise ParameterError(f"{found}: {name} ({_say_source(entry)}; licence: {entry['licence']}) forbids speech synthesis, "
                             "so no voice is trained on it. Take another corpus; params/<language>.yaml lists them")
    if train and "train" not in entry["use"]:
        raise ParameterError(f"{found}: {name} is listed for {', '.join(entry['use']) or 'nothing'} and not for training"
                             f"{': ' * ('note' in entry)}{entry.get('note', '')}")


def describe_fetch(name: str, entry: dict) -> str:
    """Return in words what to fetch for a listed corpus, how large it is, its licence, and where to put it."""
    chosen = "".join(f", {field} {entry[field]}" for field in ("config", "split") if field in entry)
    hours = entry.get("hours", "not stated")
    large = f"{hours} h" if isinstance(hours, int | float) else f"hours {hours}"
    note = f" Note: {entry['note']}." if "note" in entry else ""
    hub = f", as by: hf download {entry['id']} --repo-type dataset --local-dir {PLACE}/{name}" if "id" in entry else ""
    if "revision" in entry:  # <config>/<split>/0000.parquet
        hub += f" --revision {entry['revision']}" + (f" --include '{entry['config']}/*'" if "config" in entry else "")
    elif "config" in entry:
        hub += f" (of it only what belongs to {entry['config']})"
    return (f"fetch {_say_source(entry)}{chosen} ({large}, speakers {entry.get('speakers', 'not stated')}, size "
            f"{entry.get('size', 'not stated')}; licence: {entry['licence']}) into {PLACE}/{name}{hub}. It may be a folder of "
            f"Common Voice, LJSpeech, Kaldi or Parquet, a manifest.jsonl, or clips with texts.{note}")


def _say_source(entry):
    return " or ".join(entry[field] for field in ("id", "home") if field in entry)


def describe_licence(languages, corpus: str, said: str = "", rows=()) -> dict[str, str]:
    """Return what a card says of the licence of `corpus`: `said` if it is not empty, else that of its entry, or of all in a list.

    Each of `languages` may have an entry of its own by a name. Of one without an entry it is what its `rows` say in their field
    `licence`, or else the card in its folder. Data that is not for commercial use marks the card, whoever said the licence, and
    however many others are not so.
    """
    found = [(name, find_remote(code, name) or find_listed(code, name))
             for name, _ in split_corpora(corpus) for code in languages]
    licences = {}
    for name, entry in found:
        own = [row for row in rows if row.get("of_corpus", name) in (name, entry.get("id"))]
        licences[name, entry.get("id")] = entry.get("licence") or _read_licence(name, entry, own)
    each = ", ".join(f"{licence} ({Path(name).name})" for (name, _), licence in licences.items())
    licence = said or (each if len(set(licences.values())) > 1 else next(iter(licences.values())))
    marked = any(entry.get("noncommercial") for _, entry in found)
    marked |= any("-nc" in one.lower().replace(" ", "-").replace("_", "-") for one in (licence, *licences.values()))
    mark = {"commercial use": "none: the licence of the data forbids it"} if marked else {}
    return {"licence": f"of the data: {licence}"} | mark


def _read_licence(name, entry, rows):
    """Return the licence that the hub's card of a streamed data set says, else the rows of a corpus, else the card beside it."""
    streams = paths.ROOT / "data" / "streams"
    kept = (read_json(file) for file in sorted(streams.glob(f"{Path(entry['id']).name}-*/stream.json"))) if "id" in entry else ()
    each = ", ".join(sorted({str(row["licence"]) for row in rows if row.get("licence")}))
    card = resolve_path(name) / "README.md"
    if not each and card.is_file():
        with suppress(ValueError, yaml.YAMLError):  # no card, or half of one
            each = DatasetCard(read_text(card)).data.license
    return next((about["licence"] for about in kept if about["id"] == entry["id"]), str(each or "not stated"))
