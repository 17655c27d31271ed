"""Where stød is in recordings: windows from hand marks (TSV, Praat TextGrid) or from a forced alignment of the text."""

import io
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import parselmouth
import torch
from parselmouth.praat import call
from torchaudio.functional import forced_align, merge_tokens

from csm_nb.audio import SAMPLE_RATE, read_audio, resample
from csm_nb.clean import EncodingError, compose, read_text
from csm_nb.manifest import SUFFIXES
from csm_nb.text.normalise import character_error_rates, normalise_text
from csm_nb.text.numbers import spell_numbers

COLUMNS = ("audio", "start", "end", "stod")
TIER = "stod"  # of a TextGrid
WITH, WITHOUT = {"1", "stød", "stod", "ˀ"}, {"0", "no", "-"}
VOWELS, SONORANTS = "aeiouyæøåäöáàâéèêëíîïóòôúùûüý", "lmnrvjgd"  # letters; v, j, g and d stand for sonorants after a Danish vowel
LEAST_WINDOW = 0.08  # s; in less there are no two phases
# Character error rate of what the recogniser writes for a clip; above it its times are not used. Up to it the windows of words in
# noise overlap those of the same words without by .70 to .76, from .65 on by .55 (espeak-ng in white noise, asr-mini).
WORST_CER = 0.5
LEAST_SCORE = 0.01  # geometric mean of the aligned letters' probabilities; below it the recogniser hears something else


class MarksError(ValueError):
    """Marks that can not be read; names the file, the line, and what is allowed."""


def read_marks(path) -> dict[str, list]:
    """Return {audio file without its suffix: [[start, end, stød or not], ...]} in seconds.

    `path` is a TSV with the columns audio, start, end, stod (1 or 0), or a folder of TextGrids named after their audio,
    with an interval tier "stod" whose labels are 1 or stød, 0 or no, or empty. A window that is given twice counts once.
    An audio file is named by as much of its path as is needed, "001" or "anna/001" (match_marks). Raises MarksError.
    """
    path = Path(path)
    if path.is_dir():
        grids = sorted(path.rglob("*.TextGrid"))
        if not grids:
            raise MarksError(f"{path}: no .TextGrid in it; allowed are a TSV or a folder of TextGrids")
        stems = Counter(grid.stem for grid in grids)  # their folder need not be that of the audio where it is not needed
        names = [grid.name if stems[grid.stem] == 1 else grid.relative_to(path) for grid in grids]
        return {_name_audio(name): _read_textgrid(grid) for name, grid in zip(names, grids, strict=True)}
    if not path.is_file():
        raise MarksError(f"{path}: no such file; marks are a TSV with {', '.join(COLUMNS)}, or a folder of TextGrids")
    try:
        table = pd.read_csv(io.StringIO(read_text(path)), sep="\t", dtype=str, keep_default_na=False)
    except EncodingError as error:
        raise MarksError(str(error)) from error
    except ValueError as error:  # nothing in it, or lines of unequal length
        raise MarksError(f"{path}: {error}; marks are a TSV with the columns {', '.join(COLUMNS)}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise MarksError(f"{path}: found the columns {', '.join(table.columns)}; {', '.join(missing)} missing")
    marks, lines = {}, {}
    for line, row in enumerate(table.itertuples(), 2):
        try:
            window = [float(row.start), float(row.end), _read_label(row.stod)]
        except ValueError as error:
            raise MarksError(f"{path}, line {line}: {error}; allowed are seconds, and 1 or 0 for stød") from error
        if not 0 <= window[0] < window[1] or window[2] is None:
            raise MarksError(f"{path}, line {line}: start {row.start}, end {row.end}, stod {row.stod!r}; allowed are "
                             "0 <= start < end in seconds, and 1 or 0 for stød")
        name = _name_audio(row.audio)
        first, stod = lines.setdefault((name, *window[:2]), (line, window[2]))
        if stod != window[2]:
            raise MarksError(f"{path}, lines {first} and {line}: {row.audio} from {row.start} to {row.end} s is marked as with "
                             "and as without stød; leave one of the two")
        if first == line:
            marks.setdefault(name, []).append(window)
    return marks


def _name_audio(path) -> str:
    """Return what marks call a file: its path with slashes, composed Unicode, without the suffix of audio or TextGrid."""
    path = compose(str(path)).replace("\\", "/").strip().lstrip("/")
    stem, dot, suffix = path.rpartition(".")
    named = stem if dot and f".{suffix.lower()}" in (*SUFFIXES, ".textgrid") else path
    return "/".join(part for part in named.split("/") if part not in ("", "."))


def match_marks(rows, marks: dict) -> tuple[dict[str, str], set[str]]:
    """Return ({audio_path: the name in `marks` (read_marks) that is meant}, names that fit several files).

    A name fits a file whose path ends in it; of several that fit one file the longest is meant.
    """
    found = {}
    for path in dict.fromkeys(row["audio_path"] for row in rows):
        parts = _name_audio(path).split("/")
        names = ("/".join(parts[start:]) for start in range(len(parts)))
        if name := next((name for name in names if name in marks), None):
            found[path] = name
    return found, {name for name, count in Counter(found.values()).items() if count > 1}


def _read_label(label):
    """Return True, False, or None for an empty label."""
    label = label.strip().lower()
    if label and label not in WITH | WITHOUT:
        raise ValueError(f"label {label!r}")
    return label in WITH if label else None


def _read_textgrid(path):
    try:
        grid = parselmouth.read(str(path))
        tiers = [call(grid, "Get tier name", number + 1) for number in range(int(call(grid, "Get number of tiers")))]
        if TIER not in tiers:
            raise MarksError(f"{path}: found the tiers {', '.join(tiers)}; the one of the marks is named {TIER!r}")
        tier, windows = tiers.index(TIER) + 1, []
        for number in range(1, int(call(grid, "Get number of intervals", tier)) + 1):
            stod = _read_label(call(grid, "Get label of interval", tier, number))
            if stod is not None:
                edges = [call(grid, f"Get {edge} point", tier, number) for edge in ("starting", "end")]
                windows.append([*edges, stod])
        return windows
    except MarksError:
        raise
    except (parselmouth.PraatError, ValueError) as error:
        allowed = "an interval tier with the labels 1 or stød, 0 or no, or none"
        raise MarksError(f"{path}: {str(error).splitlines()[0]}; allowed is {allowed}") from error


def find_windows(rows, marks: dict | None = None, asr=None, among=None) -> tuple[list[dict], list[dict]]:
    """Return (rows with `windows` [[start, end, stød or not], ...], rows set aside with the `reason`).

    A row that has windows keeps them; else its `marks` are taken (read_marks); else, where the manifest says of its last
    word whether it has stød (`stod`: 1 or 0), the rhyme that the recogniser `asr` (CTC) aligns to it (align_rhyme). A file
    that comes twice counts once, and so does a window. `among` are all rows that a name in the marks may mean, where `rows`
    are some of them.
    """
    found, set_aside, seen = [], [], set()
    named, ambiguous = match_marks(among or rows, marks or {})
    for row in rows:
        path = row["audio_path"]
        windows, reason = row.get("windows"), "no marks, and no label of stød"
        if path in seen:
            windows, reason = None, "the same file as a clip before"
        elif not windows and named.get(path) in ambiguous:
            reason = f"the marks of {named[path]!r} fit several files; name it with its folder, as in anna/001.wav"
        elif not windows and path in named:
            windows = marks[named[path]]
            reason = "its marks hold no window"
        elif not windows and row.get("stod") is not None:
            window, reason = None, "no CTC recogniser"
            if asr:
                window, reason = align_rhyme(asr, read_audio(path), row["text"], row["language"])
            windows = [[*window, bool(row["stod"])]] if window else None
        windows = [list(window) for window in dict.fromkeys(tuple(window) for window in windows or ())]
        fault = _find_fault(windows, row.get("duration"))
        if windows and not fault:
            found.append(row | {"windows": windows})
            seen.add(path)
        else:
            set_aside.append(row | {"reason": fault or reason})
    return found, set_aside


def _find_fault(windows, duration):
    """Return what speaks against windows of a clip of so many seconds (None: not known), "" if nothing does."""
    for start, end, _ in windows:
        if duration and end > duration + LEAST_WINDOW:
            return f"marked up to {end:g} s, and it is {duration:g} s long"
        if len({bool(stod) for first, last, stod in windows if (first, last) == (start, end)}) > 1:
            return f"marked as with and as without stød from {start:g} to {end:g} s"
    return ""


def align_text(asr, wav, text: str) -> tuple[list[tuple[float, float, float] | None], str]:
    """Return (spans, transcript): where each letter of `text` is in a clip (24 kHz), and what the recogniser writes itself.

    By torchaudio's forced alignment: (start and end in s, probability) for each character of normalise_text(text), None
    for one that the recogniser does not have, so that a span belongs to the letter at its place. Letters are looked for as
    they are, in capitals, and without their accent. `asr` is a pipeline (judges.load_asr) around a CTC model, with a
    language model or without, which gives no times. Raises ValueError for another, for a text that is too long for the
    clip, and for one of which no letter is known.
    """
    scores = score_frames(asr, wav)
    step = len(wav) / SAMPLE_RATE / len(scores)
    placed = [span and (span[0] * step, span[1] * step, span[2]) for span in place_letters(asr, scores, normalise_text(text))]
    return placed, asr.tokenizer.decode(scores.argmax(-1).tolist())


def score_frames(asr, wav) -> torch.Tensor:
    """Return the log probabilities (frames, tokens) that a CTC recogniser gives a clip (24 kHz); ValueError for another model."""
    if asr.type not in ("ctc", "ctc_with_lm"):
        raise ValueError(f"a {asr.model.config.model_type} model gives no times; align_model has to be a CTC recogniser")
    extractor = asr.feature_extractor
    samples = resample(wav, SAMPLE_RATE, extractor.sampling_rate)
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(asr.device)
    with torch.inference_mode():
        return asr.model(**inputs).logits[0].float().log_softmax(-1).cpu()


def place_letters(asr, scores: torch.Tensor, letters: str) -> list[tuple[int, int, float] | None]:
    """Return (first frame, frame after the last, probability) of each letter (align_text) by the frames' scores.

    By torchaudio's forced alignment, which takes a byte per frame and letter twice. Raises ValueError where no letter is known,
    or there are too many.
    """
    blank, found = asr.tokenizer.pad_token_id, _find_tokens(asr.tokenizer, letters, scores.shape[-1])
    tokens = [token for token in found if token is not None]
    if not tokens:
        raise ValueError(f"the recogniser has no letter of {letters!r:.80}")
    try:
        path, score = forced_align(scores[None], torch.tensor([tokens], dtype=torch.int32), blank=blank)
    except RuntimeError as error:
        raise ValueError(f"{len(tokens)} letters do not fit {len(scores)} frames of the recogniser") from error
    spans = iter(merge_tokens(path[0], score[0].exp(), blank=blank))
    placed = [None if token is None else next(spans) for token in found]
    return [span and (span.start, span.end, span.score) for span in placed]


def _find_tokens(tokenizer, text, size):
    """Return the token of each character, None where none of the `size` scored ones is it; a blank is no letter."""
    known = {token: number for token, number in tokenizer.get_vocab().items() if number < size}
    for special in tokenizer.all_special_tokens:
        known.pop(special, None)
    delimiter = getattr(tokenizer, "word_delimiter_token", None) or " "
    known[" "] = tokenizer.get_vocab().get(delimiter)

    def find(letter):
        bare = unicodedata.normalize("NFD", letter)[0]
        return next((known[form] for form in (letter, letter.upper(), bare, bare.upper()) if form in known), None)

    return [find(letter) for letter in text]


def align_rhyme(asr, wav, text: str, language: str) -> tuple[tuple[float, float] | None, str]:
    """Return ((start, end) of the last word's loudest sonorant rhyme in s, "") or (None, why there is none).

    A rhyme is a vowel and the sonorants behind it, up to the next letter or the end of the sound. Silence at both ends
    is cut off before, since a recogniser that is not sure puts letters there. What the recogniser writes for the clip
    must have a character error rate of WORST_CER at most.
    """
    text = spell_numbers(text, language)  # a figure has no letters
    words = normalise_text(text).split()
    if not words:
        return None, "no text to align"
    loud = np.flatnonzero(np.abs(wav) > 0.1 * np.abs(wav).max())
    offset, end_of_sound = float(loud[0] / SAMPLE_RATE), float(loud[-1] / SAMPLE_RATE)
    try:
        spans, heard = align_text(asr, wav[loud[0] : loud[-1] + 1], text)
    except ValueError as error:
        return None, str(error)
    cer = float(character_error_rates([text], [heard], language)[0])
    if cer > WORST_CER:
        return None, f"the recogniser hears {heard!r} for {text!r}: CER {cer:.0%}, at most {WORST_CER:.0%} is allowed"
    word, spans = words[-1], spans[-len(words[-1]) :]
    known = [number for number, span in enumerate(spans) if span]
    if not known:
        return None, f"the recogniser has no letter of {word!r}"
    score = float(np.exp(np.mean([np.log(max(spans[number][2], 1e-9)) for number in known])))
    if score < LEAST_SCORE:
        return None, f"the recogniser does not hear {word!r}: {score:.1%} per letter, {LEAST_SCORE:.0%} is needed"
    rhymes = []
    for match in re.finditer(f"[{VOWELS}]+[{SONORANTS}]*", word):
        inside = [number for number in known if match.start() <= number < match.end()]
        after = [number for number in known if number >= match.end()]
        if not inside:
            continue
        start = offset + spans[inside[0]][0]
        end = offset + spans[after[0]][0] if after else end_of_sound
        if end - start >= LEAST_WINDOW:
            part = wav[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
            rhymes.append((float(np.sqrt(np.mean(part**2))), start, end))
    if not rhymes:
        return None, f"no rhyme of {LEAST_WINDOW:g} s and more in {word!r}"
    return max(rhymes)[1:], ""
