"""Silence is cut to the margin and no onset with it; levels come to one loudness, and no peak is clipped by that."""

import numpy as np
import pytest
import soundfile

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, read_audio, write_audio
from csm_nb.clips.check import check_clips
from csm_nb.clips.level import PEAK, describe_levels, find_kept, level_clips, measure_loudness
from csm_nb.manifest import read_manifest
from csm_nb.synth.espeak import PAD_SECONDS, VOICES, speak_text
from csm_nb.text.sentences import make_sentences

MARGIN = 0.2
SHARED = paths.ROOT.parent / "shared/speech/manifest.jsonl"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project's root with no clips in it yet."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "home")
    return tmp_path / "home"


def make_row(path, **more):
    return {"text": "Det regner i dag.", "audio_path": str(path), "speaker_id": "1", "language": "da"} | more


@pytest.mark.parametrize("snr", [30, 40, 60, None])
def test_no_onset_is_cut_off_and_silence_is(snr):
    rng = np.random.default_rng(0)
    for language in ("no", "de", "pl"):
        for number, text in enumerate(make_sentences(language, 12, 5)):
            speech = speak_text(text, language, VOICES[number % 4])
            before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0.5, 1.5, 2))
            wav = np.pad(speech, (before, after))
            noise = rng.normal(0, 10 ** (-snr / 20), len(wav)) * np.sqrt(np.mean(speech**2)) if snr else 0
            first, last = find_kept((wav + noise).astype(np.float32), MARGIN)
            start, end = before / SAMPLE_RATE + PAD_SECONDS, (before + len(speech)) / SAMPLE_RATE - PAD_SECONDS
            assert start - MARGIN - 0.02 < first / SAMPLE_RATE < start - MARGIN + 0.03
            assert end + MARGIN - 0.07 < last / SAMPLE_RATE < end + MARGIN + 0.02


def test_what_is_no_silence_stays():
    rng = np.random.default_rng(0)
    speech = speak_text("Det regner i dag.", "da")
    noisy = np.pad(speech, 24000) + rng.normal(0, 0.02, len(speech) + 48000).astype(np.float32)
    for wav in (speech, noisy, rng.normal(0, 0.1, 24000).astype(np.float32), np.zeros(24000, np.float32), speech[:100]):
        assert find_kept(wav, MARGIN) == (0, len(wav))
    assert find_kept(np.pad(speech, 24000), 0) == (0, len(speech) + 48000)


@pytest.mark.skipif(not SHARED.is_file(), reason="there is no ../shared/speech")
def test_of_recordings_nothing_is_cut_that_is_within_25_db_of_their_loudest():
    for row in read_manifest(SHARED)[::4]:
        wav = read_audio(row["audio_path"])
        first, last = find_kept(wav, MARGIN)
        for part in (wav[:first], wav[last:]):
            frames = part[: len(part) // 240 * 240].reshape(-1, 240)
            whole = wav[: len(wav) // 240 * 240].reshape(-1, 240)
            assert not len(frames) or (frames**2).mean(axis=1).max() < 10**-2.5 * (whole**2).mean(axis=1).max()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_tone_has_the_loudness_that_the_recommendation_says(rate):
    tone = 0.1 * np.sin(2 * np.pi * 997 * np.arange(2 * rate) / rate).astype(np.float32)
    assert measure_loudness(tone, rate) == pytest.approx(-23.0, abs=0.15)  # -3.01 for a full one; BS.1770-4, annex 1
    assert measure_loudness(tone[: rate // 5], rate) == pytest.approx(-23.0, abs=0.6)


def test_clips_come_to_one_loudness_and_no_peak_is_clipped(home, tmp_path):
    speech, rng = speak_text("Det regner i dag.", "da"), np.random.default_rng(0)
    peaky = np.clip(rng.normal(0, 0.003, 48000), -0.01, 0.01)
    peaky[[5000, 30000]] = 0.8, -0.8
    rows = [make_row(write_audio(tmp_path / f"{number}.wav", wav)) for number, wav in
            enumerate((0.1 * speech, 2 * speech, peaky, 0.0002 * np.ones(9600)))]
    done = level_clips(rows, -23.0)
    heard = [measure_loudness(read_audio(row["audio_path"])) for row in done]
    assert heard[:2] == pytest.approx([-23, -23], abs=0.1) and heard[2] < -30
    assert np.abs(read_audio(done[2]["audio_path"])).max() == pytest.approx(10 ** (PEAK / 20), abs=0.001)
    assert [row["levelled"]["limited"] for row in done] == [False, False, True, False] and done[3]["levelled"]["gain"] == 0
    assert "less gain than asked for, as peaks stay below -1 dBFS: 1 clips" in describe_levels(done)
    assert level_clips(rows) == rows and describe_levels(rows) == ""


def test_a_clip_is_written_once_with_its_rate_and_its_marks_move(home, tmp_path):
    speech = np.pad(speak_text("Det regner i dag.", "da", VOICES[1]), 36000)
    path = write_audio(tmp_path / "a.wav", speech, SAMPLE_RATE)
    soundfile.write(path, np.stack([speech, speech], 1), 48000)
    row = make_row(path, windows=[[1.0, 1.2, True], [0.0, 0.1, False]])
    good, bad = check_clips([row], margin=MARGIN)
    start, end = good[0]["kept"]
    assert bad == [] and good[0]["duration"] == round(end - start, 3) < len(speech) / 48000
    done, = level_clips(good)
    info = soundfile.info(done["audio_path"])
    assert (info.samplerate, info.channels, info.duration) == (48000, 1, pytest.approx(end - start, abs=0.001))
    assert done["windows"] == [[pytest.approx(1.0 - start), pytest.approx(1.2 - start), True]] and "kept" not in done
    assert done["levelled"] == {"cut": pytest.approx(len(speech) / 48000 - end + start, abs=0.001), "gain": 0, "limited": False}
    written = next((home / "data/clips").iterdir()).stat().st_mtime_ns
    assert level_clips(good) == [done] and next((home / "data/clips").iterdir()).stat().st_mtime_ns == written
    assert level_clips(good, -20.0)[0]["audio_path"] != done["audio_path"]


def test_silence_beyond_the_margin_is_no_part_of_its_length_and_none_clipped_becomes_good(home, tmp_path):
    speech = speak_text("Det regner i dag.", "da")
    rows = [make_row(write_audio(tmp_path / "long.wav", np.pad(speech, (0, 29 * SAMPLE_RATE)))),
            make_row(write_audio(tmp_path / "clipped.wav", np.pad(np.clip(100 * speech, -1, 1), 48000)))]
    assert [row["kind"] for row in check_clips(rows, need_one=False)[1]] == ["pace", "clipped"]
    good, bad = check_clips(rows, margin=MARGIN)
    assert [row["audio_path"] for row in good] == [rows[0]["audio_path"]] and [row["kind"] for row in bad] == ["clipped"]
