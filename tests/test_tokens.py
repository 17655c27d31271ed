"""Tokens are made once, survive a kill, and belong to one codec and one corpus."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from csm_nb import tokens
from csm_nb.audio import read_audio
from csm_nb.codec import encode, load_codec
from csm_nb.corpora import read_manifest
from csm_nb.params import ROOT
from csm_nb.synth import make_corpus
from csm_nb.texts import make_sentences
from csm_nb.tokens import TokensError, read_tokens, write_tokens


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
from csm_nb import tokens
from csm_nb.codec import encode, load_codec
from csm_nb.corpora import read_manifest
torch.set_num_threads({torch.get_num_threads()})  # with another number the last digits differ, and a code at a tie with them
tokens.PART_CLIPS = 2
tokens.encode = lambda codec, wavs: time.sleep(0.5) or encode(codec, wavs)
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


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(TokensError, match="gone.parquet: no such token file"):
        read_tokens(tmp_path / "gone.parquet")
