"""Whoever writes the shards of a corpus, and however often they are killed, its bytes are the same, and no clip is lost."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from csm_nb.codec.mimi import encode, load_codec
from csm_nb.corpora import tokens, workers
from csm_nb.corpora.__main__ import main
from csm_nb.corpora.tokens import TokensError, read_tokens, write_tokens
from csm_nb.manifest import write_manifest
from csm_nb.processes import identify_process, is_running
from csm_nb.recipe import ParameterError

CLIPS, MAKE = 12, tokens._make_shard
SERVER = multiprocessing.get_context("forkserver")  # imports once; its children start in a moment
SERVER.set_forkserver_preload(["csm_nb.corpora.tokens", "csm_nb.codec.mimi"])


@pytest.fixture(scope="module")
def codec():
    return load_codec("models/csm-mini")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Clips of .1 to 1 s of noise at several rates, one twice, and one that does not read."""
    folder, rng, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for i in range(CLIPS):
        rate, suffix = ((24000, "wav"), (16000, "flac"), (44100, "wav"))[i % 3]
        file = folder / f"{i}.{suffix}"
        if i == 5:
            file.write_bytes(b"no audio")
        else:
            soundfile.write(file, 0.1 * rng.standard_normal(rate * (1 + i) // 10), rate)
        rows.append({"text": f"Nr. {i}", "audio_path": str(file), "speaker_id": "7", "language": "da"})
    return rows + [rows[3] | {"text": "Nr. 3 igen"}]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_CLIPS", 1)


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(codec, rows, tmp_path_factory):
    """The bytes of every file, as one process writes them that nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SHARD_CLIPS", 1)
        made = write_tokens(rows, codec, tmp_path_factory.mktemp("whole"))
    assert (made["clips"], made["encoded"] + made["found"], len(made["set_aside"])) == (CLIPS, CLIPS, 1)
    return read_bytes(made["path"])


def write_until(moment, count, rows, data, reached):
    """Write tokens, and wait to be killed when `moment` comes for the `count`th time."""
    tokens.SHARD_CLIPS, left = 1, [count]
    encode, write_table, replace = tokens.encode, pq.write_table, os.replace

    def stop_at(name):
        left[0] -= name == moment
        if left[0] == 0:
            Path(reached).touch()
            signal.pause()

    def write_half(table, part, **how):
        write_table(table, part, **how)
        if moment == "half a shard":
            os.truncate(part, os.path.getsize(part) // 2)
            stop_at(moment)
            write_table(table, part, **how)

    def replace_and_stop(part, path):
        replace(part, path)
        stop_at("planned" if Path(path).name == "tokens.json" else "written")

    tokens.encode = lambda codec, wavs: (stop_at("encoding"), encode(codec, wavs))[1]
    pq.write_table, os.replace = write_half, replace_and_stop
    write_tokens(rows, load_codec("models/csm-mini"), data)


def kill_when(reached, start):
    """Start a process, and kill it when it has made the file `reached`."""
    process = start()
    while not reached.exists():
        assert is_running(identify_process(process.pid)), "it ended before"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    return process


def test_a_writer_that_is_killed_again_and_again_leaves_the_bytes_of_one_that_was_not(rows, codec, whole, tmp_path):
    for number, kill in enumerate([("planned", 1), ("encoding", 1), ("half a shard", 2), ("written", 2), ("encoding", 3)]):
        reached = tmp_path / f"reached {number}"
        process = SERVER.Process(target=write_until, args=(*kill, rows, tmp_path, reached))
        kill_when(reached, lambda process=process: process.start() or process)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "tokens").iterdir()
    there = set(folder.glob("part-*.parquet"))
    assert 3 <= len(there) < len(rows) and set(folder.glob(".part-*.part")), "it was not killed on the way"
    made = write_tokens(rows, codec, tmp_path)
    assert made["clips"] == CLIPS and made["encoded"] + made["found"] <= CLIPS - 3
    assert read_bytes(folder) == whole


def test_what_does_not_read_is_listed_with_its_reason_beside_the_shards(whole, rows):
    (line,) = whole["set_aside.jsonl"].decode().splitlines()
    row = json.loads(line)
    assert row["audio_path"] == rows[5]["audio_path"] and "not readable as audio" in row["reason"]


@pytest.fixture
def processes(monkeypatch):
    """Two processes encode, however few clips there are."""
    monkeypatch.setattr(workers, "FEWEST_CLIPS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_at_gate(codec, job):
    """Write a shard as tokens does, but encode only when the file `open` is there; until then at-<process> says who waits."""
    gate = job[0].parents[2]

    def wait(codec, wavs):
        (gate / f"at-{os.getpid()}").touch()
        while not (gate / "open").exists():
            time.sleep(0.01)
        return encode(codec, wavs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "encode", wait)
        return MAKE(codec, job)


def wait_for(condition):
    while not (found := condition()):
        time.sleep(0.01)
    return found


def find_waiting(gate):
    return [int(path.name.removeprefix("at-")) for path in gate.glob("at-*")]


def open_gate(gate, count, kill):
    """When `count` processes have a shard each and wait, kill one of them, or none, and let the others go on."""
    pids = wait_for(lambda: len(found := find_waiting(gate)) >= count and found)
    if kill:
        os.kill(pids[0], signal.SIGKILL)
    (gate / "open").touch()


@pytest.fixture
def write_at_gate(rows, codec, tmp_path, monkeypatch):
    """Write tokens by two workers who both have a shard; of whom one is killed, or none."""
    def write(kill, workers):
        monkeypatch.setattr(tokens, "_make_shard", make_at_gate)
        opener = threading.Thread(target=open_gate, args=(tmp_path, 2, kill), daemon=True)
        opener.start()
        made = write_tokens(rows, codec, tmp_path, workers)
        opener.join()
        assert made["clips"] == CLIPS and made["path"].is_relative_to(tmp_path)
        return read_bytes(made["path"])

    return write


@pytest.mark.parametrize("kill", [False, True])
def test_processes_write_the_same_bytes_and_where_one_is_killed_nothing_is_lost(write_at_gate, whole, kill, processes, capfd):
    assert write_at_gate(kill, "local") == whole
    assert ("one of 2 processes that encode was killed" in capfd.readouterr().out) == kill


def write_in_two(rows, data):
    tokens.SHARD_CLIPS, workers.FEWEST_CLIPS, tokens._make_shard = 1, 1, make_at_gate
    torch.set_num_threads(2)
    write_tokens(rows, load_codec("models/csm-mini"), data)


def test_processes_end_with_the_one_that_started_them(rows, codec, whole, tmp_path):
    parent = SERVER.Process(target=write_in_two, args=(rows, tmp_path))
    parent.start()
    pids = wait_for(lambda: len(found := find_waiting(tmp_path)) == 2 and found)
    identities = [identify_process(pid) for pid in pids]
    assert all(map(is_running, identities))
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    wait_for(lambda: not any(map(is_running, identities)))
    assert read_bytes(write_tokens(rows, codec, tmp_path)["path"]) == whole


def test_a_full_disk_is_said_and_what_is_done_stays_and_is_used(rows, codec, whole, tmp_path, monkeypatch):
    room, write_table = [4], pq.write_table

    def write_while_there_is_room(table, part, **how):
        write_table(table, part, **how)
        room[0] -= 1
        if room[0] < 0:
            os.truncate(part, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", write_while_there_is_room)
    with pytest.raises(TokensError, match="No space left on device.*; 4 of 13 shards are there, and stay. Make room"):
        write_tokens(rows, codec, tmp_path)
    assert not list(tmp_path.glob("tokens/*/.part-*.part"))
    room[0] = 100
    made = write_tokens(rows, codec, tmp_path)
    assert made["encoded"] + made["found"] <= CLIPS - 3 and read_bytes(made["path"]) == whole


def test_a_clip_shorter_than_a_frame_is_one_frame(codec, tmp_path):
    soundfile.write(tmp_path / "short.wav", [0.1] * 7, 24000)
    row = {"text": "A", "audio_path": str(tmp_path / "short.wav"), "speaker_id": "7", "language": "da"}
    (found,) = read_tokens(write_tokens([row], codec, tmp_path)["path"], codec)
    assert found["codes"].shape == (1, codec.config.num_quantizers) and found["duration"] == 7 / 24000


@pytest.mark.parametrize("threads", [1, 2])
def test_codes_do_not_depend_on_the_threads_that_torch_has(rows, codec, whole, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert read_bytes(write_tokens(rows, codec, tmp_path)["path"]) == whole
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_other_workers_are_refused_with_those_there_are(rows, codec, tmp_path):
    with pytest.raises(ParameterError, match="workers is 'cloud'; allowed: local, ray"):
        write_tokens(rows, codec, tmp_path, "cloud")


def test_the_command_makes_tokens_that_are_found_again_whatever_the_speakers_are_called(rows, codec, tmp_path, capsys):
    manifest = write_manifest([row | {"text": row["text"] or "-"} for row in rows], tmp_path / "manifest.jsonl")
    words = [str(manifest), "--language", "da", "--codec", "models/csm-mini", "--device", "cpu", "--data", str(tmp_path)]
    assert main(words) == 0
    assert f"{CLIPS} clips" in capsys.readouterr().out
    made = write_tokens([row | {"speaker_id": "12"} for row in rows], codec, tmp_path)
    assert made["encoded"] == 0 and made["clips"] == CLIPS
    assert main(["gone.jsonl", *words[1:]]) == 2 and "no such manifest" in capsys.readouterr().err
