"""Tokens are made once, survive a kill, and belong to one codec and one corpus."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from csm_nb.audio import read_audio
from csm_nb.codec.mimi import encode, load_codec
from csm_nb.corpora import tokens
from csm_nb.corpora.tokens import TokensError, read_tokens, write_tokens
from csm_nb.manifest import read_manifest
from csm_nb.paths import ROOT
from csm_nb.synth.corpus import make_corpus
from csm_nb.text.sentences import make_sentences


@pytest.fixture(scope="module")
def codec():
    return load_codec("models/csm-mini")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(make_sentences("da", 10), "da", tmp_path_factory.mktemp("corpus"))


def test_what_is_read_is_what_the_codec_gives_for_each_clip(codec, corpus, tmp_path):
    rows = read_manifest(corpus)
    write_tokens(rows, codec, tmp_path / "tokens.parquet")
    found = read_tokens(tmp_path / "tokens.parquet", codec)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    for row, token_row in zip(rows, found, strict=True):
        (codes,) = encode(codec, [read_audio(row["audio_path"])])
        assert token_row["codes"].dtype == np.uint16 and np.array_equal(token_row["codes"], codes)
        assert token_row["duration"] == pytest.approx(row["duration"], abs=1e-3)


def test_the_same_rows_are_not_encoded_twice_and_other_rows_are(codec, corpus, tmp_path, monkeypatch):
    rows, encoded = read_manifest(corpus), []
    monkeypatch.setattr(tokens, "encode", lambda codec, wavs: encoded.append(len(wavs)) or encode(codec, wavs))
    for used in (rows, rows, rows[:4]):
        assert write_tokens(used, codec, tmp_path / "tokens.parquet")["clips"] == len(used)
    assert encoded == [10, 4]


def test_a_killed_run_keeps_its_finished_parts_and_goes_on(codec, corpus, tmp_path, monkeypatch):
    code = f"""
import time
import torch
from csm_nb.corpora import tokens
from csm_nb.codec import mimi
from csm_nb.codec.mimi import encode, load_codec
from csm_nb.manifest import read_manifest
torch.set_num_threads({torch.get_num_threads()})  # with another number the last digits differ, and a code at a tie with them
tokens.PART_CLIPS = 2
mimi.encode = lambda codec, wavs: time.sleep(0.5) or encode(codec, wavs)
tokens.write_tokens(read_manifest({str(corpus)!r}), load_codec("models/csm-mini"), {str(tmp_path / "tokens.parquet")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (parts := list(tmp_path.glob("*.parts/00000002.parquet"))) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert parts and not (tmp_path / "tokens.parquet").exists()
    encoded = []
    monkeypatch.setattr(tokens, "PART_CLIPS", 2)
    monkeypatch.setattr(tokens, "encode", lambda codec, wavs: encoded.append(len(wavs)) or encode(codec, wavs))
    result = write_tokens(read_manifest(corpus), codec, tmp_path / "tokens.parquet")
    assert result["clips"] == 10 and 0 < sum(encoded) < 8
    whole = write_tokens(read_manifest(corpus), codec, tmp_path / "whole.parquet")
    for ours, theirs in zip(read_tokens(result["path"]), read_tokens(whole["path"]), strict=True):
        assert np.array_equal(ours["codes"], theirs["codes"])


def test_a_clip_that_does_not_read_is_set_aside_with_the_reason(codec, corpus, tmp_path):
    rows = read_manifest(corpus)[:3]
    rows[1] |= {"audio_path": str(tmp_path / "gone.wav")}
    result = write_tokens(rows, codec, tmp_path / "tokens.parquet")
    assert result["clips"] == 2
    assert [row["text"] for row in result["set_aside"]] == [rows[1]["text"]]
    assert "no such audio file" in result["set_aside"][0]["reason"]


def test_tokens_of_another_codec_are_refused_and_made_again(codec, corpus, tmp_path):
    rows = read_manifest(corpus)[:2]
    path = write_tokens(rows, codec, tmp_path / "tokens.parquet")["path"]
    other = load_codec("models/csm-mini")
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(-1)
    before = read_tokens(path)[0]["codes"]
    write_tokens(rows, other, path)
    assert not np.array_equal(before, read_tokens(path)[0]["codes"])
    other.config.codebook_size = 2048
    with pytest.raises(TokensError, match="another codec.*512.*2048"):
        read_tokens(path, other)


def make_file(path, clips, **metadata):
    """A token file of codes that are given, made without a codec."""
    table = pa.table({
        "text": [f"Nr. {i}" for i in range(len(clips))], "codes": [np.asarray(codes).tolist() for codes in clips],
        "speaker_id": ["7"] * len(clips), "language": ["da"] * len(clips), "duration": [len(codes) / 12.5 for codes in clips],
    }, schema=tokens._SCHEMA)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_every_row_is_strings_and_a_matrix_of_16_bit_codes_even_of_one_frame(tmp_path):
    clips = [np.full((frames, 32), 2050, np.uint16) for frames in (1, 3, 1)]
    rows = read_tokens(make_file(tmp_path / "t.parquet", clips))
    for row, again, codes in zip(rows, (rows[i] for i in range(len(rows))), clips, strict=True):
        for found in (row, again):
            assert found["codes"].dtype == np.uint16 and np.array_equal(found["codes"], codes)
            assert type(found["text"]) is str and found["speaker_id"] == "7"
    assert [len(codes) for codes in rows.select([1, 2])["codes"]] == [3, 1] and list(rows["text"])[0] == "Nr. 0"


def test_rows_stay_on_disk(tmp_path):
    path = make_file(tmp_path / "t.parquet", np.random.default_rng(0).integers(0, 2051, (400, 100, 32)))
    read_tokens(path)  # makes the copy that is mapped
    before = pa.total_allocated_bytes()
    rows = read_tokens(path)
    assert len(rows) == 400 and pa.total_allocated_bytes() - before < path.stat().st_size / 10


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    for code in (1, 2, 1):
        assert read_tokens(make_file(tmp_path / "t.parquet", [[[code] * 8]]))[0]["codes"][0, 0] == code


def test_writing_tokens_again_leaves_no_copy_of_the_old_ones(codec, corpus, tmp_path):
    rows = read_manifest(corpus)
    for count in (3, 2):
        path = write_tokens(rows[:count], codec, tmp_path / "tokens.parquet")["path"]
        assert len(read_tokens(path)) == count
    assert len(list(tmp_path.rglob("*.arrow"))) == 1


def test_reading_tokens_prints_nothing(tmp_path, capfd):
    read_tokens(make_file(tmp_path / "t.parquet", [[[1] * 8]]))
    assert capfd.readouterr() == ("", "")


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(TokensError, match="gone.parquet: no such token file"):
        read_tokens(tmp_path / "gone.parquet")


def test_missing_columns_are_named_beside_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "tokens": [[1]]}), tmp_path / "t.parquet")
    with pytest.raises(TokensError, match="lacks the columns codes, speaker_id, language, duration; found are text, tokens"):
        read_tokens(tmp_path / "t.parquet")


def test_a_file_without_a_clip_is_refused_with_the_reason_why_none_is_left(codec, corpus, tmp_path):
    path = write_tokens([read_manifest(corpus)[0] | {"audio_path": "/gone.wav"}], codec, tmp_path / "tokens.parquet")["path"]
    with pytest.raises(TokensError, match="holds no clip; 1 were set aside.*no such audio file"):
        read_tokens(path, codec)


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:-300], lambda whole: whole[:4] + bytes(300) + whole[304:],
], ids=["empty", "truncated", "overwritten"])
def test_a_broken_file_is_refused_with_what_to_do(tmp_path, damage, capfd):
    path = make_file(tmp_path / "t.parquet", np.random.default_rng(0).integers(0, 2051, (4, 50, 32)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TokensError, match="t.parquet can not be read .*delete it and run again"):
        read_tokens(path)
    assert capfd.readouterr() == ("", "")


def test_a_broken_file_is_made_again(codec, corpus, tmp_path):
    rows = read_manifest(corpus)[:2]
    path = write_tokens(rows, codec, tmp_path / "tokens.parquet")["path"]
    path.write_bytes(path.read_bytes()[:-300])
    write_tokens(rows, codec, path)
    assert len(read_tokens(path, codec)) == 2
