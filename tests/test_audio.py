"""Any file becomes mono float32 at the asked rate, what cannot is named, and players carry sound at its true level."""

import base64
import io
import re

import numpy as np
import pytest
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio, resample, write_audio
from csm_nb.show.players import player, players


def make_tone(hertz=220.0, seconds=1.0, sample_rate=SAMPLE_RATE, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * sample_rate)) / sample_rate)).astype(np.float32)


def find_pitch(wav, sample_rate=SAMPLE_RATE):
    return np.abs(np.fft.rfft(wav * np.hanning(len(wav)))).argmax() * sample_rate / len(wav)


def hear(html):
    """The samples inside each player of a page."""
    found = re.findall(r"data:audio/mpeg;base64,([^\"]+)", html.data)
    return [soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")[0] for data in found]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("sample_rate", [8000, 44_100, 48_000])
def test_files_of_any_kind_and_rate_keep_pitch_length_and_level(tmp_path, suffix, sample_rate):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, make_tone(sample_rate=sample_rate), sample_rate)
    wav = read_audio(path)
    assert wav.dtype == np.float32 and wav.ndim == 1
    assert len(wav) == pytest.approx(SAMPLE_RATE, rel=0.08 if suffix == "mp3" else 0.001)
    assert find_pitch(wav) == pytest.approx(220, abs=2)
    assert np.sqrt(np.mean(wav[6000:18_000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


def test_channels_are_averaged(tmp_path):
    left, right = make_tone(220), make_tone(330)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), SAMPLE_RATE, subtype="FLOAT")
    assert np.allclose(read_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-6)


def test_what_is_written_is_read_back(tmp_path):
    wav = make_tone()
    path = write_audio(tmp_path / "new" / "clip.wav", wav)
    assert np.allclose(read_audio(path), wav, atol=1e-4)


def test_bad_files_are_named_with_the_reason(tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "nothing.mp3").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), SAMPLE_RATE, subtype="FLOAT")
    reasons = {"gone.wav": "no such", "text.wav": "not readable", "nothing.mp3": "not readable",
               "empty.wav": "no samples", "nan.wav": "NaN"}
    for name, reason in reasons.items():
        with pytest.raises(AudioError, match=f"{name}.*{reason}"):
            read_audio(tmp_path / name)


@pytest.mark.parametrize(("name", "wav"), [
    ("a.wav", np.zeros(0)), ("a.wav", np.array([np.nan])), ("a.wav", np.zeros((2, 5))), ("a.xyz", np.zeros(5)),
    ("a", np.zeros(5)),
])
def test_what_can_not_be_written_is_refused(tmp_path, name, wav):
    with pytest.raises(AudioError, match=re.escape(str(tmp_path / name))):
        write_audio(tmp_path / name, wav)


def test_resampling_keeps_pitch_and_leaves_the_same_rate_alone():
    wav = make_tone(1000)
    assert resample(wav, SAMPLE_RATE, SAMPLE_RATE) is wav
    assert find_pitch(resample(wav, SAMPLE_RATE, 16_000), 16_000) == pytest.approx(1000, abs=1)


def test_players_keep_the_difference_in_level():
    loud, soft = hear(players([("loud", make_tone(level=0.8)), ("soft", make_tone(level=0.08))]))
    assert np.sqrt(np.mean(loud**2) / np.mean(soft**2)) == pytest.approx(10, rel=0.03)
    assert np.abs(soft).max() < 0.1


def test_a_player_is_small_needs_no_network_and_escapes_its_label():
    html = player(make_tone(seconds=10), "<b>&").data
    assert len(html) < 100_000 and "http" not in html and "&lt;b&gt;&amp;" in html


def test_a_clip_without_sound_is_said_and_the_others_play():
    html = players([("nothing", np.zeros(0)), ("broken", np.full(9, np.nan)), ("tone", make_tone())])
    assert len(hear(html)) == 1 and "no sound" in html.data and "NaN" in html.data


def test_clipping_is_said():
    assert "clipped" in player(make_tone(level=1.5)).data and "clipped" not in player(make_tone()).data
