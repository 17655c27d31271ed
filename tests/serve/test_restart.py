"""The server as a program: killed while it speaks, clients hear of it, and started again it serves the next one."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import httpx
from conftest import ROOT
from serving import wait_for

from csm_nb.processes import end_processes, identify_process
from csm_nb.text.sentences import make_sentences

TEXTS = make_sentences("en", 6, 0, "validation")
SPEECH = {"model": "tts-1", "voice": "alloy", "response_format": "pcm"}


@contextlib.contextmanager
def started(port, folder):
    command = [sys.executable, "-m", "csm_nb.serve", "--port", str(port), "--adapters", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})

    def is_ready():
        assert process.poll() is None, process.stdout.read()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200

    try:
        wait_for(is_ready)
        yield process
    finally:
        end_processes([identify_process(process.pid)])
        process.wait()


def load(url, end):
    """Ask for six texts at once and call `end` while three are being played; return what clients saw: status or error, bytes."""
    begun, seen = threading.Barrier(4), [None] * 6

    def fetch(number):
        stream = {"stream_format": "audio"} if number < 3 else {}  # the others want one file
        try:
            with httpx.stream("POST", url, json=SPEECH | {"input": TEXTS[number]} | stream, timeout=60) as answer:
                pieces = answer.iter_bytes()
                first = next(pieces)
                if stream:
                    begun.wait(60)
                seen[number] = answer.status_code, first + b"".join(pieces)
        except httpx.TransportError as error:
            seen[number] = type(error).__name__, b""

    threads = [threading.Thread(target=fetch, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    end()
    for thread in threads:
        thread.join()
    return seen


def test_ended_in_mid_load_clients_see_errors_or_their_whole_answer_and_started_again_it_serves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/audio/speech"
    with started(port, tmp_path) as process:
        killed = load(url, process.kill)
    with started(port, tmp_path) as process:
        whole = [httpx.post(url, json=SPEECH | {"input": text}, timeout=60).content for text in TEXTS]
        ended = load(url, process.terminate)
        process.wait(60)
    assert {status for status, _ in killed} <= {200, "ReadError", "RemoteProtocolError", "ConnectError"}
    assert {status for status, _ in ended} <= {200, 503, "ReadError", "RemoteProtocolError", "ConnectError"}
    for seen in (killed, ended):
        assert all(data == whole[number] for number, (status, data) in enumerate(seen) if status == 200)
