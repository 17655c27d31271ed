"""Which clips are trained on, and as what: checked, and by choice labelled, compared with what is heard, rated, levelled."""

import importlib
from functools import lru_cache

import numpy as np
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio, resample
from csm_nb.clean import clean_text
from csm_nb.clips.check import check_clips
from csm_nb.clips.level import level_clips
from csm_nb.judge.confidence import measure_confidence
from csm_nb.judge.judges import transcribe
from csm_nb.manifest import CorpusError
from csm_nb.text.normalise import character_error_rates
from csm_nb.text.spoken import read_rows

AT_ONCE = 64  # clips in memory
LONGEST = 30.0  # s that a text is heard for: what check.check_clips allows, and a Whisper takes at once
DNSMOS_RATE = 16_000  # Hz


def choose_clips(rows, settings: dict, load_asr, keep=None) -> tuple[list, list]:
    """Return (good, set_aside) of rows, cleaned as the parameters of a stage say (03_adapter); without any, only checked.

    In this order: clips without a text are labelled (`pseudo_labels`), texts read out (`read_out`), all is checked
    (check.check_clips, with `margin` and `keep_repeats`), compared with what is heard (`max_cer`), rated (`min_dnsmos`), cut and
    levelled (`margin`, `loudness`). `load_asr(language)` returns the recogniser of a row's language, and is called only where one
    is asked for. Raises CorpusError where nothing is left.
    """
    want = {name: settings.get(name, 0) for name in ("pseudo_labels", "max_cer", "min_dnsmos", "margin", "loudness")}
    load, unlabelled = lru_cache(1)(lambda code: load_asr(code)), []  # one in memory
    if want["pseudo_labels"]:
        rows, unlabelled = _each_language(rows, lambda some, code: label_clips(some, load(code), want["pseudo_labels"], keep))
    rows = read_rows(rows) if settings.get("read_out") else rows
    good, set_aside = check_clips(rows, keep_repeats=settings.get("keep_repeats", True), margin=want["margin"])
    set_aside = unlabelled + set_aside
    if want["max_cer"]:
        good, other = _each_language(good, lambda some, code: compare_texts(some, load(code), code, want["max_cer"], keep))
        set_aside += other
    if want["min_dnsmos"]:
        good, other = rate_clips(good, want["min_dnsmos"])
        set_aside += other
    if not good:
        raise CorpusError(f"of {len(set_aside)} clips none is left: {set_aside[-1]['reason']} (and so on); ask for less")
    return level_clips(good, want["loudness"]), set_aside


def _each_language(rows, part):
    """Return (good, set_aside) of `part(rows, language)` of each language's rows, one language after the other."""
    parted = [part([row for row in rows if row["language"] == code], code)
              for code in dict.fromkeys(row["language"] for row in rows)]
    return tuple([row for one in parted for row in one[side]] for side in (0, 1))


def label_clips(rows, asr, least: float, keep=None) -> tuple[list, list]:
    """Return (rows, set_aside): each row without a text has the one that the recogniser writes, where it is sure enough.

    Its `pseudo` is the recogniser's confidence (judge.confidence), at least `least`; where that is less, or nothing was heard,
    the row is set aside as "no text" with what was heard. Rows that can not be read stay as they are, for check_clips.
    """
    bare = [number for number, row in enumerate(rows)
            if not any(map(str.isalnum, row["text"])) and not row.get("text_fault") and _is_short(row)]
    labelled, set_aside = dict(enumerate(rows)), []
    for numbers, wavs in _read_some(rows, bare):
        heard = [clean_text(text) for text in transcribe(asr, wavs, keep=keep)]
        for number, text, sure in zip(numbers, heard, measure_confidence(asr, wavs, heard), strict=True):
            if any(map(str.isalnum, text)) and sure >= least:
                labelled[number] = rows[number] | {"text": text, "pseudo": round(float(sure), 3)}
            else:
                reason = f"no text, and of what was heard, {text!r:.60}, the recogniser is sure by {sure:.2f}; at least {least:g}"
                set_aside.append(labelled.pop(number) | {"kind": "no text", "reason": f"{reason} is asked for"})
    return list(labelled.values()), set_aside


def compare_texts(rows, asr, language: str, most: float, keep=None) -> tuple[list, list]:
    """Return (good, set_aside): a row is set aside as "other words" where the recogniser's CER against its text is over `most`.

    Its `cer` stays with a good row. A text that the recogniser wrote itself (`pseudo`) is not compared.
    """
    rates, heard = {}, {}
    for numbers, wavs in _read_some(rows, [number for number, row in enumerate(rows) if "pseudo" not in row]):
        texts = transcribe(asr, wavs, keep=keep)
        heard |= dict(zip(numbers, texts, strict=True))
        rates |= dict(zip(numbers, character_error_rates([rows[number]["text"] for number in numbers], texts, language),
                          strict=True))

    def explain(number):
        return f"heard as {heard[number]!r:.60}: a character error rate of {rates[number]:.0%}; at most {most:.0%} is allowed"

    return _part(rows, rates, lambda rate: rate <= most, "cer", "other words", explain)


def rate_clips(rows, least: float) -> tuple[list, list]:
    """Return (good, set_aside): a row is set aside as "low quality" where its DNSMOS is under `least`; a good one keeps it.

    It is the overall score, 1 to 5, of DNSMOS P.835 (Reddy et al. 2022) by the package speechmos, which holds its weights. It
    was trained on noisy English and hears 16 kHz: clips of a narrow band lose by it. Raises ImportError without the package.
    """
    dnsmos = importlib.import_module("speechmos.dnsmos")  # with onnxruntime: only where it is asked for
    scores = {}
    for numbers, wavs in _read_some(rows, range(len(rows))):
        for number, wav in zip(numbers, wavs, strict=True):
            wav = np.clip(resample(wav, SAMPLE_RATE, DNSMOS_RATE), -1, 1)
            scores[number] = float(dnsmos.run(wav, DNSMOS_RATE)["ovrl_mos"])
    return _part(rows, scores, lambda score: score >= least, "dnsmos", "low quality",
                 lambda number: f"its DNSMOS is {scores[number]:.2f}; at least {least:g} is asked for")


def _is_short(row):
    try:
        return soundfile.info(row["audio_path"]).duration <= LONGEST
    except (soundfile.SoundFileError, OSError):
        return False


def _read_some(rows, numbers):
    """Yield (numbers, clips at 24 kHz) so many at a time; one that can not be read is left out."""
    numbers = list(numbers)
    for first in range(0, len(numbers), AT_ONCE):
        read = {}
        for number in numbers[first : first + AT_ONCE]:
            try:
                wav = read_audio(rows[number]["audio_path"])
            except AudioError:
                continue
            start, end = rows[number].get("kept") or (0, len(wav) / SAMPLE_RATE)
            read[number] = wav[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        yield list(read), list(read.values())


def _part(rows, figures, passes, name, kind, explain):
    """Return (good, set_aside) of rows by a figure of each, which stays with the good ones; one without a figure is good."""
    good, set_aside = [], []
    for number, row in enumerate(rows):
        if number not in figures:
            good.append(row)
        elif passes(figures[number]):
            good.append(row | {name: round(float(figures[number]), 3)})
        else:
            set_aside.append(row | {"kind": kind, "reason": explain(number)})
    return good, set_aside
