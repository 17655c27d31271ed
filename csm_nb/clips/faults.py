"""What is wrong with one clip: a kind, in a word or two, and a sentence with what was found and what is allowed."""

import numpy as np

from csm_nb.audio import SAMPLE_RATE
from csm_nb.languages import LANGUAGES
from csm_nb.text.common import LEAST_WORDS, find_language
from csm_nb.text.letters import count_fewest, count_letters, list_foreign

SILENCE = 1e-3  # peak below which a clip counts as silent (-60 dBFS)
# A clip is clipped where more of its samples than the first lie at its peak, which is half of full scale and more. Beyond the
# second it is left out: speech, whose samples are about Laplacian, has lost its peaks from 6 dB above its level on.
CLIPPING, CLIPPED_SHARE, CLIPPED_BOUND = 0.5, 0.005, 0.05
# Letters per second, read out. Speech in 17 languages has 4 to 9 syllables per second (Coupe et al. 2019, Science Advances 5,
# eaaw2594) of two to three letters; the bounds leave room for the slowest and fastest reader. Pauses are allowed on top.
SLOWEST, FASTEST, PAUSES = 3, 30, 2.0
FOREIGN_SHARE = 0.5  # of the letters: a text is foreign that is mostly so, not one with a name in it
# Cut short: the first or last 20 ms, and their outer 10 ms too, are as loud as half of the speech is (the median of what is
# within 20 dB of the loudest 20 ms). It can be told only where some 20 ms are 20 dB weaker: of a tone, or in noise, it can not.
# Of 2000 clips by espeak-ng none is taken for cut, of 739 recordings, most of single words, 6 of one source that is trimmed
# tight; of clips cut at random two in five are found by their start.
EDGE, ACTIVE, CONTRAST = 0.02, 20, 20  # s, dB, dB
# Band-limited: the share of a clip's energy from a fifth above a limit on, and the fall of its spectrum across the limit. Not
# one of 704 recordings at 44.1 and 48 kHz and of 2000 clips by espeak-ng has less than both; of the same, brought up from 8
# and 16 kHz, all have by soxr, and by torchaudio's gentler filter 97 % (from 8 kHz) and two thirds (from 16 kHz).
LIMITS, FALL = {4000: -45, 8000: -62}, -34  # Hz: dB, dB
_WINDOW, _SPECTRA = 1024, 32  # samples; how many stretches of a clip its spectrum is the mean of: enough, and quick


def find_text_fault(row) -> tuple[str, str] | None:
    """Return (kind, reason) of what makes a row's text unfit to learn from: none, another script, another language."""
    text, language = row["text"], row["language"]
    if not any(map(str.isalnum, text)):
        return "no text", f"nothing to say in its text {text!r}" if text.strip() else "no text"
    if language not in LANGUAGES:
        return None
    foreign, letters = list_foreign(text, language), sum(map(str.isalpha, text))
    if len(foreign) > FOREIGN_SHARE * letters:
        return "foreign letters", (f"{len(foreign)} of the {letters} letters of its text are foreign to {language!r} "
                                   f"({' '.join(dict.fromkeys(foreign[:5]))}); at most {FOREIGN_SHARE:.0%} are allowed")
    other, words = find_language(text, language)
    if other:
        return "other language", (f"its text is in {other!r} rather than {language!r}, by words that are common in that alone "
                                  f"({', '.join(words[:5])}); fewer than {LEAST_WORDS} are allowed")
    return None


def find_pace_fault(row, seconds: float) -> tuple[str, str] | None:
    """Return (kind, reason) where nobody reads the text of a row in `seconds`: it is not all of what is said, or more."""
    if row["language"] not in LANGUAGES:
        return None
    fewest, most = count_fewest(row["text"], row["language"]), count_letters(row["text"])
    if fewest > FASTEST * seconds:
        return "pace", f"{fewest} letters in {seconds:.2f} s: {fewest / seconds:.1f} per second; at most {FASTEST} are allowed"
    if most < SLOWEST * (seconds - PAUSES):
        return "pace", (f"{most} letters in {seconds:.2f} s: {most / seconds:.1f} per second; at least {SLOWEST} are allowed, "
                        f"and {PAUSES:g} s of pauses")
    return None


def find_level_fault(wav, min_seconds: float, max_seconds: float) -> tuple[str, str] | None:
    """Return (kind, reason) where samples are silent, or fewer or more than allowed: no use for anything."""
    if np.abs(wav).max() < SILENCE:
        return "silent", f"silent (its peak is {np.abs(wav).max():.5f}; at least {SILENCE:g} is speech)"
    return find_length_fault(len(wav) / SAMPLE_RATE, min_seconds, max_seconds)


def find_length_fault(seconds: float, min_seconds: float, max_seconds: float) -> tuple[str, str] | None:
    """Return (kind, reason) where a clip is shorter or longer than allowed."""
    if not min_seconds <= seconds <= max_seconds:
        return "too short" if seconds < min_seconds else "too long", (
            f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s")
    return None


def find_sound_fault(wav) -> tuple[str, str] | None:
    """Return (kind, reason) where speech begins or ends amid a sound, or is clipped so much that one hears it."""
    share = _measure_clipping(wav)
    if share > CLIPPED_BOUND:
        return "clipped", f"clipped: {share:.1%} of its samples at full scale; at most {CLIPPED_BOUND:.0%} are allowed"
    frame = int(EDGE * SAMPLE_RATE)
    if len(wav) < frame:
        return None
    levels = _measure_levels(wav[: len(wav) // frame * frame].reshape(-1, frame))
    speech = np.median(levels[levels > levels.max() - ACTIVE])
    if levels.min() > speech - CONTRAST:
        return None
    for where, samples in (("begins", wav[:frame]), ("ends", wav[: -frame - 1 : -1])):
        edge = _measure_levels(np.stack([samples, np.resize(samples[: frame // 2], frame)])).min() - speech
        if edge >= 0:
            return "cut short", (f"{where} amid speech: its {'first' if where == 'begins' else 'last'} {1000 * EDGE:g} ms are "
                                 f"{edge:.1f} dB above its speech level; allowed is below it")
    return None


def find_flaws(wav, sample_rate: int, channels: int) -> dict[str, str]:
    """Return {kind: remark} of what is odd about a clip and leaves it of use: band, channels, some clipping.

    `wav` is at 24 kHz; `sample_rate` (Hz) and `channels` are those of its file.
    """
    flaws, share = {}, _measure_clipping(wav)
    if sample_rate <= 2 * max(LIMITS):
        flaws["band-limited"] = f"{sample_rate} Hz: nothing above {sample_rate / 2000:g} kHz"
    elif limit := _find_limit(wav):
        flaws["band-limited"] = f"{limit[1]:.4%} of its energy lies above {limit[0] / 1000:g} kHz, in a file of {sample_rate} Hz"
    if channels > 1:
        flaws["channels"] = f"{channels} channels, averaged"
    if share > CLIPPED_SHARE:
        flaws["clipped"] = f"clipped: {share:.1%} of its samples at full scale"
    return flaws


def _measure_clipping(wav):
    level = np.abs(wav)
    return np.mean(level >= 0.99 * max(level.max(), CLIPPING))


def _measure_levels(frames):
    """Return the level of each row in dB of full scale."""
    return 10 * np.log10(np.mean(frames**2, axis=-1) + 1e-12)


def _find_limit(wav):
    """Return (Hz, share of the energy above it) where the spectrum ends at half the sample rate of a narrower source."""
    if len(wav) < _WINDOW:
        return None
    starts = np.linspace(0, len(wav) - _WINDOW, min(_SPECTRA, len(wav) // _WINDOW)).astype(int)
    frames = wav[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW).astype(np.float32)
    power = np.mean(np.abs(np.fft.rfft(frames)) ** 2, axis=0) + 1e-20
    hertz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    for limit, most in LIMITS.items():
        above = power[hertz > 1.2 * limit]
        share, fall = above.sum() / power.sum(), above[hertz[hertz > 1.2 * limit] < 1.45 * limit].mean() / power[
            (hertz > 0.5 * limit) & (hertz < 0.9 * limit)].mean()
        if 10 * np.log10(share) < most and 10 * np.log10(fall) < FALL:
            return limit, share
    return None
