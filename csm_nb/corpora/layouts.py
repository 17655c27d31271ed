"""Corpora as they are published: the rows of Common Voice, LJSpeech, Kaldi and Parquet folders, one function each.

What a folder holds says which it is (find_layout). A row's text is cleaned and its audio_path absolute, as read_manifest leaves
them; a row of Parquet names its file and `parquet_row` until corpora.cut writes its clip.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from csm_nb.clean import clean_text, compose, find_file, read_lines
from csm_nb.corpora.listed import find_failed
from csm_nb.languages import read_label
from csm_nb.manifest import SUFFIXES, CorpusError

COMMON_VOICE = ("validated.tsv", "train.tsv")  # the first that is there; `train` is a part of what was validated
# What published corpora call their columns, the first with a text taken for each row: as written before made plain
PARQUET = {
    "text": ("sentence_text", "raw_transcription", "raw_text", "text", "sentence", "transcription", "transcript",
             "normalized_text", "standardized_text"),
    "speaker": ("speaker_id", "client_id", "speaker", "pid"),
    "audio": ("audio", "utterance_audio_file", "audio_path", "path", "file"),
    "language": ("language", "locale", "lang"),
}  # fmt: skip
CODES = ("codes", "n_frames", "k_codebooks")  # of a data set of codes alone, such as shangeth/librispeech-mimi-codes
FRAME_RATE = 12.5  # frames per second, Mimi's: of codes whose data set does not say


def find_layout(folder: Path):
    """Return the function that reads `folder`, by what it holds: read_common_voice and so on, or None."""
    if any((folder / name).is_file() for name in COMMON_VOICE) and (folder / "clips").is_dir():
        return read_common_voice
    if (folder / "metadata.csv").is_file() and (folder / "wavs").is_dir():
        return read_ljspeech
    if (folder / "wav.scp").is_file():
        return read_kaldi
    return read_parquet if next(folder.rglob("*.parquet"), None) else None


def read_common_voice(folder: Path, language: str, entry=None, left_out=None) -> list[dict]:
    """Return the rows of a Common Voice release's folder of one locale: validated.tsv (else train.tsv) and clips/.

    Its TSV quotes nothing: a quotation mark belongs to the sentence, and "null" and "NA" are words. `locale` says the
    language, `client_id` is the speaker. `left_out` counts what the entry's `filters` leave out.
    """
    table = next(folder / name for name in COMMON_VOICE if (folder / name).is_file())
    lines = ((number, line.split("\t"), fault) for number, (line, fault) in enumerate(read_lines(table), 1) if line.strip())
    header = next(lines, (1, [], ""))[1]
    filters = (entry or {}).get("filters") or {}
    need_columns(table, header, {name: [name] for name in ("client_id", "path", "sentence", *filters)})
    rows = []
    for number, cells, fault in lines:
        if len(cells) > len(header) or len(cells) <= max(map(header.index, ("client_id", "path", "sentence"))):
            raise CorpusError(f"{table}: line {number} has {len(cells)} columns; the header has {len(header)}: "
                              f"{', '.join(header)}")
        row = dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
        if failed := find_failed(row, filters):
            if left_out is not None:
                left_out[failed] += 1
            continue
        name = row["path"] if Path(row["path"]).suffix.lower() in SUFFIXES else f"{row['path']}.mp3"
        said = _name_language(row.get("locale"), language)
        rows.append(_make_row(row["sentence"], folder / "clips" / name, row["client_id"], said, fault))
    return rows


def read_ljspeech(folder: Path, language: str) -> list[dict]:
    """Return the rows of a folder as LJSpeech is laid out: metadata.csv (name|text|text in words, nothing quoted) and wavs/.

    The text in words is taken where there is one. All is one voice, named by its folder.
    """
    table, rows = folder / "metadata.csv", []
    files = {compose(path.stem): path for path in sorted((folder / "wavs").iterdir()) if path.suffix.lower() in SUFFIXES}
    for number, (line, fault) in enumerate(read_lines(table), 1):
        cells = line.split("|")
        if not line.strip():
            continue
        if not 2 <= len(cells) <= 3:
            raise CorpusError(f"{table}: line {number} has {len(cells)} columns ({line!r:.60}); allowed is name|text, or "
                              "name|text|text in words")
        name = compose(cells[0].strip()).removesuffix(".wav")
        rows.append(_make_row(cells[-1].strip() or cells[1], files.get(name, folder / "wavs" / f"{name}.wav"), folder.name,
                              language, fault))
    return rows


def read_kaldi(folder: Path, language: str) -> list[dict]:
    """Return the rows of a Kaldi data folder: wav.scp, text, utt2spk, and segments where the recordings are longer ones.

    Paths start at the folder. A recording that wav.scp makes by a command is refused: run it once, and name its file.
    """
    missing = [name for name in ("text", "utt2spk") if not (folder / name).is_file()]
    if missing:
        raise CorpusError(f"{folder}: lacks {', '.join(missing)} beside wav.scp; found are {_list_files(folder)}")
    recordings = _read_pairs(folder / "wav.scp")
    for name, (place, _) in recordings.items():
        if place.endswith("|"):
            raise CorpusError(f"{folder / 'wav.scp'}: {name} is made by a command ({place:.80}), which is not run here; write it "
                              f"to a file once: {place.rstrip('| ')} > {name}.wav (flac and mp3 are read as well), and name the "
                              "file in wav.scp")
    texts, speakers = _read_pairs(folder / "text"), _read_pairs(folder / "utt2spk")
    segments = {name: (name, "", "") for name in recordings}
    if (folder / "segments").is_file():
        segments = {name: tuple(rest.split()) for name, (rest, _) in _read_pairs(folder / "segments").items()}
    rows = []
    for name, segment in segments.items():
        if len(segment) != 3 or segment[0] not in recordings:
            raise CorpusError(f"{folder / 'segments'}: {name} has {' '.join(segment)!r}; allowed is a recording of wav.scp, its "
                              "start and its end in seconds")
        if name not in speakers:
            raise CorpusError(f"{folder / 'utt2spk'}: says no speaker of {name}")
        text, fault = texts.get(name, ("", ""))
        row = _make_row(text, folder / recordings[segment[0]][0], speakers[name][0], language, fault)
        try:
            times = {"start": float(segment[1]), "end": float(segment[2])} if segment[1] else {}
        except ValueError:
            raise CorpusError(f"{folder / 'segments'}: {name} has {segment[1]} and {segment[2]} as times; allowed are "
                              "seconds") from None
        rows.append(row | times)
    return rows


def read_parquet(folder: Path, language: str, entry=None, left_out=None) -> list[dict]:
    """Return the rows of a folder of Parquet as `datasets` and the hub write it; no audio is read yet.

    Where files or their folders are called train, the others (test, validation) are left out. The entry's `columns` may name
    those of text, speaker and audio, where PARQUET's candidates are not what is meant; with `{"speaker": None}` the folder is
    one voice. A row without a speaker, and the rows of a row group that is broken, are set aside later. A data set of codes
    alone (codes k x n, n_frames, k_codebooks) has rows without audio. Raises CorpusError, which lists the columns found, where
    one is lacking.
    """
    rows = []
    for path in choose_train(sorted(folder.rglob("*.parquet"))):
        file = pq.ParquetFile(path)
        read = find_columns(path, file.schema_arrow.names, entry)
        about = {key.decode(): value.decode(errors="replace") for key, value in (file.schema_arrow.metadata or {}).items()}
        number = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                cells = file.read_row_group(group, list_columns(read)).to_pylist()
            except (OSError, pa.ArrowException) as error:  # one that is broken takes no other with it
                fault = describe_broken(f"row group {group} of {path.name}", error)
                rows += [_make_row("", path, folder.name, language, fault)] * count
            else:
                made = [make_row(one, read, path, folder.name, language, left_out) for one in cells]
                rows += [row | _locate(one, number + at, read, about)
                         for at, (one, row) in enumerate(zip(cells, made, strict=True)) if row is not None]
            number += count
    return rows


def choose_train(files: list[Path]) -> list[Path]:
    """Return the files that are called train, or lie in a folder that is; all where none is."""
    named = [path for path in files if path.stem.split("-")[0] == "train" or path.parent.name in ("train", "partial-train")]
    return named or files


def find_columns(place, found, entry=None) -> dict:
    """Return what to read of a table of the columns `found`: {kind: names, best first}, and the `filters` of a corpus' entry.

    Kinds are those of PARQUET, of codes alone CODES instead of audio. Raises CorpusError, with `place` and `found`, for a kind
    or filter that no column is of; no speaker is needed where the entry says that there is one voice.
    """
    columns, filters = (entry or {}).get("columns") or {}, (entry or {}).get("filters") or {}
    wanted = {kind: [columns[kind]] if columns.get(kind) else list(names) for kind, names in PARQUET.items()}
    one = "speaker" in columns and columns["speaker"] is None
    if "codes" in found and not columns.get("audio"):
        wanted = {kind: names for kind, names in wanted.items() if kind != "audio"} | {name: [name] for name in CODES}
    needed = {kind: names for kind, names in wanted.items() if kind not in ("language", *["speaker"] * one)}
    need_columns(place, found, needed | {f"the filter {name}": [name] for name in filters})
    read = {kind: [name for name in names if name in found] for kind, names in wanted.items()}
    return read | {"filters": filters, "one": one}


def list_columns(read: dict) -> list[str]:
    """Return the columns that make a row (find_columns), without the audio or the codes themselves."""
    kinds = {name for kind, names in read.items() if kind not in ("audio", "codes", "filters", "one") for name in names}
    return sorted(kinds | read["filters"].keys())


def make_row(cells: dict, read: dict, path, voice: str, language: str, left_out=None) -> dict | None:
    """Return the row of one line of a table (find_columns), None where a filter leaves it out, which `left_out` counts."""
    if failed := find_failed(cells, read["filters"]):
        if left_out is not None:
            left_out[failed] += 1
        return None
    text, speaker, said = (next((cells[name] for name in read[kind] if cells[name] not in (None, "")), None)
                           for kind in ("text", "speaker", "language"))
    known = read["one"] or str(speaker) not in ("None", "")  # VoxPopuli writes None as a word
    return _make_row(str(text or ""), path, voice if read["one"] else speaker, _name_language(said, language),
                     "" if known else "no speaker is said of it")


def _locate(cells, number, read, about):
    """Return where in its Parquet file the audio of a row is, or its codes, and what is said of those."""
    if "codes" not in read:
        return {"parquet_row": number, "parquet_column": read["audio"][0]}
    rate = float(about.get("frame_rate", FRAME_RATE))
    return {"codes_row": number, "codebooks": cells["k_codebooks"], "frames": cells["n_frames"], "codec": about.get("codec", ""),
            "codebook_size": int(about.get("codebook_size", 0)), "duration": round(cells["n_frames"] / rate, 3)}


def read_parquet_audio(path: Path, column: str, numbers) -> list[tuple[bytes | None, str]]:
    """Return (bytes or None, path) of the audio of rows `numbers` (ascending) of a Parquet file, a row group at a time.

    Where a row group is broken, an error stands in the place of each of its rows' bytes.
    """
    file, found, first = pq.ParquetFile(path), [], 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        wanted = [number - first for number in numbers if first <= number < first + count]
        first += count
        if wanted:
            try:
                cells = file.read_row_group(group, columns=[column]).column(0).take(pa.array(wanted)).to_pylist()
            except (OSError, pa.ArrowException) as error:
                found += [(error, f"row group {group} of {path.name}")] * len(wanted)
                continue
            found += [(cell.get("bytes"), cell.get("path") or "") if isinstance(cell, dict) else (None, cell or "")
                      for cell in cells]
    return found


def describe_broken(what: str, error: Exception) -> str:
    """Return in words that a part of a file can not be read, why, and what to do."""
    return f"{what} can not be read ({' '.join(str(error).split())[:200]}); fetch the file again"


def _make_row(text, audio, speaker, language, fault=""):
    row = {"text": clean_text(text), "audio_path": str(find_file(audio).absolute()), "speaker_id": clean_text(str(speaker)),
           "language": language}
    return row | {"text": "", "text_fault": fault} if fault else row


def _name_language(label, asked):
    """Return our code for what a row says; a number (a class of `datasets`) and nothing at all are what was asked for."""
    if not isinstance(label, str) or not label.strip():
        return asked
    known = read_label(label)
    return label.strip() if known == "other" else known


def need_columns(path, found, wanted: dict) -> None:
    """Raise CorpusError, which lists the columns `found`, for a kind of which none of its `wanted` names is there."""
    lacking = [f"{kind} ({' or '.join(names)})" for kind, names in wanted.items() if not set(names) & set(found)]
    if lacking:
        raise CorpusError(f"{path}: lacks a column of {', '.join(lacking)}; found are {', '.join(found) or 'none'}")


def _read_pairs(path):
    """Return the lines of a Kaldi file: {first word: (the rest, what is wrong with its encoding)}."""
    pairs = {}
    for line, fault in read_lines(path):
        if line.strip():
            name, _, rest = line.strip().partition(" ") if " " in line.strip() else line.strip().partition("\t")
            pairs[name] = rest.strip(), fault
    return pairs


def _list_files(folder):
    return ", ".join(sorted(path.name for path in folder.iterdir())[:20])
