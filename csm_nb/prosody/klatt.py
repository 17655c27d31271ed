"""Ground truth on demand: words by Praat's KlattGrid with stød or tonal accent in them by construction."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
from parselmouth.praat import call

from csm_nb.audio import SAMPLE_RATE, resample, write_audio
from csm_nb.manifest import write_manifest

SOURCE = "KlattGrid (synthetic)"
SPEAKERS = (("m", 95.0), ("m", 125.0), ("f", 185.0), ("f", 230.0))  # sex and median F0 in Hz
RATES = (0.75, 1.0, 1.25)  # of STOD_SECONDS
# 80 words with accent: with fewer than 73, all of them right, Wilson's 95 % interval does not reach the .95 that is wanted.
ACCENT_SPEAKERS = (*SPEAKERS, ("m", 80.0), ("m", 110.0), ("f", 165.0), ("f", 205.0))
ACCENT_RATES = (0.75, 0.875, 1.0, 1.125, 1.25)  # of ACCENT_SECONDS
CUES = ("F0 dip", "intensity dip", "double pulsing")  # what stød is heard by; no speaker uses all of them always
STOD_SECONDS, ACCENT_SECONDS, EDGE = 0.55, 0.75, 0.06
SEMITONES_OF_A_DIP, DECIBELS_OF_A_DIP, SHARE_OF_DOUBLE_PULSING = 7.0, 14.0, 0.6
# Turning points (share of the word, semitones about the speaker's median). Stockholm, in focus: accent 1 (L*)H, accent 2
# H*LH with two peaks (Bruce 1977); East Norwegian: accent 1 L* and a rise to the end, accent 2 H*L and that rise.
CONTOURS = {
    "sv": {1: ((0, 1), (0.15, 0), (0.5, 7), (1, -2)), 2: ((0, 3), (0.12, 5), (0.42, -2), (0.74, 6), (1, -2))},
    "no": {1: ((0, 1), (0.2, -3), (0.85, 6), (1, 6)), 2: ((0, 3), (0.15, 5), (0.52, -4), (0.9, 6), (1, 6))},
}


def make_stod_word(sex: str, f0: float, seconds: float = STOD_SECONDS, cues=CUES) -> tuple[np.ndarray, tuple[float, float]]:
    """Return (wav at 24 kHz, (start, end) of its sonorant rhyme in s): one syllable like [an], with `cues` in its rhyme.

    The cues lie in the second phase of stød, 40 to 80 % of the rhyme; without any it is the same syllable without stød.
    Raises ValueError for a cue that is not among CUES.
    """
    if set(cues) - set(CUES):
        raise ValueError(f"unknown cues {sorted(set(cues) - set(CUES))}; allowed are {', '.join(CUES)}")
    start, end = EDGE, seconds - EDGE
    places = start + (end - start) * np.array([0.40, 0.52, 0.68, 0.82])
    tune = [(0, 0.0), (start + 0.3 * (end - start), 1.5), *((t, 0.5) for t in places[[0, -1]]), (seconds, -1.0)]
    loudness, pulsing = [(t, 0.0) for t in places], [(0, 0.0), (seconds, 0.0)]
    if "F0 dip" in cues:
        tune += [(t, -SEMITONES_OF_A_DIP) for t in places[1:3]]
    if "intensity dip" in cues:
        loudness[1:3] = [(t, -DECIBELS_OF_A_DIP) for t in places[1:3]]
    if "double pulsing" in cues:
        pulsing += [(places[0], 0.0), *((t, SHARE_OF_DOUBLE_PULSING) for t in places[1:3]), (places[3], 0.0)]
    return _synthesise(sex, f0, seconds, tune, loudness, pulsing, nasals=((0.88, 1.0),)), (start, end)


def make_accent_word(language: str, accent: int, sex: str, f0: float, seconds: float = ACCENT_SECONDS) -> np.ndarray:
    """Return a word like [anan] (float32, 24 kHz) with accent 1 or 2 of "sv" (Stockholm) or "no" (East Norwegian)."""
    tune = [(share * seconds, semitones) for share, semitones in CONTOURS[language][accent]]
    return _synthesise(sex, f0, seconds, tune, nasals=((0.38, 0.5), (0.85, 1.0)))


def _synthesise(sex, f0, seconds, tune, loudness=(), pulsing=(), nasals=()):
    grid = call("Create KlattGrid", "word", 0, seconds, 5, 0, 0, 0, 0, 0, 0)
    longer = 1.0 if sex == "m" else 1.16  # formants of a shorter vocal tract
    vowel, nasal = (700, 1200, 2500, 3500, 4500), (280, 1100, 2300, 3300, 4300)
    for number, (open_, closed, width) in enumerate(zip(vowel, nasal, (80, 90, 150, 220, 280), strict=True), 1):
        points = [(0.0, open_)]
        for start, end in nasals:
            points += [(start * seconds - 0.05, open_), (start * seconds, closed), (end * seconds - 0.05, closed)]
            points += [(end * seconds, open_)] if end < 1 else []
        for time, frequency in points:
            call(grid, "Add oral formant frequency point", number, time, frequency * longer)
        call(grid, "Add oral formant bandwidth point", number, 0.0, width)
    for time, semitones in tune:
        call(grid, "Add pitch point", float(time), f0 * 2 ** (semitones / 12))
    for time, level in ((0, -90), (0.03, 0), *loudness, (seconds - 0.05, 0), (seconds, -90)):
        call(grid, "Add voicing amplitude point", float(time), 90.0 + level)
    for time, share in pulsing:
        call(grid, "Add double pulsing point", float(time), float(share))
    sound = call(grid, "To Sound")
    wav = resample(sound.values[0].astype(np.float32), int(sound.sampling_frequency), SAMPLE_RATE)
    return wav * np.float32(0.1 / np.sqrt(np.mean(wav**2)))


def make_stod_corpus(out_dir) -> Path:
    """Speak the stød words, each cue alone and all together, and the same words without, and return their manifest.

    Each line has `stod` and `windows`, [[start, end, stød or not]] in seconds, and `cues`. By four speakers at three rates:
    48 with stød, 12 without.
    """
    sets = [(), *combinations(CUES, 1), CUES]
    words = [(*make_stod_word(sex, f0, rate * STOD_SECONDS, cues), cues, f0, rate)
             for (sex, f0), rate, cues in product(SPEAKERS, RATES, sets)]
    return _write_words(out_dir, [
        (wav, f"{f0:.0f} Hz", f"{' and '.join(cues) or 'no stød'}, {len(wav) / SAMPLE_RATE:.2f} s", "da",
         {"stod": int(bool(cues)), "windows": [[*window, bool(cues)]], "cues": list(cues), "rate": rate})
        for wav, window, cues, f0, rate in words
    ])


def make_accent_corpus(language: str, out_dir) -> Path:
    """Speak accent 1 and 2 of "sv" or "no" with eight speakers at five rates (80 words), and return their manifest.

    Each line has `accent` and `pair`, which two words with different accents and all else equal share.
    """
    words = [(make_accent_word(language, accent, sex, f0, rate * ACCENT_SECONDS), accent, f0, rate)
             for (sex, f0), rate, accent in product(ACCENT_SPEAKERS, ACCENT_RATES, (1, 2))]
    return _write_words(out_dir, [
        (wav, f"{f0:.0f} Hz", f"accent {accent}, {len(wav) / SAMPLE_RATE:.2f} s", language,
         {"accent": accent, "pair": f"{f0:.0f} Hz at {rate:g}"})
        for wav, accent, f0, rate in words
    ])


def _write_words(out_dir, words):
    rows, out_dir = [], Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for number, (wav, speaker, text, language, more) in enumerate(words):
        path = out_dir / f"{number:03d}.wav"
        write_audio(path, wav)
        rows.append({"text": text, "audio_path": str(path), "speaker_id": speaker, "language": language,
                     "duration": round(len(wav) / SAMPLE_RATE, 3), "source": SOURCE} | more)
    return write_manifest(rows, out_dir / "manifest.jsonl")
