"""Where stød is in recordings: windows from hand marks (TSV, Praat TextGrid) or from a forced alignment of the text."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import parselmouth
import torch
from parselmouth.praat import call
from torchaudio.functional import forced_align, merge_tokens

from csm_nb.audio import SAMPLE_RATE, read_audio, resample
from csm_nb.judge import normalise_text

COLUMNS = ("audio", "start", "end", "stod")
TIER = "stod"  # of a TextGrid
WITH, WITHOUT = {"1", "stød", "stod", "ˀ"}, {"0", "no", "-"}
VOWELS, SONORANTS = "aeiouyæøåäöéó", "lmnrvjgd"  # letters; v, j, g and d stand for sonorants after a Danish vowel
LEAST_WINDOW = 0.08  # s; in less there are no two phases
LEAST_SCORE = 0.01  # geometric mean of the aligned letters' probabilities; below it the recogniser hears something else


class MarksError(ValueError):
    """Marks that can not be read; names the file, the line, and what is allowed."""


def read_marks(path) -> dict[str, list]:
    """Returns {name of the audio file without suffix: [[start, end, stød or not], ...]} in seconds.

    `path` is a TSV with the columns audio, start, end, stod (1 or 0), or a folder of TextGrids named after their audio,
    with an interval tier "stod" whose labels are 1 or stød, 0 or no, or empty. Raises MarksError.
    """
    path = Path(path)
    if path.is_dir():
        grids = sorted(path.rglob("*.TextGrid"))
        if not grids:
            raise MarksError(f"{path}: no .TextGrid in it; allowed are a TSV or a folder of TextGrids")
        return {grid.stem: _read_textgrid(grid) for grid in grids}
    if not path.is_file():
        raise MarksError(f"{path}: no such file; marks are a TSV with {', '.join(COLUMNS)}, or a folder of TextGrids")
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if missing := [name for name in COLUMNS if name not in table]:
        raise MarksError(f"{path}: found the columns {', '.join(table.columns)}; {', '.join(missing)} missing")
    marks = {}
    for line, row in enumerate(table.itertuples(), 2):
        try:
            window = [float(row.start), float(row.end), _read_label(row.stod)]
        except ValueError as error:
            raise MarksError(f"{path}, line {line}: {error}; allowed are seconds, and 1 or 0 for stød") from error
        if not 0 <= window[0] < window[1] or window[2] is None:
            raise MarksError(f"{path}, line {line}: start {row.start}, end {row.end}, stod {row.stod!r}; allowed are "
                             "0 <= start < end in seconds, and 1 or 0 for stød")
        marks.setdefault(Path(row.audio).stem, []).append(window)
    return marks


def _read_label(label):
    """True, False, or None for an empty label."""
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


def find_windows(rows, marks: dict | None = None, asr=None) -> tuple[list[dict], list[dict]]:
    """Returns (rows with `windows` [[start, end, stød or not], ...], rows set aside with the `reason`).

    A row that has windows keeps them; else its `marks` are taken (read_marks); else, where the manifest says of its last
    word whether it has stød (`stod`: 1 or 0), the rhyme that the recogniser `asr` (CTC) aligns to it (align_rhyme).
    """
    found, set_aside = [], []
    for row in rows:
        windows, reason = row.get("windows") or (marks or {}).get(Path(row["audio_path"]).stem), "no marks, and no label of stød"
        if not windows and row.get("stod") is not None:
            window, reason = align_rhyme(asr, read_audio(row["audio_path"]), row["text"]) if asr else (None, "no CTC recogniser")
            windows = [[*window, bool(row["stod"])]] if window else None
        found.append(row | {"windows": windows}) if windows else set_aside.append(row | {"reason": reason})
    return found, set_aside


def align_text(asr, wav, text: str) -> list[tuple[str, float, float, float]]:
    """Returns [(letter, start, end, probability), ...] of `text` in a clip (24 kHz), by torchaudio's forced alignment.

    `asr` is a pipeline (judge.load_asr) around a CTC model. Raises ValueError for another, and for a text that is too
    long for the clip.
    """
    if asr.type not in ("ctc", "ctc_with_lm"):
        raise ValueError(f"a {asr.model.config.model_type} model gives no times; align_model has to be a CTC recogniser")
    extractor, tokenizer = asr.feature_extractor, asr.tokenizer
    samples = resample(wav, SAMPLE_RATE, extractor.sampling_rate)
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(asr.device)
    with torch.inference_mode():
        scores = asr.model(**inputs).logits.float().log_softmax(-1).cpu()
    tokens = tokenizer(normalise_text(text)).input_ids
    try:
        path, score = forced_align(scores, torch.tensor([tokens], dtype=torch.int32), blank=tokenizer.pad_token_id)
    except RuntimeError as error:
        raise ValueError(f"{len(tokens)} letters do not fit {scores.shape[1]} frames of the recogniser") from error
    step = len(wav) / SAMPLE_RATE / scores.shape[1]
    spans = merge_tokens(path[0], score[0].exp(), blank=tokenizer.pad_token_id)
    return [(tokenizer.convert_ids_to_tokens(span.token), span.start * step, span.end * step, span.score) for span in spans]


def align_rhyme(asr, wav, text: str) -> tuple[tuple[float, float] | None, str]:
    """Returns ((start, end) of the last word's loudest sonorant rhyme in s, "") or (None, why there is none).

    A rhyme is a vowel and the sonorants behind it, up to the next letter or the end of the sound. Silence at both ends
    is cut off before, since a recogniser that is not sure puts letters there.
    """
    words = normalise_text(text).split()
    if not words:
        return None, "no text to align"
    loud = np.flatnonzero(np.abs(wav) > 0.1 * np.abs(wav).max())
    offset, end_of_sound = float(loud[0] / SAMPLE_RATE), float(loud[-1] / SAMPLE_RATE)
    try:
        letters = align_text(asr, wav[loud[0] : loud[-1] + 1], text)[-len(words[-1]) :]
    except ValueError as error:
        return None, str(error)
    score = float(np.exp(np.mean([np.log(max(p, 1e-9)) for *_, p in letters])))
    if score < LEAST_SCORE:
        return None, f"the recogniser does not hear the text: {score:.1%} for a letter, {LEAST_SCORE:.0%} is needed"
    word, rhymes = "".join(letter for letter, *_ in letters), []
    for match in re.finditer(f"[{VOWELS}]+[{SONORANTS}]*", word):
        start = offset + letters[match.start()][1]
        end = offset + letters[match.end()][1] if match.end() < len(letters) else end_of_sound
        if end - start >= LEAST_WINDOW:
            part = wav[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
            rhymes.append((float(np.sqrt(np.mean(part**2))), start, end))
    if not rhymes:
        return None, f"no rhyme of {LEAST_WINDOW:g} s and more in {words[-1]!r}"
    return max(rhymes)[1:], ""
