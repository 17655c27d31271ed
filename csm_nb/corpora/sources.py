"""From a source to rows: a manifest, or a folder of clips with texts."""

from collections import Counter

import numpy as np

from csm_nb.clean import EncodingError, clean_text, compose, read_text
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.manifest import SUFFIXES, CorpusError, read_manifest
from csm_nb.paths import resolve_path


def load_corpus(source, language: str, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Return the rows of `language` in a manifest, or all clips of a folder: at most `limit`, drawn by `seed`.

    A folder's clips take their text from a .txt of the same name beside them, else none, and the folder they lie in as
    speaker; a text that can not be decoded leaves its clip for check_clips to set aside (`text_fault`). Raises CorpusError when
    there is nothing of the language, naming what there is.
    """
    source, code = resolve_path(source), get_language(language).code
    if source.is_dir() and (source / "manifest.jsonl").is_file():
        source = source / "manifest.jsonl"
    rows = _read_folder(source, code) if source.is_dir() else read_manifest(source)
    chosen = [row for row in rows if row["language"] == code]
    if not chosen:
        found = ", ".join(sorted({str(row["language"]) for row in rows})) or "no clip at all"
        allowed = f"in a manifest `language` is one of {', '.join(LANGUAGES)}"
        if not rows and source.is_dir():
            kinds = Counter(path.suffix.lower() for path in source.rglob("*") if path.is_file() and path.suffix)
            among = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5)) or "no files"
            allowed = f"among {among}; clips are {' '.join(SUFFIXES)} (others: ffmpeg -i clip.m4a clip.wav)"
        raise CorpusError(f"{source}: nothing of language {code!r}; found: {found}; {allowed}")
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i] for i in sorted(np.random.default_rng(seed).permutation(len(chosen))[:limit])]


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
