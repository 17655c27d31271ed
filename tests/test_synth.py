"""espeak-ng speaks every language with every voice, the same each time, and bad requests are named."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from csm_nb.corpora import read_manifest
from csm_nb.languages import LANGUAGES
from csm_nb.synth import HELD_OUT_VOICES, LEVEL, VOICES, Voice, make_corpus, speak_phonemes, speak_text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_voice_speaks_every_language_at_one_level(language):
    text = LANGUAGES[language].probes[0]
    for voice in (*VOICES, *HELD_OUT_VOICES):
        wav = speak_text(text, language, voice)
        assert wav.dtype == np.float32 and 0.3 < len(wav) / 24_000 < 8
        assert np.sqrt(np.mean(wav**2)) == pytest.approx(LEVEL, rel=0.01)


def test_the_same_sequence_of_requests_gives_the_same_samples_in_every_process():
    code = """
import hashlib
from csm_nb.synth import VOICES, speak_text
wavs = [speak_text(text, language, VOICES[i]) for i, (text, language) in enumerate([("Hej du.", "sv"), ("Hei du.", "no")] * 2)]
print([hashlib.sha256(wav.tobytes()).hexdigest() for wav in wavs])
"""
    first, second = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT) for _ in range(2))
    assert first.stdout.startswith("['"), first.stderr
    assert first.stdout == second.stdout


def test_pitch_rate_variant_and_language_are_heard():
    plain = speak_text("Ja, det er det.", "da")
    assert len(speak_text("Ja, det er det.", "da", Voice("0", "m3", 40, 60, 240))) < 0.8 * len(plain)
    for other in (speak_text("Ja, det er det.", "da", VOICES[1]), speak_text("Ja, det er det.", "no")):
        assert len(other) != len(plain) or not np.allclose(other, plain)


def test_phonemes_come_with_the_times_at_which_they_sound():
    wav, phonemes = speak_phonemes("Hun ser et skip.", "da")
    times, names = zip(*phonemes, strict=True)
    assert list(times) == sorted(times) and times[0] < 0.1 and times[-1] <= len(wav) / 24_000
    assert "".join(names).startswith("h") and "s" in names and names[-1] == ""
    start = int(24_000 * times[names.index("s")])
    crossings = np.abs(np.diff(np.sign(wav[start : start + 1200]))).sum() / 2
    assert crossings > 250  # in 50 ms: an s hisses above 2.5 kHz


@pytest.mark.parametrize(("text", "language", "voice", "message"), [
    ("  ", "no", VOICES[0], "empty"), ("Hei", "xx", VOICES[0], "xx"), ("Hei", "no", Voice("0", "nobody"), "nobody"),
])
def test_what_can_not_be_spoken_is_named(text, language, voice, message):
    with pytest.raises(ValueError, match=message):
        speak_text(text, language, voice)


def test_a_corpus_is_a_manifest_that_calls_itself_synthetic(tmp_path):
    rows = read_manifest(make_corpus(["Good day.", "Come here."], "en", tmp_path, spoken_as="no"))
    assert [row["text"] for row in rows] == ["Good day.", "Come here."]
    assert all("synthetic" in row["source"] and row["accent"] == "no" and row["language"] == "en" for row in rows)
    assert rows[0]["speaker_id"] != rows[1]["speaker_id"]
