"""The corpora that params/<language>.yaml lists: taken by name, and held to what their licences allow."""

import math
import operator
import os
import re
from pathlib import Path

import yaml

from csm_nb import paths
from csm_nb.clean import read_text
from csm_nb.paths import resolve_path
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
            if not isinstance(condition, str | int | float) or not value or sign in _ORDER and not _is_number(value):
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


def take_corpus(found: str, corpus: str, language: str, train: bool = True) -> str:
    """Return `corpus` as a path: itself, or data/corpora/<name> for the name of a listed one.

    Raises ParameterError, which `found` begins, for a name whose folder is not there, saying what to fetch and where to put it;
    and with `train` for a corpus whose licence forbids synthesis, or that is listed for something else than training. One that
    forbids it is refused by its folder's name as well, wherever it lies.
    """
    listed, path = list_corpora(language), resolve_path(corpus)
    if corpus in listed and not path.exists():
        path = resolve_path(f"{PLACE}/{corpus}")
        _check_use(found, corpus, listed[corpus], train)
        if not path.exists():
            raise ParameterError(f"{found}, and there is no {PLACE}/{corpus}; {describe_fetch(corpus, listed[corpus])}")
        return f"{PLACE}/{corpus}"
    folder = path.parent if path.suffix == ".jsonl" else path
    for name, entry in listed.items():
        named = {name.lower(), Path(entry.get("id", name)).name.lower()}
        if entry.get("forbids") and folder.name.lower() in named or entry == find_listed(language, path):
            _check_use(found, name, entry, train)
    return corpus


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


def describe_licence(language: str, corpus: str, said: str = "") -> dict[str, str]:
    """Return what a card says of the licence of `corpus`: `said` if it is not empty, else that of its entry.

    Data that is not for commercial use marks the card, whoever said the licence.
    """
    entry = find_listed(language, corpus)
    licence = said or entry.get("licence", "not stated")
    marked = entry.get("noncommercial") or "-nc" in licence.lower().replace(" ", "-").replace("_", "-")
    mark = {"commercial use": "none: the licence of the data forbids it"} if marked else {}
    return {"licence": f"of the data: {licence}"} | mark
