"""A corpus is read as it is written, and one bad clip is set aside and stops nothing."""

import json

import numpy as np
import pytest
import soundfile

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.corpora import CorpusError, check_clips, list_remarks, load_corpus, read_manifest, write_manifest

TONE = 0.1 * np.sin(np.arange(SAMPLE_RATE) * 0.05).astype(np.float32)


def make_row(path, **more):
    return {"text": "Hej.", "audio_path": str(path), "speaker_id": "a", "language": "da"} | more


@pytest.fixture
def manifest(tmp_path):
    """Five Danish clips and a Swedish one."""
    rows = [make_row(write_audio(tmp_path / f"wavs/{i}.wav", TONE), text=f"Nummer {i}.", age=i) for i in range(5)]
    rows.append(make_row(tmp_path / "wavs/0.wav", language="sv"))
    return write_manifest(rows, tmp_path / "manifest.jsonl")


def test_a_manifest_moves_with_its_folder_and_keeps_every_field(manifest, tmp_path):
    assert json.loads(manifest.read_text().splitlines()[0])["audio_path"] == "wavs/0.wav"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    rows = read_manifest(moved / "manifest.jsonl")
    assert rows[3]["audio_path"] == str(moved / "wavs/3.wav") and rows[3]["age"] == 3


def test_only_the_language_asked_for_comes_back(manifest):
    assert len(load_corpus(manifest, "da")) == 5
    assert [row["language"] for row in load_corpus(manifest, "sv")] == ["sv"]


def test_a_draw_is_repeatable_by_seed_and_not_the_head_of_the_file(manifest):
    draws = [[row["age"] for row in load_corpus(manifest, "da", 2, seed)] for seed in range(6)]
    assert draws == [[row["age"] for row in load_corpus(manifest, "da", 2, seed)] for seed in range(6)]
    assert any(draw != [0, 1] for draw in draws) and all(len(set(draw)) == 2 for draw in draws)


def test_a_language_that_the_corpus_lacks_is_an_error_that_names_what_there_is(manifest):
    with pytest.raises(CorpusError, match="'no'; found: da, sv"):
        load_corpus(manifest, "no")


def test_an_unknown_language_is_an_error_that_lists_the_known_ones(manifest):
    with pytest.raises(ValueError, match="da"):
        load_corpus(manifest, "xx")


@pytest.mark.parametrize(("line", "message"), [
    ("{broken", "line 2 is no JSON"), ("[1]", "line 2 lacks text"),
    ('{"text": "x"}', "line 2 lacks audio_path, speaker_id, language; found are text, and every line needs text, audio_path"),
    ('{"text": "x", "audio_path": null, "speaker_id": "a", "language": null}', "line 2 lacks audio_path, language"),
    ('{"text": "x", "audio_path": 5, "speaker_id": "a", "language": "da"}', "line 2 has 5 as audio_path; allowed is the path"),
])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(make_row("a.wav")) + "\n" + line + "\n")
    with pytest.raises(CorpusError, match=message):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(CorpusError, match="nothing.jsonl: no such manifest"):
        load_corpus(tmp_path / "nothing.jsonl", "da")


def test_a_folder_of_clips_takes_texts_and_speakers_from_its_files(tmp_path):
    write_audio(tmp_path / "anna/1.flac", TONE)
    (tmp_path / "anna/1.txt").write_text("Hej med dig.\n")
    write_audio(tmp_path / "bo/2.wav", TONE)
    rows = load_corpus(tmp_path, "da")
    assert [(row["text"], row["speaker_id"]) for row in rows] == [("Hej med dig.", "anna"), ("", "bo")]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="no clip at all"):
        load_corpus(tmp_path, "da")


def test_every_kind_of_bad_clip_is_set_aside_with_its_reason(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF not audio")
    rows = [
        make_row(write_audio(tmp_path / "good.wav", TONE)), make_row(tmp_path / "missing.wav"), make_row(tmp_path / "broken.wav"),
        make_row(tmp_path / "good.wav", text="  "), make_row(write_audio(tmp_path / "silent.wav", 0 * TONE)),
        make_row(write_audio(tmp_path / "short.wav", TONE[:2400])),
        make_row(write_audio(tmp_path / "long.wav", np.tile(TONE, 31))),
    ]
    good, set_aside = check_clips(rows)
    assert [row["duration"] for row in good] == [1.0]
    for row, reason in zip(set_aside, ("no such", "not readable", "no text", "silent", "0.10 s", "31.00 s"), strict=True):
        assert reason in row["reason"]


def test_a_clip_longer_than_the_limit_that_was_given_is_set_aside(tmp_path):
    rows = [make_row(write_audio(tmp_path / f"{s}.wav", np.tile(TONE, s))) for s in (1, 2, 31)]
    for limit, kept in ((1.5, 1), (2.0, 2), (40.0, 3)):
        good, set_aside = check_clips(rows, max_seconds=limit)
        assert len(good) == kept and all(f"allowed are 0.3 to {limit:g} s" in row["reason"] for row in set_aside)


def test_a_clip_whose_text_is_null_stops_no_corpus(tmp_path):
    path = tmp_path / "manifest.jsonl"
    rows = [make_row(write_audio(tmp_path / "a.wav", TONE), text=text) for text in (None, "Hej.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, set_aside = check_clips(read_manifest(path))
    assert len(good) == 1 and [row["reason"] for row in set_aside] == ["no text"]


def test_what_is_odd_about_a_clip_that_is_used_is_said(tmp_path):
    soundfile.write(tmp_path / "telephone.wav", TONE[::3], 8000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([TONE, 0.5 * TONE], 1), SAMPLE_RATE)
    write_audio(tmp_path / "clipped.wav", np.clip(30 * TONE, -1, 1))
    rows = [make_row(write_audio(tmp_path / "good.wav", TONE))]
    rows += [make_row(tmp_path / f"{name}.wav") for name in ("telephone", "stereo", "clipped")]
    remarks = list_remarks(rows, [make_row(tmp_path / "gone.wav") | {"reason": "no such audio file"}])
    assert remarks.used.tolist() == [False, True, True, True]
    for reason, said in zip(remarks.reason, ("no such", "nothing above 4 kHz", "2 channels", "full scale"), strict=True):
        assert said in reason


def test_text_is_not_needed_where_nothing_is_learned_from_it(tmp_path):
    assert check_clips([make_row(write_audio(tmp_path / "a.wav", TONE), text="")], need_text=False)[1] == []


def test_a_corpus_without_a_single_good_clip_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(CorpusError, match="none of 1 clips can be used: missing.wav: no such audio file"):
        check_clips([make_row(tmp_path / "missing.wav")])
