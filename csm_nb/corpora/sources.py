"""From a source to rows: a manifest, a folder of clips with texts, or a corpus as it is published (corpora.layouts)."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from csm_nb.clean import EncodingError, clean_text, compose, read_text
from csm_nb.corpora.cut import cut_clips, measure_seconds, show_left_out, stream_clips
from csm_nb.corpora.layouts import COMMON_VOICE, find_layout, read_common_voice, read_parquet
from csm_nb.corpora.listed import find_listed, find_remote, split_corpora
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.manifest import SUFFIXES, CorpusError, read_manifest
from csm_nb.paths import resolve_path

TABLES = (".tsv", ".csv", ".scp", ".parquet")  # of a published corpus, whose folder is to be given
TELLING = (*COMMON_VOICE, "metadata.csv", "wav.scp")  # files by which a folder is known for such a corpus
FIRST_CLIPS = 64  # that are drawn to tell how long the clips of a corpus are


class LanguageError(CorpusError):
    """A corpus that holds nothing of a language; names what it holds."""


def load_corpus(source, language: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Return the rows of `language` in a corpus (list_rows), at most `limit`, drawn by `seed`, each with a file of its own.

    Only what is drawn is cut from longer recordings, written out of Parquet, or fetched from the hub (corpora.cut). Of a list
    of corpora with hours (listed.split_corpora) as much is drawn of each, in an order by `seed`, by the lengths in the files'
    headers; `limit` is of all together, parted by hours, or evenly where some have none. One that has nothing of the language
    is passed over where another has, as where each is of one of several languages. Rows of a list or of the hub say in
    `of_corpus` where they are from. What is not there is said.
    """
    parts, code = split_corpora(source), get_language(language).code
    if len(parts) > 1 or parts[0][1]:
        return _load_parts(parts, code, limit, seed)
    if entry := find_remote(code, source):
        return stream_clips(entry, code, limit, seed)
    chosen = _list_shown(source, code)
    if limit is not None and limit < len(chosen):
        chosen = [chosen[i] for i in sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit])]
    return cut_clips(chosen)


def _load_parts(parts, language, limit, seed):
    opened, rows, none = {}, [], []
    for name, _ in parts:
        try:
            opened[name] = _open_part(name, language, seed)
        except LanguageError as error:
            none.append(error)
    if not opened:
        raise none[0]
    for error in none:
        print(error)
    parts = [part for part in parts if part[0] in opened]
    weights = [hours or 0 for _, hours in parts] if all(hours for _, hours in parts) else [1] * len(parts)
    for at, (name, hours) in enumerate(parts):
        left = None if limit is None else round((limit - len(rows)) * weights[at] / sum(weights[at:]))
        drawn = _draw_hours(opened[name], hours, left)
        rows += [{"of_corpus": name} | row for row in drawn]
    return rows


def _open_part(name, language, seed):
    """Return a function: rows of a corpus from place to place (None: the end) in the order of `seed`, each with its file."""
    if entry := find_remote(language, name):
        return lambda first, last: stream_clips(entry, language, last, seed)[first:]
    rows = _list_shown(name, language)
    order = np.random.default_rng(seed).permutation(len(rows))
    return lambda first, last: cut_clips(rows[i] for i in order[first:last])


def _draw_hours(take, hours, most):
    """Return rows with their `duration`, up to so many hours or clips, whichever is reached first."""
    drawn, seconds, wanted = [], 0.0, math.inf if hours is None else 3600 * hours
    while seconds < wanted and (most is None or len(drawn) < most):
        last = most
        if hours is not None:  # as many as it may take by those that are drawn
            last = len(drawn) + (math.ceil((wanted - seconds) * len(drawn) / seconds) if seconds else FIRST_CLIPS)
            last = last if most is None else min(last, most)
        fresh = take(len(drawn), last)
        for row in fresh:
            if seconds >= wanted:
                break
            try:
                row = row | {"duration": measure_seconds(row)}
            except (soundfile.LibsndfileError, OSError):  # check_clips sets it aside
                row = row | {"duration": 0.0}
            drawn.append(row)
            seconds += row["duration"]
        if last is None or not fresh:
            break
    return drawn


def describe_data(source, rows) -> str:
    """Return what a card says that `rows` are of: the corpus, of a list each with the hours that were drawn of it.

    Prints where fewer hours were there than asked for.
    """
    parts = split_corpora(source)
    if len(parts) == 1 and parts[0][1] is None:
        return str(source)
    hours = Counter()
    for row in rows:
        hours[row["of_corpus"]] += row["duration"] / 3600
    said, codes = [], {row["language"] for row in rows}
    for name, wanted in parts:
        drawn = sum(hours[of] for of in {name} | {find_remote(code, name).get("id") for code in codes})
        said.append(f"{'/'.join(Path(name).parts[-2:])} ({drawn:.2f} h)")  # no card tells where its maker keeps things
        if wanted and drawn < wanted:
            print(f"{name}: {drawn:.2f} h of the {wanted:g} h that are asked for: all there is, or what corpus_clips allows")
    return ", ".join(said)


def _list_shown(source, language):
    """Return list_rows, and print what filters leave out."""
    left_out = Counter()
    rows = list_rows(source, language, left_out)
    show_left_out(left_out, len(rows))
    return rows


def list_rows(source, language: str, left_out: Counter | None = None) -> list[dict]:
    """Return the rows of `language` in a manifest or a folder, as they are: nothing is drawn, and nothing cut.

    A folder is a manifest.jsonl, a published layout (layouts.find_layout), or else clips: these take their text from a .txt
    of the same name beside them, else none, and the folder they lie in as speaker; a text that can not be decoded leaves its
    clip for check_clips to set aside (`text_fault`). `left_out` counts what each filter of its entry leaves out. Raises
    CorpusError when there is nothing of the language, naming what there is.
    """
    source, code = resolve_path(source), get_language(language).code
    if source.is_dir() and (source / "manifest.jsonl").is_file():
        source = source / "manifest.jsonl"
    left_out = Counter() if left_out is None else left_out
    rows = _read_source(source, code, left_out)
    chosen = [row for row in rows if row["language"] == code]
    if not chosen:
        found = ", ".join(sorted({str(row["language"]) for row in rows})) or "no clip at all"
        allowed = f"in a manifest `language` is one of {', '.join(LANGUAGES)}"
        if not rows and source.is_dir():
            kinds = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file() and path.suffix)
            among = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5)) or "no files"
            raw = "; of raw samples, say how they are: ffmpeg -f s16le -ar 44100 -ac 2 -i clip.pcm clip.wav, with " \
                  "-skip_initial_bytes N before -i for a header" * (".pcm" in kinds)
            allowed = f"among {among}; clips are {' '.join(SUFFIXES)} (others: ffmpeg -i clip.m4a clip.wav{raw})"
        filtered = "".join(f"; the filter {one} leaves out {count} rows" for one, count in left_out.items())
        raise LanguageError(f"{source}: nothing of language {code!r}; found: {found}{filtered}; {allowed}")
    return chosen


def list_taught(names, languages) -> list[dict]:
    """Return the rows (list_rows) of the first of `languages` in all corpora `names`, where they can teach all languages.

    Raises CorpusError for a corpus that has nothing of any of them, for a language that none has anything of, and where one
    does not say which of its clips are of which language.
    """
    rows = {code: [] for code in languages}
    for name in names:
        none = []
        for code in languages:
            try:
                rows[code] += list_rows(name, code)
            except LanguageError as error:
                none.append(error)
        if len(none) == len(languages):
            raise none[0]
    if missing := [code for code, found in rows.items() if not found]:
        raise CorpusError(f"nothing of language {missing[0]!r} in it, which is to be taught beside the others")
    clips = {code: {tuple(str(row.get(field)) for field in ("audio_path", "start", "parquet_row", "codes_row")) for row in found}
             for code, found in rows.items() if languages[1:]}
    if any(clips[languages[0]] & clips[code] for code in languages[1:]):
        raise CorpusError(f"it does not say which of its clips are {' and which '.join(languages)}; allowed for several are a "
                          "manifest.jsonl, which says the language of each, and folders of Common Voice")
    return rows[languages[0]]


def _read_source(source, code, left_out):
    if not source.is_dir():
        if source.suffix.lower() in TABLES and source.is_file():
            raise CorpusError(f"{source.name} is part of a corpus and no manifest; give the folder that holds all of it: "
                              f"{source.parent}")
        return read_manifest(source)
    entry = find_listed(code, source)
    if entry.get("config") and (source / entry["config"]).is_dir():  # of several languages in one download
        source /= entry["config"]
    read = find_layout(source)
    below = sorted(folder.name for folder in source.glob("*/") if not read and any(
        (folder / name).is_file() for name in TELLING) and find_layout(folder))
    if below:
        raise CorpusError(f"{source} holds corpora and is none itself; give one of them, such as {source / below[0]} (there are "
                          f"{', '.join(below)}), or several with commas between")
    try:
        if read in (read_common_voice, read_parquet):  # tables with columns of their own
            return read(source, code, entry, left_out)
        if entry.get("filters"):
            raise CorpusError(f"{source}: its entry has filters ({', '.join(entry['filters'])}), and what it holds has no "
                              "columns; allowed are Common Voice and Parquet")
        return read(source, code) if read else _read_folder(source, code)
    except (EncodingError, OSError, pa.ArrowException) as error:
        raise CorpusError(str(error) if str(source) in str(error) else f"{source}: {error}") from error


def _read_folder(folder, language):
    files, rows = sorted(folder.rglob("*")), []
    texts = {compose(str(path.with_suffix(""))): path for path in files if path.suffix.lower() == ".txt"}
    for path in (path for path in files if path.suffix.lower() in SUFFIXES):
        row = {"text": "", "audio_path": str(path.resolve()), "speaker_id": compose(path.parent.name), "language": language}
        if beside := texts.get(compose(str(path.with_suffix("")))):
            try:
                row["text"] = clean_text(read_text(beside))
            except (EncodingError, OSError) as error:
                row["text_fault"] = str(error)
        rows.append(row)
    return rows
