"""F0 and voicing are what was put in, and a decoded copy's errors are the errors that were made."""

import sys

import numpy as np
import pytest

from csm_nb.audio import SAMPLE_RATE
from csm_nb.prosody.f0 import (
    MEASURES,
    METHODS,
    ProsodyError,
    compare_clip,
    find_pitch_range,
    flatten_f0,
    measure_mel_distance,
    to_semitones,
    track_f0,
)
from csm_nb.synth.espeak import VOICES, speak_text


def make_tone(hertz, seconds: float = 1.0, harmonics: int = 12):
    """A harmonic tone whose F0 is `hertz` (a number or an array of one value a sample)."""
    f0 = np.broadcast_to(np.asarray(hertz, float), int(seconds * SAMPLE_RATE))
    phase = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, harmonics + 1))).astype(np.float32)


def make_glide(cents: float = 0.0):
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    return make_tone(180 * 2 ** ((200 * np.sin(2 * np.pi * 3 * time) + cents) / 1200))


@pytest.mark.parametrize("hertz", [80, 200, 410])
def test_f0_is_the_frequency_that_was_put_in(hertz):
    track = track_f0(make_tone(hertz))
    assert track.voiced.mean() > 0.9
    assert np.nanmedian(track.f0) == pytest.approx(hertz, rel=0.005)


@pytest.mark.parametrize("method", METHODS[1:])
def test_other_trackers_find_the_same_melody_at_the_same_times(method):
    if method == "torchcrepe":
        pytest.importorskip("torchcrepe", reason="torchcrepe is not installed: uv pip install torchcrepe")
    wav = np.concatenate([make_glide(), np.zeros(SAMPLE_RATE // 2, np.float32)])
    praat, other = track_f0(wav, pitch_range=(100, 300)), track_f0(wav, pitch_range=(100, 300), method=method)
    assert np.array_equal(praat.times, other.times)
    assert np.mean(praat.voiced != other.voiced) < 0.05
    both = praat.voiced & other.voiced
    cents = 1200 * np.log2(other.f0[both] / praat.f0[both])
    assert np.sqrt(np.mean(cents**2)) < 25
    assert np.array_equal(other.hnr[both], praat.hnr[both]) and np.isnan(other.hnr[~both]).all()
    again = track_f0(wav, pitch_range=(100, 300), method=method)
    assert np.array_equal(again.f0, other.f0, equal_nan=True)


def test_where_another_tracker_hears_no_voice_there_is_no_harmonicity(monkeypatch):
    monkeypatch.setattr("csm_nb.prosody.f0._run_pyin", lambda wav, floor, ceiling, times: np.where(times < 0.5, 180.0, np.nan))
    track = track_f0(make_glide(), pitch_range=(100, 300), method="pyin")
    assert np.array_equal(np.isfinite(track.hnr), track.times < 0.5)


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_what_to_do(monkeypatch):
    with pytest.raises(ProsodyError, match="'yin'; allowed are praat, pyin, torchcrepe"):
        track_f0(make_glide(), method="yin")
    monkeypatch.setitem(sys.modules, "torchcrepe", None)
    with pytest.raises(ProsodyError, match="pip install torchcrepe"):
        track_f0(make_glide(), method="torchcrepe")


def test_noise_has_hardly_a_voice_and_silence_none():
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE)
    assert track_f0(noise).voiced.mean() < 0.1
    assert not track_f0(np.zeros(SAMPLE_RATE)).voiced.any()


def test_harmonicity_falls_as_noise_rises():
    tone, noise = make_tone(150), np.random.default_rng(0).normal(0, 1, SAMPLE_RATE)
    levels = [np.nanmedian(track_f0(tone + gain * noise).hnr) for gain in (0.001, 0.01, 0.05)]
    assert levels[0] > levels[1] + 5 > levels[2] + 10


def test_the_range_follows_the_speaker():
    low, high = find_pitch_range([make_tone(100), make_tone(120)])
    assert low < 100 < 120 < high < 250
    assert find_pitch_range([np.zeros(SAMPLE_RATE)]) == (60.0, 600.0)


def test_a_clip_is_equal_to_itself():
    measures = compare_clip(make_glide(), make_glide())
    assert measures.pop("reason") == ""
    kept = {"f0_correlation": 1.0, "turns_kept_percent": 100.0, "h2_h1_error_st": 0.0}
    assert measures == pytest.approx(dict.fromkeys(MEASURES, 0.0) | kept, abs=1e-6)


def test_a_melody_a_semitone_higher_is_a_hundred_cents_off_and_still_correlates():
    measures = compare_clip(make_glide(), make_glide(100))
    assert measures["f0_rmse_cents"] == pytest.approx(100, abs=5)
    assert measures["f0_correlation"] > 0.99 and measures["gpe_percent"] == 0


def test_an_octave_error_is_a_gross_one():
    assert compare_clip(make_tone(110), make_tone(220), pitch_range=(75, 400))["gpe_percent"] == 100


def test_a_stretch_that_lost_its_voice_is_a_voicing_error_of_its_length():
    original, decoded = make_glide(), make_glide()
    decoded[: SAMPLE_RATE // 4] = 0
    assert compare_clip(original, decoded)["vde_percent"] == pytest.approx(25, abs=4)


def test_a_flattened_melody_keeps_the_sound_and_loses_the_correlation():
    wav = speak_text("Barna ser et tog ved sjøen.", "no", VOICES[1])
    flat = flatten_f0(wav)
    assert len(flat) == len(wav)
    measures = compare_clip(wav, flat)
    assert abs(measures["f0_correlation"]) < 0.5 and measures["f0_rmse_cents"] > 60
    assert measures["turns_kept_percent"] < 50 and measures["h2_h1_error_st"] > 1
    assert np.nanstd(to_semitones(track_f0(flat).f0)) < 0.5 < np.nanstd(to_semitones(track_f0(wav).f0))


def test_mel_distance_grows_with_the_damage_and_not_with_silence():
    wav = speak_text("Barna ser et tog.", "no")
    noise = np.random.default_rng(0).normal(0, 1, len(wav))
    near, far = (measure_mel_distance(wav, wav + gain * noise) for gain in (0.002, 0.02))
    assert 0 < near < far
    assert measure_mel_distance(np.zeros(100), np.zeros(100)) == 0


@pytest.mark.parametrize(("original", "decoded", "reason"), [
    (np.zeros(SAMPLE_RATE), np.zeros(SAMPLE_RATE), "hardly voiced"),
    (np.zeros(100), np.zeros(100), "too short"),
    (make_glide(), np.full(SAMPLE_RATE, np.nan), "NaN"),
    (make_glide(), np.zeros(SAMPLE_RATE), "voice lost"),
    (make_tone(150), make_tone(150), "level F0"),
])
def test_what_can_not_be_measured_is_nan_with_its_reason(original, decoded, reason):
    measures = compare_clip(original, decoded)
    assert reason in measures["reason"] and np.isnan(measures["f0_correlation"])


def test_samples_that_are_not_numbers_are_refused():
    with pytest.raises(ProsodyError, match="NaN"):
        track_f0(np.full(SAMPLE_RATE, np.nan), pitch_range=(75, 400))
