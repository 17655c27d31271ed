"""What the recogniser and the language ID make of a clip before and after the codec is the ceiling, clip by clip."""

import numpy as np
import pytest

from csm_nb.audio import SAMPLE_RATE
from csm_nb.fidelity import intelligibility, verdict
from csm_nb.fidelity.clips import CodedClip
from csm_nb.judge.judges import load_asr, load_lid
from csm_nb.synth.espeak import VOICES, speak_text


@pytest.fixture(scope="module")
def judges():
    return load_asr("models/asr-mini", "cpu"), load_lid("models/lid-mini", "cpu")


def make_clip(text, said=None, ruined=False):
    wav = speak_text(said or text, "da", VOICES[0])
    noise = np.random.default_rng(0).normal(0, 0.1, len(wav)).astype(np.float32)
    return CodedClip({"text": text, "audio_path": f"{said or text}.wav"}, wav, {"coded": noise if ruined else wav},
                              (70.0, 300.0), 120.0)


def test_a_clip_that_came_through_has_the_error_of_its_original_and_a_ruined_one_has_more(judges):
    texts = ("Manden spiser et æble i dag.", "Hun kommer hjem i aften.")
    clips = [make_clip(texts[0]), make_clip(texts[1], ruined=True)]
    table = intelligibility.measure_sounds(clips, *judges, "da", ["coded"]).set_index(["audio_path", "condition"]).cer_percent
    assert table[f"{texts[0]}.wav", "coded"] == table[f"{texts[0]}.wav", "original"] < 30
    assert table[f"{texts[1]}.wav", "coded"] > 70


def test_a_clip_without_text_is_heard_for_its_language_only(judges):
    table = intelligibility.measure_sounds([make_clip("", said="Hvad koster den røde bog i butikken?")], *judges, "da", ["coded"])
    assert table.cer_percent.isna().all() and set(table.right_language) <= {0.0, 1.0}


def test_the_ceiling_has_a_mean_for_each_condition(judges):
    table = intelligibility.measure_sounds([make_clip("Hun kommer hjem i aften.")], *judges, "da", ["coded"])
    ceiling = intelligibility.describe_ceiling(verdict.summarise(table, intelligibility.MEASURES, "mean"))
    assert set(ceiling) == {"original", "coded"} and set(ceiling["coded"]) == set(intelligibility.MEASURES)


def test_quality_of_silence_or_of_a_clip_that_is_too_short_is_not_measured():
    tone = np.sin(np.arange(SAMPLE_RATE) / 10).astype(np.float32)
    for original, decoded in ((0 * tone, tone), (tone, 0 * tone), (tone[:2400], tone[:2400])):
        assert all(np.isnan(value) for value in intelligibility.measure_quality(original, decoded).values())


@pytest.mark.parametrize(("package", "best"), [("pystoi", 0.99), ("pesq", 4.5)])
def test_a_clip_against_itself_has_the_best_quality_there_is(package, best):
    pytest.importorskip(package)
    wav = speak_text("Manden spiser et æble i dag.", "da", VOICES[0])
    assert intelligibility.measure_quality(wav, wav)["stoi" if package == "pystoi" else "pesq"] > best


def test_errors_are_counted_without_letting_one_hallucination_decide(monkeypatch):
    said = {"original": ["syv", "otte", "ni"], "coded": ["7", "Danske tekster af Nicolai Winther", "ni"]}
    monkeypatch.setattr(intelligibility, "transcribe", lambda asr, wavs: said["original" if wavs[0].any() else "coded"])
    monkeypatch.setattr(intelligibility, "identify_languages", lambda lid, wavs: [{"da": 1.0}] * len(wavs))
    clips = [CodedClip({"text": text, "audio_path": f"{text}.wav"}, np.ones(9600, np.float32),
                                {"coded": np.zeros(9600, np.float32)}, (70.0, 300.0), 120.0) for text in said["original"]]
    heard = intelligibility.measure_sounds(clips, None, None, "da", ["coded"])
    assert heard.cer_percent.tolist() == [0, 0, 0, 0, 100, 0]
    table = intelligibility.tabulate_errors(heard)
    assert table["mean CER (%)"]["coded"].startswith("33.3 (") and table["median CER (%)"]["coded"] == "0.0"
    assert table["over 50 %"]["coded"] == table["hallucinations"]["coded"] == "1 of 3, 33 % (6 to 79 %)"
    assert table["hallucinations"]["original"].startswith("0 of 3")


def test_errors_of_clips_without_text_are_not_measured(judges):
    measured = intelligibility.measure_sounds([make_clip("", said="Hvad koster den?")], *judges, "da", [])
    table = intelligibility.tabulate_errors(measured)
    assert table["mean CER (%)"].tolist() == ["not measured"] and table["over 50 %"].tolist() == ["none of 0"]
