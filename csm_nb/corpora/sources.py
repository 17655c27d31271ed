"""From a source to rows: a manifest, a folder of clips with texts, or a corpus as it is published (corpora.layouts)."""

from collections import Counter

import numpy as np
import pyarrow as pa

from csm_nb.clean import EncodingError, clean_text, compose, read_text
from csm_nb.corpora.cut import cut_clips
from csm_nb.corpora.layouts import find_layout, read_common_voice, read_parquet
from csm_nb.corpora.listed import find_listed
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.manifest import SUFFIXES, CorpusError, read_manifest
from csm_nb.paths import resolve_path


def load_corpus(source, language: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Return the rows of `language` in a corpus (list_rows), at most `limit`, drawn by `seed`, each with a file of its own.

    Only what is drawn is cut from longer recordings, or written out of Parquet (corpora.cut).
    """
    left_out = Counter()
    chosen = list_rows(source, language, left_out)
    _show_left_out(left_out, len(chosen))
    if limit is not None and limit < len(chosen):
        chosen = [chosen[i] for i in sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit])]
    return cut_clips(chosen)


def _show_left_out(left_out, kept):
    for condition, count in left_out.items():
        print(f"the filter {condition} leaves out {count} of {kept + left_out.total()} rows")


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
    rows = _read_source(source, code, left_out)
    chosen = [row for row in rows if row["language"] == code]
    if not chosen:
        found = ", ".join(sorted({str(row["language"]) for row in rows})) or "no clip at all"
        allowed = f"in a manifest `language` is one of {', '.join(LANGUAGES)}"
        if not rows and source.is_dir():
            kinds = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file() and path.suffix)
            among = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5)) or "no files"
            allowed = f"among {among}; clips are {' '.join(SUFFIXES)} (others: ffmpeg -i clip.m4a clip.wav)"
        raise CorpusError(f"{source}: nothing of language {code!r}; found: {found}; {allowed}")
    return chosen


def _read_source(source, code, left_out):
    if not source.is_dir():
        return read_manifest(source)
    entry = find_listed(code, source)
    if entry.get("config") and (source / entry["config"]).is_dir():  # of several languages in one download
        source /= entry["config"]
    read = find_layout(source)
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
