"""Tokens are made once, survive a kill, and belong to one codec and one corpus."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from csm_nb import paths
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
    found = read_tokens(write_tokens(rows, codec, tmp_path)["path"], codec)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    for row, token_row in zip(rows, found, strict=True):
        (codes,) = encode(codec, [read_audio(row["audio_path"])])
        assert token_row["codes"].dtype == np.uint16 and np.array_equal(token_row["codes"], codes)
        assert token_row["duration"] == pytest.approx(row["duration"], abs=1e-3)
        assert set(token_row) == {"text", "codes", "speaker_id", "language", "duration"}


@pytest.fixture
def encoded(monkeypatch):
    """The number of clips of each call of the codec."""
    counts = []
    monkeypatch.setattr(tokens, "encode", lambda codec, wavs: counts.append(len(wavs)) or encode(codec, wavs))
    return counts


@pytest.fixture
def own(corpus, tmp_path):
    """The rows of a copy of the corpus that a test may write to."""
    shutil.copytree(corpus.parent, tmp_path / "own")
    return read_manifest(tmp_path / "own" / corpus.name)


def test_the_same_corpus_has_the_same_folder_and_no_clip_of_any_corpus_is_encoded_twice(codec, own, tmp_path, encoded):
    first = write_tokens(own, codec, tmp_path)
    again, part, turned = (write_tokens(rows, codec, tmp_path) for rows in (own, own[:4], own[::-1]))
    assert first["path"] == again["path"] and len({made["path"] for made in (first, part, turned)}) == 3
    assert encoded == [10] and first["path"].parent == tmp_path / "tokens"
    assert [(made["encoded"], made["found"]) for made in (first, again, part, turned)] == [(10, 0), (0, 0), (0, 4), (0, 10)]
    for ours, theirs in zip(read_tokens(turned["path"]), list(read_tokens(first["path"]))[::-1], strict=True):
        assert np.array_equal(ours["codes"], theirs["codes"]) and ours["duration"] == theirs["duration"]


def test_an_edited_text_or_speaker_encodes_nothing(codec, own, tmp_path, encoded):
    before = write_tokens(own, codec, tmp_path)
    own[3] = own[3] | {"text": "Noget andet.", "speaker_id": "8"}
    after = write_tokens(own, codec, tmp_path)
    assert encoded == [10] and after["path"] != before["path"]
    assert [(row["text"], row["speaker_id"]) for row in read_tokens(after["path"])][3] == ("Noget andet.", "8")


def test_an_overwritten_clip_of_the_same_size_and_time_is_encoded_alone(codec, own, tmp_path, encoded):
    path, other = (Path(own[i]["audio_path"]) for i in (3, 4))
    before, status = write_tokens(own, codec, tmp_path)["path"], path.stat()
    wav, rate = soundfile.read(path, dtype="int16")
    soundfile.write(path, wav[::-1], rate, subtype="PCM_16")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = write_tokens(own, codec, tmp_path)
    assert encoded == [10, 1] and (after["encoded"], after["found"]) == (1, 9)
    same = [np.array_equal(a["codes"], b["codes"]) for a, b in zip(read_tokens(before), read_tokens(after["path"]), strict=True)]
    assert same == [i != 3 for i in range(10)]
    other.touch()  # read again, and found to be the same
    assert write_tokens(own, codec, tmp_path)["path"] == after["path"]


WRITER = """
import os, sys, time, torch
from pathlib import Path
from csm_nb import paths
from csm_nb.corpora import tokens
from csm_nb.codec.mimi import encode, load_codec
from csm_nb.manifest import read_manifest
torch.set_num_threads({threads})  # with another number the last digits differ, and a code at a tie with them
tokens.SHARD_CLIPS = 2
def wait_and_encode(codec, wavs):  # nobody gets far before all have begun, however slow the machine
    Path({data!r}, f"{{os.getpid()}}.began").touch()
    while len([*Path({data!r}).glob("*.began")]) < {count}:
        time.sleep(0.01)
    time.sleep({seconds})
    return encode(codec, wavs)
tokens.encode = wait_and_encode
rows, codec = read_manifest({corpus!r}), load_codec("models/csm-mini")
print("ready", flush=True)
sys.stdin.readline()
print(tokens.write_tokens(rows, codec, {data!r})["encoded"])
"""


def start_writers(count, corpus, data, seconds):
    """Processes that write the corpus's tokens, all ready before the first begins."""
    code = WRITER.format(threads=torch.get_num_threads(), seconds=seconds, count=count, corpus=str(corpus), data=str(data))
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    return writers


def test_a_killed_writer_loses_a_shard_at_most(codec, corpus, tmp_path, monkeypatch, encoded):
    monkeypatch.setattr(tokens, "SHARD_CLIPS", 2)
    (process,) = start_writers(1, corpus, tmp_path, 0.5)
    while len(parts := list(tmp_path.glob("tokens/*/part-*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(TokensError, match="of 5 shards; run again"):
        read_tokens(parts[0].parent)
    result = write_tokens(read_manifest(corpus), codec, tmp_path)
    assert result["path"] == parts[0].parent and result["clips"] == 10 and 0 < sum(encoded) < 8
    whole = write_tokens(read_manifest(corpus), codec, tmp_path / "whole")
    for ours, theirs in zip(read_tokens(result["path"]), read_tokens(whole["path"]), strict=True):
        assert np.array_equal(ours["codes"], theirs["codes"])


def test_two_writers_at_once_make_one_whole_data_set_and_no_clip_twice(corpus, tmp_path):
    writers = start_writers(2, corpus, tmp_path, 0.3)
    encoded = [int(writer.communicate(timeout=120)[0].splitlines()[-1]) for writer in writers]
    assert sum(encoded) == 10 and min(encoded) > 0
    (folder,) = {path.parent for path in tmp_path.glob("tokens/*/part-*.parquet")}
    assert [row["text"] for row in read_tokens(folder)] == [row["text"] for row in read_manifest(corpus)]


def test_a_clip_that_does_not_read_is_set_aside_with_the_reason(codec, own, tmp_path):
    rows = own[:3]
    rows[1] = rows[1] | {"audio_path": str(tmp_path / "gone.wav")}
    result = write_tokens(rows, codec, tmp_path)
    assert result["clips"] == len(read_tokens(result["path"])) == 2
    assert [row["text"] for row in result["set_aside"]] == [rows[1]["text"]]
    assert "no such audio file" in result["set_aside"][0]["reason"]


def test_another_codec_has_a_folder_of_its_own_and_its_codes_are_refused_by_this_one(codec, own, tmp_path, encoded):
    path = write_tokens(own[:2], codec, tmp_path)["path"]
    other = load_codec("models/csm-mini")
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(-1)
    theirs = write_tokens(own[:2], other, tmp_path)["path"]
    assert encoded == [2, 2] and not np.array_equal(read_tokens(path)[0]["codes"], read_tokens(theirs)[0]["codes"])
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


def test_reading_tokens_prints_nothing(tmp_path, capfd):
    read_tokens(make_file(tmp_path / "t.parquet", [[[1] * 8]]))
    assert capfd.readouterr() == ("", "")


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(TokensError, match="gone.parquet: no such tokens; write_tokens makes them"):
        read_tokens(tmp_path / "gone.parquet")


def test_missing_columns_are_named_beside_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "tokens": [[1]]}), tmp_path / "t.parquet")
    with pytest.raises(TokensError, match="lacks the columns codes, speaker_id, language, duration; found are text, tokens"):
        read_tokens(tmp_path / "t.parquet")


def test_a_file_without_a_clip_is_refused_with_the_reason_why_none_is_left(codec, corpus, tmp_path):
    path = write_tokens([read_manifest(corpus)[0] | {"audio_path": "/gone.wav"}], codec, tmp_path)["path"]
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


@pytest.mark.parametrize("keep", [-300, 0])
def test_a_broken_shard_is_named_and_made_again_from_nothing_else(codec, own, tmp_path, monkeypatch, encoded, keep):
    monkeypatch.setattr(tokens, "SHARD_CLIPS", 4)
    path = write_tokens(own, codec, tmp_path)["path"]
    broken = path / "part-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(TokensError, match="part-00001.parquet can not be read .*delete it and run again"):
        read_tokens(path, codec)
    assert write_tokens(own, codec, tmp_path)["encoded"] == 4 and len(read_tokens(path, codec)) == 10
    assert sorted(encoded[:3]) == [2, 4, 4] and encoded[3:] == [4]


def test_what_is_remembered_of_the_audio_may_be_lost_or_broken(codec, own, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    path = write_tokens(own, codec, tmp_path)["path"]
    memory = tmp_path / "data" / "hashes.json"
    memory.parent.mkdir()
    for content in ("{", None):
        memory.unlink() if content is None else memory.write_text(content)
        assert write_tokens(own, codec, tmp_path)["path"] == path
    assert encoded == [10]
