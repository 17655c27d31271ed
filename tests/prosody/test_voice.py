"""Voice quality is what was put in: a dip as deep and where it is, periods as uneven, harmonics as clear as they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.prosody.f0 import TIME_STEP, F0Track, ProsodyError, find_pitch_range, track_f0
from csm_nb.prosody.quality import SILENCE, measure_cpp, measure_irregularity, measure_low_band, track_voice

SPEECH = Path(__file__).resolve().parents[3] / "shared" / "speech"
TIMES = np.arange(0.1, 0.9, TIME_STEP)
RANGE = (83.0, 167.0)  # about 111 Hz
TIME = np.arange(SAMPLE_RATE) / SAMPLE_RATE


def make_pulses(periods):
    """A second of pulses so many s apart, through the formants of a vowel, and the true irregularity of the periods."""
    pulses = 0.02 + np.cumsum(periods)
    pulses = pulses[pulses < 0.98]
    hertz = np.fft.rfftfreq(2 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    spectrum = np.exp(-2j * np.pi * np.outer(pulses, hertz)).sum(0) / (1 + hertz / 100) * np.exp(-((hertz / 9000) ** 8))
    spectrum[0] = 0
    for formant, width in ((600, 80), (1200, 90), (2500, 120), (3500, 150)):
        spectrum *= formant**2 / (formant**2 - hertz**2 + 1j * width * hertz)
    wav = np.fft.irfft(spectrum)[:SAMPLE_RATE]
    apart = np.diff(pulses)
    return 0.1 * wav / np.sqrt(np.mean(wav**2)), 2 * np.abs(np.diff(apart)) / (apart[1:] + apart[:-1])


def make_even(period: float = 0.009):
    return make_pulses(np.full(round(1 / period), period))[0]


def make_noise(level: float):
    return level * np.random.default_rng(0).normal(0, 1, SAMPLE_RATE)


# Low band


@pytest.mark.parametrize("depth", [6, 14])
def test_a_dip_is_as_deep_as_it_was_made_and_where_it_was_made(depth):
    inside = np.abs(TIME - 0.5) < 0.04
    wav = make_even() * 10 ** (-depth * np.convolve(inside, np.hanning(480) / np.hanning(480).sum(), "same") / 20)
    level = measure_low_band(wav, TIMES)
    assert np.median(level[:40]) - level.min() == pytest.approx(depth, abs=1)
    half = TIMES[level < np.median(level[:40]) - depth / 2]
    assert half.mean() == pytest.approx(0.5, abs=0.004) and np.ptp(half) == pytest.approx(0.08, abs=0.012)


def test_a_clip_played_backwards_has_its_levels_backwards():
    wav, _ = make_pulses(0.008 + 0.003 * np.sin(np.arange(120) / 9))
    wav = wav * (1 + np.sin(2 * np.pi * 7 * TIME)) ** 2
    assert measure_low_band(wav[::-1], TIME[-1] - TIMES) == pytest.approx(measure_low_band(wav, TIMES), abs=0.1)


def test_a_tone_has_its_level_within_the_band_and_hardly_any_outside():
    tone = lambda hertz: np.median(measure_low_band(0.5 * np.sin(2 * np.pi * hertz * TIME), TIMES))  # noqa: E731
    assert tone(200) == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.2)
    assert tone(3000) < tone(200) - 25 and tone(10) < tone(200) - 20


def test_a_low_voice_makes_no_ripples():
    assert np.std(measure_low_band(make_even(1 / 80), TIMES)) < 0.5


# Cepstral peak prominence


def test_the_prominence_of_harmonics_falls_as_noise_rises_and_ends_at_that_of_noise():
    even = make_even()
    levels = [np.median(measure_cpp(even + make_noise(level), TIMES, RANGE)) for level in (0, 0.003, 0.01, 0.03, 0.1)]
    assert np.all(np.diff(levels) < -1)
    noise = np.median(measure_cpp(make_noise(0.1), TIMES, RANGE))
    assert levels[0] > 25 and levels[-1] > noise + 4 and noise == pytest.approx(7, abs=1)


def test_prominence_does_not_depend_on_loudness_or_on_the_sample_rate():
    even = make_even() + make_noise(0.01)
    level = np.median(measure_cpp(even, TIMES, RANGE))
    assert np.median(measure_cpp(even / 100, TIMES, RANGE)) == pytest.approx(level, abs=0.01)
    half = even.reshape(-1, 2).mean(1)  # 12 kHz
    assert np.median(measure_cpp(half, TIMES, RANGE, SAMPLE_RATE // 2)) == pytest.approx(level, abs=1.5)


def test_a_hole_above_the_band_of_a_lossy_format_changes_no_prominence():
    even = make_even() + make_noise(0.003)
    spectrum = np.fft.rfft(even)
    spectrum[6000:] = 0  # Hz, as the clip is a second long
    levels = [np.median(measure_cpp(wav, TIMES, RANGE)) for wav in (even, np.fft.irfft(spectrum))]
    assert levels[1] == pytest.approx(levels[0], abs=0.5)


def test_prominence_is_missing_in_digital_silence_only():
    wav = np.where(TIME < 0.5, make_even(), 0)
    missing = np.isnan(measure_cpp(wav, TIMES, RANGE))
    assert not missing[TIMES < 0.48].any() and missing[TIMES > 0.53].all()


# Irregularity


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_pulses_that_alternate_are_as_irregular_as_they_were_made(share):
    wav, true = make_pulses(np.resize([0.009 * (1 + share / 2), 0.009 * (1 - share / 2)], 110))
    assert np.median(true) == pytest.approx(share, abs=1e-6)
    assert np.nanmedian(measure_irregularity(wav, TIMES, RANGE)) == pytest.approx(share, rel=0.1, abs=0.001)


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.1])
def test_random_jitter_is_as_large_as_it_was_made(spread):
    wav, true = make_pulses(0.009 * (1 + spread * np.random.default_rng(1).uniform(-1, 1, 110)))
    assert np.nanmean(measure_irregularity(wav, TIMES, RANGE)) == pytest.approx(true.mean(), rel=0.15)


def test_irregular_pulses_are_found_where_they_are():
    periods = np.full(110, 0.009)
    periods[45:65] *= np.resize([1.1, 0.9], 20)
    irregular = measure_irregularity(make_pulses(periods)[0], TIMES, RANGE) > 0.05
    start, end = 0.02 + np.cumsum(periods)[[44, 64]]
    assert irregular[(TIMES > start + 0.02) & (TIMES < end - 0.02)].all()
    assert not irregular[(TIMES < start - 0.02) | (TIMES > end + 0.02)].any()


def test_a_range_that_holds_two_periods_takes_alternating_pulses_for_even_ones():
    wav, _ = make_pulses(np.resize([0.0095, 0.0085], 110))
    track = track_f0(wav, pitch_range=(40.0, RANGE[1]))
    assert np.nanmedian(track.f0) == pytest.approx(1 / 0.018, rel=0.02)
    assert np.nanmedian(track_voice(wav, track).irregularity) < 0.01
    assert np.nanmedian(track_voice(wav, track, pitch_range=RANGE).irregularity) > 0.09


def test_a_pause_between_two_stretches_of_voice_is_no_irregular_period():
    periods = np.full(110, 0.009)
    periods[50] = 0.04
    values = measure_irregularity(make_pulses(periods)[0], TIMES, RANGE)
    assert np.nanmax(values) < 0.1 and np.isfinite(values).mean() > 0.9


def test_irregularity_is_missing_where_there_are_no_three_pulses():
    wav = np.where(TIME < 0.5, make_even(), 0)
    missing = np.isnan(measure_irregularity(wav, TIMES, RANGE))
    assert not missing[TIMES < 0.48].any() and missing[TIMES > 0.53].all()
    assert np.isnan(measure_irregularity(np.zeros(SAMPLE_RATE), TIMES, RANGE)).all()


# Tracks


def test_voice_lies_on_the_grid_of_its_f0_and_is_a_number_wherever_there_is_a_voice():
    wav = np.concatenate([make_even(), np.zeros(SAMPLE_RATE // 2)])
    track = track_f0(wav)
    voice = track_voice(wav, track)
    assert all(len(values) == len(track.times) for values in (voice.times, voice.low_db, voice.cpp, voice.irregularity))
    inner = track.voiced & (track.times < 0.95)
    assert all(np.isfinite(values[inner]).all() for values in (voice.cpp, voice.irregularity))
    assert voice.low_db[-1] == SILENCE and np.isfinite(voice.low_db).all()


def test_the_shortest_clip_that_has_an_f0_has_a_voice():
    wav = make_even()[2400 : 2400 + int(0.062 * SAMPLE_RATE)]
    voice = track_voice(wav, track_f0(wav, pitch_range=(60.0, 600.0)))
    assert len(voice.times) > 0 and np.isfinite(voice.low_db).all() and np.isfinite(voice.cpp).all()


def test_samples_that_are_not_numbers_are_refused():
    track = F0Track(TIMES, np.full(len(TIMES), 111.0), np.zeros(len(TIMES)), *RANGE)
    with pytest.raises(ProsodyError, match="NaN"):
        track_voice(np.full(SAMPLE_RATE, np.nan), track)


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"{SPEECH} is absent: no recordings to try")
def test_real_voices_are_even_and_clear_where_they_are_voiced():
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    wavs = [read_audio(SPEECH / row["audio_path"]) for row in rows if row["language"] == "sv" and row["duration"] > 0.6][:8]
    pitch_range = find_pitch_range(wavs)
    for wav in wavs:
        track = track_f0(wav, pitch_range=pitch_range)
        voice = track_voice(wav, track)
        assert np.nanmedian(voice.irregularity[track.voiced]) < 0.03
        assert np.nanmedian(voice.cpp[track.voiced]) > np.nanmedian(voice.cpp[~track.voiced]) + 2
        assert np.median(voice.low_db[track.voiced]) > np.median(voice.low_db[~track.voiced]) + 5
