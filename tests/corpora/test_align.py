"""Long recordings are cut at pauses into clips with their text, and what does not fit is listed."""

import json

import numpy as np
import pytest

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.clips.check import check_clips
from csm_nb.corpora import align
from csm_nb.corpora.sources import load_corpus
from csm_nb.judge.judges import load_asr
from csm_nb.paths import ROOT
from csm_nb.synth.espeak import speak_text
from csm_nb.text.sentences import make_sentences

SENTENCES = make_sentences("da", 40, 3)
SAID, OTHER = SENTENCES[:28], SENTENCES[30:32]
WRONG = slice(10, 12)


@pytest.fixture(scope="module")
def recording():
    """A recording of 28 sentences with pauses of .5 to 1.2 s, and where each sentence is in it, in s."""
    rng, parts, places, at = np.random.default_rng(0), [], [], 0
    for sentence in SAID:
        pause, wav = np.zeros(int(rng.uniform(0.5, 1.2) * SAMPLE_RATE), np.float32), speak_text(sentence, "da")
        parts += [pause, wav]
        places.append(((at + len(pause)) / SAMPLE_RATE, (at + len(pause) + len(wav)) / SAMPLE_RATE))
        at += len(pause) + len(wav)
    return np.concatenate(parts), places


@pytest.fixture(scope="module")
def asr():
    return load_asr("models/asr-mini", "cpu", "da")


@pytest.fixture(scope="module")
def aligned(asr, recording):
    """What comes of it with the text of other sentences in the place of two."""
    text = [*SAID[: WRONG.start], *OTHER, *SAID[WRONG.stop :]]
    return align.align_recording(asr, recording[0], " ".join(text), "da")


def test_pieces_begin_and_end_in_the_pauses_and_have_the_text_between(recording, aligned):
    wav, places = recording
    assert 60 < len(wav) / SAMPLE_RATE < 120
    pieces, _ = aligned
    covered = []
    for piece in pieces:
        inside = [number for number, (start, end) in enumerate(places)
                  if piece["start"] - 0.1 < start and end < piece["end"] + 0.1]
        assert piece["text"] == " ".join(SAID[number] for number in inside)
        assert piece["start"] == pytest.approx(places[inside[0]][0], abs=0.45)
        assert piece["end"] == pytest.approx(places[inside[-1]][1], abs=0.45)
        assert align.SHORTEST <= piece["end"] - piece["start"] <= align.LONGEST and 0.5 < piece["score"] <= 1
        covered += inside
    assert covered == [number for number in range(len(SAID)) if number not in range(WRONG.start, WRONG.stop)]


def test_a_stretch_of_another_text_is_bad_with_its_reason_and_no_other(recording, aligned):
    (bad,) = aligned[1]
    assert bad["text"] == " ".join(OTHER) and bad["score"] < align.LEAST_SCORE
    assert bad["start"] == pytest.approx(recording[1][WRONG.start][0], abs=0.45)
    assert "its letters have a probability of" in bad["reason"]


def test_speech_without_a_text_is_bad_too(asr, recording):
    pieces, bad = align.align_recording(asr, recording[0], " ".join(SAID[:10] + SAID[14:]), "da")
    start, end = recording[1][10][0], recording[1][13][1]
    assert bad and all(one["start"] < end and start < one["end"] for one in bad)  # with the words beside it, and no others
    assert not any(start + 1 < piece["start"] and piece["end"] < end - 1 for piece in pieces)


def test_a_text_that_no_recording_holds_is_one_bad_stretch(asr, recording):
    pieces, bad = align.align_recording(asr, recording[0][: 5 * SAMPLE_RATE], " ".join(SENTENCES), "da")
    assert pieces == [] and "do not fit" in bad[0]["reason"]
    with pytest.raises(ValueError, match="no text to align"):
        align.align_recording(asr, recording[0], "- ...", "da")


def test_signs_and_numbers_stay_in_the_text_as_they_are_written(asr):
    wav = np.concatenate([speak_text("Han har tre bøger.", "da"), np.zeros(SAMPLE_RATE, np.float32),
                          speak_text("Hun har en rød bil og et hus.", "da")])  # fmt: skip
    pieces, _ = align.align_recording(asr, wav, "– Han har 3 bøger. – Hun har en rød bil og et hus.", "da")
    assert " ".join(piece["text"] for piece in pieces) == "Han har 3 bøger. – Hun har en rød bil og et hus."


def test_a_folder_becomes_a_manifest_that_is_cut_and_what_was_done_is_not_done_again(recording, tmp_path, monkeypatch, capsys):
    write_audio(tmp_path / "in/anna/long.wav", recording[0])
    (tmp_path / "in/anna/long.txt").write_text(" ".join(SAID))
    write_audio(tmp_path / "in/bo/short.wav", speak_text(SENTENCES[35], "da"))
    (tmp_path / "in/bo/short.txt").write_text(SENTENCES[35])
    (tmp_path / "in/bo/broken.wav").write_bytes(b"RIFF")
    words = [str(tmp_path / "in"), "--lang", "da", "--out", str(tmp_path / "out"), "--model", str(ROOT / "models/asr-mini")]
    assert align.main(words) == 0
    said = capsys.readouterr().out
    assert "long.wav: " in said and "left out: broken.wav: " in said and "1 stretches are left out" in said
    (bad,) = map(json.loads, (tmp_path / "out/bad.jsonl").read_text().splitlines())
    assert bad["audio_path"].endswith("broken.wav")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "project")
    good, set_aside = check_clips(load_corpus(tmp_path / "out", "da"))
    assert set_aside == [] and {row["speaker_id"] for row in good} == {"anna", "bo"} and len(good) > 10
    assert " ".join(row["text"] for row in good if row["speaker_id"] == "anna") == " ".join(SAID)
    before = (tmp_path / "out/manifest.jsonl").read_bytes()
    monkeypatch.setattr(align, "load_asr", lambda *_: pytest.fail("aligned again"))
    assert align.main(words) == 0 and (tmp_path / "out/manifest.jsonl").read_bytes() == before


def test_a_folder_without_the_language_says_so(tmp_path, capsys):
    assert align.main([str(tmp_path), "--lang", "da", "--out", str(tmp_path / "out")]) == 1
    assert "nothing of language 'da'" in capsys.readouterr().err
