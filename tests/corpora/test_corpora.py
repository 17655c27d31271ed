"""A corpus is read as it is written, and one bad clip is set aside and stops nothing."""

import json
import unicodedata

import numpy as np
import pytest
import soundfile

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.clips.check import check_clips, list_remarks
from csm_nb.codec.mimi import load_codec
from csm_nb.corpora.sources import load_corpus
from csm_nb.corpora.tokens import TokensError, read_tokens, write_tokens
from csm_nb.manifest import SCHEMA, CorpusError, read_manifest, write_manifest
from csm_nb.prosody.marks import find_windows
from csm_nb.provenance import hash_recordings

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
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
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


@pytest.mark.parametrize("label", ["DA", "dan", "da-DK", "da_DK", "Danish", " da "])
def test_a_language_is_known_by_any_of_its_usual_names(tmp_path, label):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(make_row("a.wav", language=label)))
    assert [row["language"] for row in load_corpus(path, "da")] == ["da"]


def test_a_folder_of_clips_in_another_format_says_which_are_read_and_how_to_convert(tmp_path):
    for name in ("a.m4a", "b.m4a", "a.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(CorpusError, match=r"among 2 .m4a, 1 .txt; clips are .wav .flac .*ffmpeg -i clip.m4a clip.wav\)"):
        load_corpus(tmp_path, "da")
    (tmp_path / "a.pcm").write_text("PCM44")  # NST's Swedish voice: its header is described nowhere
    with pytest.raises(CorpusError, match="-f s16le -ar 44100 -ac 2 -i clip.pcm clip.wav, with -skip_initial_bytes N"):
        load_corpus(tmp_path, "da")


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


@pytest.mark.parametrize(("field", "value", "message"), [
    ("text", ["x"], r"has \['x'\] as text; allowed is a text"), ("text", True, "has True as text"),
    ("text", float("inf"), "has inf as text"), ("text", "x\ud800", "holds half a character"),
    ("speaker_id", {}, "has {} as speaker_id; allowed is a name or a number"), ("speaker_id", float("nan"), "lacks speaker_id"),
    ("speaker_id", " ", "has ' ' as speaker_id"), ("language", False, "has False as language; allowed is the code"),
    ("duration", "abc", "has 'abc' as duration; allowed is seconds, such as 1.2"), ("duration", -1, "has -1 as duration"),
    ("duration", True, "has True as duration"), ("start", "1,5", "has '1,5' as start"),
    ("stod", "perhaps", "has 'perhaps' as stod; allowed is 1 or 0"), ("stod", 2, "has 2 as stod"),
    ("stod", [], r"has \[\] as stod"),
    ("windows", [[1, 0.5, 1]], "has .* as windows; allowed is a list of"), ("windows", 3, "has 3 as windows"),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_with_line_and_field(tmp_path, field, value, message):
    rows = [make_row("a.wav"), make_row("a.wav") | {field: value}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CorpusError, match=f"manifest.jsonl: line 2 {message}"):
        read_manifest(tmp_path / "manifest.jsonl")


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
    assert [row["kind"] for row in set_aside] == ["unreadable", "unreadable", "no text", "silent", "too short", "too long"]


def test_a_clip_longer_than_the_limit_that_was_given_is_set_aside(tmp_path):
    rows = [make_row(write_audio(tmp_path / f"{s}.wav", np.tile(TONE, s)), text="Hej med dig. " * s) for s in (1, 2, 31)]
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
    rows, _ = check_clips(rows, need_text=False)
    remarks = list_remarks(rows, [make_row(tmp_path / "gone.wav") | {"reason": "no such audio file"}])
    assert remarks.used.tolist() == [False, True, True, True]
    assert remarks.kind.tolist() == ["", "band-limited", "channels", "clipped"]
    for reason, said in zip(remarks.reason, ("no such", "nothing above 4 kHz", "2 channels", "full scale"), strict=True):
        assert said in reason


def test_text_is_not_needed_where_nothing_is_learned_from_it(tmp_path):
    assert check_clips([make_row(write_audio(tmp_path / "a.wav", TONE), text="")], need_text=False)[1] == []


def test_a_corpus_without_a_single_good_clip_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(CorpusError, match="none of 1 clips can be used: missing.wav: no such audio file"):
        check_clips([make_row(tmp_path / "missing.wav")])


def test_all_bad_lines_of_a_manifest_are_named_at_once(tmp_path):
    lines = [json.dumps(make_row("a.wav", duration=value)) for value in (1, "x", 2, "y")]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match="line 2 has 'x' as duration.*line 4 has 'y' as duration"):
        read_manifest(tmp_path / "manifest.jsonl")


@pytest.mark.parametrize(("field", "value", "converted"), [
    ("text", 1905, "1905"), ("text", 1905.0, "1905"), ("text", 2.5, "2.5"), ("text", 10**20 + 1, "100000000000000000001"),
    ("text", "  Hej\u00a0du… ", "Hej du..."), ("text", None, ""), ("text", float("nan"), ""),
    ("speaker_id", 4, "4"), ("speaker_id", 4.0, "4"), ("speaker_id", "A\u030ase", "Åse"), ("language", " da ", "da"),
    ("duration", "1.2", 1.2), ("duration", 1, 1.0), ("duration", float("nan"), None), ("duration", "", None),
    ("stod", 0, False), ("stod", 1, True), ("stod", "0", False), ("stod", "1", True), ("stod", 1.0, True), ("stod", False, False),
    ("stod", "false", False), ("stod", "", None), ("stod", None, None), ("stod", float("nan"), None),
    ("start", "0.5", 0.5), ("end", 2, 2.0), ("windows", [["0.1", 0.4, "0"]], [[0.1, 0.4, False]]),
    ("age", "12", "12"), ("note", {"a": [1]}, {"a": [1]}),
])
def test_a_field_is_converted_once_by_the_schema(tmp_path, field, value, converted):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(make_row("a.wav") | {field: value}))
    (row,) = read_manifest(path)
    assert row[field] == converted and type(row[field]) is type(converted)
    assert set(SCHEMA) >= {"text", "audio_path", "speaker_id", "language", "duration", "stod"}


def test_what_passed_the_door_is_marked_encoded_and_read_back(tmp_path):
    """The three faults that were found behind it: a number as text, NaN as text, "0" as stød."""
    audio = write_audio(tmp_path / "a.wav", TONE)
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(make_row(audio, text=text, stod="0", duration="1.2")) for text in (1905, float("nan"))))
    good, set_aside = check_clips(read_manifest(path))
    assert [row["reason"] for row in set_aside] == ["no text"]
    found, _ = find_windows([row | {"windows": [[0.1, 0.4, row["stod"]]]} for row in good])
    assert found[0]["windows"] == [[0.1, 0.4, False]]
    codec = load_codec("models/csm-mini")
    made = write_tokens(good, codec, tmp_path)
    assert read_tokens(made["path"], codec)[0]["text"] == "1905"


def test_a_row_that_parquet_will_not_take_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("csm_nb.corpora.tokens.encode", lambda codec, wavs: pytest.fail("encoded"))
    rows = [make_row(write_audio(tmp_path / "a.wav", TONE))]
    for text in (None, 1905, float("nan"), "x\ud800"):
        with pytest.raises(TokensError, match="a.wav has .* as text"):
            write_tokens([*rows, rows[0] | {"text": text}], load_codec("models/csm-mini"), tmp_path)


def test_a_transcript_in_another_encoding_sets_its_clip_aside_and_no_other(tmp_path):
    for name, data in {"a": "Blåbær.".encode(), "b": "Blåbær.".encode("latin-1"), "c": "Blåbær.".encode("utf-16")}.items():
        write_audio(tmp_path / f"{name}.wav", TONE[: -ord(name)])
        (tmp_path / f"{name}.txt").write_bytes(data)
    good, set_aside = check_clips(load_corpus(tmp_path, "da"))
    assert [row["text"] for row in good] == ["Blåbær.", "Blåbær."]
    assert [row["audio_path"] for row in set_aside] == [str(tmp_path / "b.wav")]
    assert "b.txt, line 1: not UTF-8" in set_aside[0]["reason"] and "iconv" in set_aside[0]["reason"]


def test_a_manifest_line_in_another_encoding_sets_its_clip_aside_with_its_line(tmp_path):
    lines = [json.dumps(make_row(write_audio(tmp_path / f"{i}.wav", TONE[i:]), text="på"), ensure_ascii=False) for i in range(3)]
    data = [line.encode("latin-1" if i == 1 else "utf-8") for i, line in enumerate(lines)]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(data))
    for need_text in (True, False):
        good, set_aside = check_clips(read_manifest(tmp_path / "manifest.jsonl"), need_text=need_text)
        assert [row["text"] for row in good] == ["på", "på"]
        assert ["manifest.jsonl, line 2: not UTF-8" in row["reason"] for row in set_aside] == [True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_manifest_with_a_byte_order_mark_is_read_and_its_clips_count_in_its_hash(tmp_path, encoding):
    audio, path = write_audio(tmp_path / "a.wav", TONE), tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(make_row("a.wav", text="på\u2028\u0085nu"), ensure_ascii=False) + "\n", encoding=encoding)
    assert [row["text"] for row in read_manifest(path)] == ["på nu"]
    before = hash_recordings(path)
    write_audio(audio, TONE[:9000])
    assert hash_recordings(path) != before


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_clip_whose_name_is_in_the_other_unicode_form_is_found(tmp_path, written, on_disk):
    write_audio(tmp_path / unicodedata.normalize(on_disk, "lyd på/blå.wav"), TONE)
    row = make_row(unicodedata.normalize(written, "lyd på/blå.wav"))
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    assert len(check_clips(read_manifest(tmp_path / "manifest.jsonl"))[0]) == 1
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / unicodedata.normalize(on_disk, "lyd på") / unicodedata.normalize(written, "blå.TXT")).write_text("Hej.")
    rows = load_corpus(tmp_path, "da")
    assert [(row["text"], row["speaker_id"]) for row in rows] == [("Hej.", "lyd på")]


def test_a_text_without_a_letter_or_digit_is_nothing_to_say(tmp_path):
    rows = [make_row(write_audio(tmp_path / f"{i}.wav", TONE[i:]), text=text) for i, text in enumerate(("...", "-", "7", "nå"))]
    good, set_aside = check_clips(rows)
    assert [row["text"] for row in good] == ["7", "nå"] and "nothing to say in its text '...'" in set_aside[0]["reason"]
