"""espeak-ng speaks every language with every voice, the same each time, and bad requests are named."""

import shutil
import subprocess
import sys

import espeakng_loader
import numpy as np
import pytest
from conftest import ROOT

from csm_nb.languages import LANGUAGES
from csm_nb.manifest import read_manifest
from csm_nb.phonemes import espeak_ng
from csm_nb.phonemes.ipa import to_ipa
from csm_nb.synth.corpus import HELD_OUT_VOICES, make_corpus
from csm_nb.synth.espeak import LEVEL, VOICES, Voice, speak_phonemes, speak_text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_voice_speaks_every_language_at_one_level(language):
    text = LANGUAGES[language].probes[0]
    for voice in (*VOICES, *HELD_OUT_VOICES):
        wav = speak_text(text, language, voice)
        assert wav.dtype == np.float32 and 0.3 < len(wav) / 24_000 < 8
        assert np.sqrt(np.mean(wav**2)) == pytest.approx(LEVEL, rel=0.01)


@pytest.mark.parametrize("voice", [VOICES[0], VOICES[1], HELD_OUT_VOICES[1]], ids=lambda voice: voice.variant)
def test_a_clip_is_the_same_whatever_was_said_before(voice):
    alone = speak_text("Jeg ved ikke hvad det er.", "da", voice)
    for text, language, other in (("Hej du.", "sv", VOICES[2]), ("Hun ser et skip på havet.", "no", voice)):
        speak_text(text, language, other)
        assert np.array_equal(speak_text("Jeg ved ikke hvad det er.", "da", voice), alone)


def test_a_corpus_is_the_same_when_it_is_made_again_and_in_another_process(tmp_path):
    code = "from csm_nb.synth.corpus import make_corpus; make_corpus(['Hej du.', 'Hun ser det.', 'Hej du.'], 'sv', {!r})"
    make_corpus(["Hej du.", "Hun ser det.", "Hej du."], "sv", tmp_path / "first")
    speak_text("Hun kommer hjem i kveld.", "no")
    make_corpus(["Hej du.", "Hun ser det.", "Hej du."], "sv", tmp_path / "again")
    subprocess.run([sys.executable, "-c", code.format(str(tmp_path / "elsewhere"))], check=True, cwd=ROOT)
    names = sorted(path.name for path in (tmp_path / "first").glob("*.wav"))
    assert len(names) == 3
    for name in names:
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("first", "again", "elsewhere")}) == 1


def test_speech_and_phonemes_come_from_a_checkout_with_a_long_path(tmp_path):
    """espeak-ng itself cuts the path of its data off at 159 bytes, and then ends the process."""
    deep = tmp_path / ("a" * 120) / ("ø" * 60)
    shutil.copytree(espeakng_loader.get_data_path(), deep / "espeak-ng-data")
    shutil.copy(espeakng_loader.get_library_path(), deep)
    code = f"""
import espeakng_loader
library = {str(deep)!r} + "/" + espeakng_loader.get_library_path().rsplit("/", 1)[1]
espeakng_loader.get_library_path, espeakng_loader.get_data_path = lambda: library, lambda: {str(deep / "espeak-ng-data")!r}
from csm_nb.phonemes.ipa import to_ipa
from csm_nb.synth.espeak import speak_text
print(len(speak_text("Hej du.", "sv")), *to_ipa(["hej du"], "sv"), len(speak_text("Hej du.", "sv")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    length = len(speak_text("Hej du.", "sv"))
    assert result.stdout.split() == [str(length), *to_ipa(["hej du"], "sv")[0].split(), str(length)], result.stderr


def test_a_path_that_espeak_can_not_hold_is_an_error_of_python_s_with_what_to_do(monkeypatch):
    monkeypatch.setattr(espeak_ng, "LONGEST_PATH", 20)
    with pytest.raises(RuntimeError, match="TMPDIR"):
        espeak_ng._make_folder.__wrapped__()


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
