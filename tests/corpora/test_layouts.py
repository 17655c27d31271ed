"""Published corpora are read as they lie: Common Voice, LJSpeech, Kaldi, Parquet, segments of longer recordings."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, read_audio, write_audio
from csm_nb.clips.check import check_clips
from csm_nb.corpora.sources import list_rows, load_corpus
from csm_nb.manifest import CorpusError, write_manifest
from csm_nb.provenance import hash_recordings

HEADER = ("client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
          .split())


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Keep what is cut below a project of the test's own."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "project")


def make_clip(path, seconds=1.0, pitch=0.05):
    return write_audio(path, 0.1 * np.sin(np.arange(round(seconds * SAMPLE_RATE)) * pitch).astype(np.float32))


def make_common_voice(folder, sentences, locale="da", header=HEADER, table="validated.tsv"):
    lines = ["\t".join(header)]
    for number, sentence in enumerate(sentences):
        name = make_clip(folder / f"clips/common_voice_{locale}_{number}.mp3", pitch=0.05 + number / 100).name
        row = {"client_id": f"c{number % 2}", "path": name, "sentence": sentence, "up_votes": "2", "locale": locale}
        lines.append("\t".join(row.get(column, "") for column in header))
    (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_common_voice_quotes_nothing_and_null_is_a_word(tmp_path):
    sentences = ['"Nej, sagde han.', "null", "NA", "Vi ses i morgen."]
    rows = load_corpus(make_common_voice(tmp_path, sentences), "da")
    assert [row["text"] for row in rows] == sentences
    assert [row["speaker_id"] for row in rows] == ["c0", "c1", "c0", "c1"]
    assert len(check_clips(rows)[0]) == 4


@pytest.mark.parametrize(("locale", "code"), [("nb-NO", "no"), ("nn-NO", "no"), ("sv-SE", "sv")])
def test_common_voice_says_its_language_by_its_locale(tmp_path, locale, code):
    make_common_voice(tmp_path, ["En", "To"], locale)
    assert len(load_corpus(tmp_path, code)) == 2
    with pytest.raises(CorpusError, match=f"nothing of language 'da'; found: {code}"):
        load_corpus(tmp_path, "da")


def test_common_voice_takes_what_was_validated_before_a_part_of_it(tmp_path):
    make_common_voice(tmp_path, ["En"], table="train.tsv")
    assert len(load_corpus(tmp_path, "da")) == 1
    make_common_voice(tmp_path, ["En", "To"])
    assert len(load_corpus(tmp_path, "da")) == 2


def test_the_folder_above_a_corpus_and_a_file_of_it_are_refused_with_the_one_to_give(tmp_path):
    corpus = make_common_voice(tmp_path / "cv/da", ["En"])
    for given in (tmp_path / "cv", corpus / "validated.tsv"):
        with pytest.raises(CorpusError, match=f"give .*: {corpus}$|such as {corpus}"):
            load_corpus(given, "da")


def test_a_missing_column_is_an_error_that_lists_the_columns_found(tmp_path):
    make_common_voice(tmp_path, ["En"], header=["client_id", "path", "text"])
    with pytest.raises(CorpusError, match=r"validated.tsv: lacks a column of sentence .*found are client_id, path, text"):
        load_corpus(tmp_path, "da")


def test_a_line_of_too_many_columns_is_named(tmp_path):
    make_common_voice(tmp_path, ["En\tto\tre"], header=["client_id", "path", "sentence"])
    with pytest.raises(CorpusError, match="line 2 has 5 columns; the header has 3"):
        load_corpus(tmp_path, "da")


def test_ljspeech_is_one_voice_and_says_numbers_in_words(tmp_path):
    folder = tmp_path / "LJSpeech-1.1"
    make_clip(folder / "wavs/LJ001-0001.wav")
    make_clip(folder / "wavs/LJ001-0002.wav", pitch=0.06)
    (folder / "metadata.csv").write_text('LJ001-0001|In 1905, "he said|In nineteen five, "he said\nLJ001-0002|Here.|\n')
    rows = load_corpus(folder, "en")
    assert [row["text"] for row in rows] == ['In nineteen five, "he said', "Here."]
    assert {row["speaker_id"] for row in rows} == {"LJSpeech-1.1"} and len(check_clips(rows)[0]) == 2
    (folder / "metadata.csv").write_text("LJ001-0001;In 1905\n")
    with pytest.raises(CorpusError, match=r"metadata.csv: line 1 has 1 columns .*allowed is name\|text"):
        load_corpus(folder, "en")


def make_kaldi(folder, wav, segments=True):
    (folder / "wav.scp").write_text(f"rec1 {wav}\n")
    (folder / "text").write_text("u1 hej med dig\nu2 vi ses\n" if segments else "rec1 hej med dig\n")
    (folder / "utt2spk").write_text("u1 anna\nu2 bent\n" if segments else "rec1 anna\n")
    if segments:
        (folder / "segments").write_text("u1 rec1 0.00 1.00\nu2 rec1 1.00 2.50\n")
    return folder


def test_kaldi_segments_become_clips_of_their_own_samples(tmp_path):
    wav = np.concatenate([np.full(SAMPLE_RATE, 0.1), np.full(2 * SAMPLE_RATE, 0.2)]).astype(np.float32)
    write_audio(tmp_path / "rec/long.wav", wav)
    rows = load_corpus(make_kaldi(tmp_path, "rec/long.wav"), "da")
    assert [(row["text"], row["speaker_id"]) for row in rows] == [("hej med dig", "anna"), ("vi ses", "bent")]
    clips = [read_audio(row["audio_path"]) for row in rows]
    assert [len(clip) for clip in clips] == [SAMPLE_RATE, 1.5 * SAMPLE_RATE]
    np.testing.assert_allclose([clip.mean() for clip in clips], [0.1, 0.2], atol=1e-3)
    assert load_corpus(tmp_path, "da") == rows


def test_kaldi_without_segments_is_whole_recordings_and_their_bytes_count_wherever_they_lie(tmp_path):
    (tmp_path / "data").mkdir()
    wav = make_clip(tmp_path / "elsewhere/a.wav")
    folder = make_kaldi(tmp_path / "data", wav, segments=False)
    assert [row["audio_path"] for row in load_corpus(folder, "da")] == [str(wav)]
    before = hash_recordings(folder)
    make_clip(wav, pitch=0.07)
    assert hash_recordings(folder) != before


@pytest.mark.parametrize(("name", "content", "message"), [
    ("wav.scp", "rec1 sph2pipe -f wav a.sph |\n", r"rec1 is made by a command .*sph2pipe -f wav a.sph > rec1.wav"),
    ("segments", "u1 rec9 0 1\n", "u1 has 'rec9 0 1'; allowed is a recording of wav.scp"),
    ("segments", "u1 rec1 0 x\n", "allowed are seconds"),
    ("utt2spk", "u1 anna\n", "says no speaker of u2"), ("utt2spk", None, "lacks utt2spk beside wav.scp; found are"),
])  # fmt: skip
def test_a_kaldi_folder_that_can_not_be_read_says_what_to_do(tmp_path, name, content, message):
    make_kaldi(tmp_path, make_clip(tmp_path / "a.wav", 3.0))
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(tmp_path, "da")


def make_parquet(folder, count=6, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    clips = [make_clip(folder.parent / f"made/{number}.wav", pitch=0.05 + number / 50).read_bytes() for number in range(count)]
    table = {"text": [f"nummer {number}" for number in range(count)], "speaker_id": [number % 2 for number in range(count)],
             "audio": [{"bytes": clip, "path": f"{number}.wav"} for number, clip in enumerate(clips)]}  # fmt: skip
    table = {name: values for name, values in (table | columns).items() if values is not None}
    pq.write_table(pa.table(table), folder / "train-00000-of-00001.parquet", row_group_size=2)
    return clips


def test_parquet_writes_out_the_clips_that_are_drawn_by_their_own_bytes(tmp_path):
    clips = make_parquet(tmp_path / "set/data")
    rows = load_corpus(tmp_path / "set", "da")
    with_bytes = [open(row["audio_path"], "rb").read() for row in rows]
    assert with_bytes == clips and [row["speaker_id"] for row in rows] == ["0", "1"] * 3
    assert [row["text"] for row in rows] == [f"nummer {number}" for number in range(6)]
    for path in (tmp_path / "project/data/clips").iterdir():
        path.unlink()
    assert len(load_corpus(tmp_path / "set", "da", 3)) == len(list((tmp_path / "project/data/clips").iterdir())) == 3
    assert len(list_rows(tmp_path / "set", "da")) == 6


def test_parquet_reads_what_is_for_training_alone(tmp_path):
    make_parquet(tmp_path / "set")
    (tmp_path / "set/train-00000-of-00001.parquet").rename(tmp_path / "set/test-00000-of-00001.parquet")
    assert len(load_corpus(tmp_path / "set", "da")) == 6
    make_parquet(tmp_path / "set", 2)
    assert len(load_corpus(tmp_path / "set", "da")) == 2


def test_parquet_of_voxpopuli_takes_the_plain_text_for_an_empty_one_and_sets_aside_who_is_not_known(tmp_path):
    make_parquet(tmp_path / "set", 3, text=None, raw_text=["", "Ja.", "Nej."], normalized_text=["hallo", "ja", "nej"],
                 speaker_id=["7", "None", "8"], language=[2, 2, 2])
    good, set_aside = check_clips(load_corpus(tmp_path / "set", "de"))
    assert [row["text"] for row in good] == ["hallo", "Nej."]
    assert [row["reason"] for row in set_aside] == ["no speaker is said of it"]


def test_parquet_without_a_speaker_lists_the_columns_found(tmp_path):
    make_parquet(tmp_path / "set", speaker_id=None)
    with pytest.raises(CorpusError, match=r"lacks a column of speaker \(speaker_id or .*found are text, audio"):
        load_corpus(tmp_path / "set", "da")


def test_parquet_audio_may_be_a_file_below_its_folder_and_no_other(tmp_path):
    make_parquet(tmp_path / "set", 2, audio=["clips/a.wav", "../made/0.wav"])
    make_clip(tmp_path / "set/clips/a.wav")
    good, set_aside = check_clips(load_corpus(tmp_path / "set", "da"))
    assert len(good) == 1 and "'../made/0.wav' is no file below its folder" in set_aside[0]["reason"]


def break_group(path, group, column):
    """Overwrite a column of a row group with noise."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    chunk = next(metadata.column(n) for n in range(metadata.num_columns) if metadata.column(n).path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    data[first : first + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


@pytest.mark.parametrize("column", ["text", "audio"])
def test_a_broken_row_group_sets_its_own_clips_aside_and_no_others(tmp_path, column):
    make_parquet(tmp_path / "set")
    break_group(tmp_path / "set/train-00000-of-00001.parquet", 1, column)
    good, set_aside = check_clips(load_corpus(tmp_path / "set", "da"))
    assert [row["text"] for row in good] == [f"nummer {number}" for number in (0, 1, 4, 5)]
    assert [row["kind"] for row in set_aside] == ["unreadable"] * 2
    assert all("row group 1 of train-00000-of-00001.parquet can not be read" in row["reason"] for row in set_aside)


@pytest.mark.parametrize("layout", ["parquet", "segments"])
def test_a_full_disk_is_an_error_that_keeps_what_was_cut(tmp_path, monkeypatch, layout):
    if layout == "parquet":
        make_parquet(tmp_path / "set", 4)
    else:
        (tmp_path / "set").mkdir()
        make_kaldi(tmp_path / "set", make_clip(tmp_path / "long.wav", 4.0))
    write, written = type(tmp_path).write_bytes, []

    def fail(path, content):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    with pytest.raises(CorpusError, match=r"No space left on device.; the 1 clips in data/clips stay, .*Make room"):
        load_corpus(tmp_path / "set", "da")
    written.clear()
    monkeypatch.setattr(type(tmp_path), "write_bytes", lambda path, content: written.append(path) or write(path, content))
    rows = load_corpus(tmp_path / "set", "da")
    assert len(written) == len(rows) - 1  # what was cut is not cut again


def test_a_manifests_start_and_end_cut_a_longer_recording_and_shift_its_windows(tmp_path):
    wav = make_clip(tmp_path / "long.wav", 3.0)
    row = {"text": "hej", "audio_path": str(wav), "speaker_id": "a", "language": "da"}
    path = write_manifest([row | {"start": 1.0, "end": 2.5, "windows": [[1.25, 1.5, 1], [0.0, 0.5, 0]]},
                           row | {"start": 0.0, "end": 3.0}, row | {"start": 2.0, "end": 9.0}], tmp_path / "manifest.jsonl")
    good, set_aside = check_clips(load_corpus(path, "da"))
    assert [one["duration"] for one in good] == [1.5, 3.0] and good[0]["windows"] == [[0.25, 0.5, True]]
    assert good[1]["audio_path"] == str(wav) and "from 2 to 9 s of a recording of 3.00 s" in set_aside[0]["reason"]
