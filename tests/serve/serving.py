"""What the tests of the server share: adapters that say something of their own, an engine, a server on a free port."""

import contextlib
import queue
import socket
import threading
import time

import uvicorn
from test_decoders import stir

from csm_nb.csm.adapters import add_adapter, remove_adapters
from csm_nb.csm.load import load_base
from csm_nb.csm.record import set_record
from csm_nb.csm.save import save_adapter
from csm_nb.csm.speakers import set_speakers
from csm_nb.csm.tags import set_tags
from csm_nb.serve.app import create_app
from csm_nb.serve.engine import Engine

BASE = "models/csm-mini"
CARD = {"licence": "of the data: CC0-1.0"}


def make_adapter(model, folder, code, seed, weight=True, read_out=False, **more):
    """Save an adapter of a language below `folder`; without `weight` it changes nothing."""
    worn = add_adapter(model, 4, 8, 0.0, seed=seed, **more)
    speaker = {"corpus": "corpus/manifest.jsonl", "content": "abc", "speaker": f"anna-{code}", "hours": 0.5}
    counts = {20 + seed: 12, 5: 9, 1: 0}
    set_speakers(worn, [speaker | {"number": n, "clips": clips, "own": clips > 0} for n, clips in counts.items()])
    set_tags(worn, {one: "" for one in code.split("+")})
    set_record(worn, read_out=read_out)
    path = save_adapter(stir(worn, seed) if weight else worn, folder / f"lora_{code}", CARD | {"language": code.split("+")[0]})
    remove_adapters(worn)
    return path


def make_adapters(folder, codes=("no", "sv", "da")):
    """Save an adapter for each language; the second has trained the MLP as well, on texts that were read out."""
    model, _ = load_base(BASE, "cpu")
    for number, code in enumerate(codes):
        make_adapter(model, folder, code, number, mlp=number == 1, read_out=number == 1)
    return folder


def make_engine(folder, slots=4, most=16):
    return Engine(*load_base(BASE, "cpu"), folder, slots, most, "apache-2.0")


def ask(engine, text, language="en", voice="", seed=0, seconds=30.0):
    """Submit a request; return (it, what will be told of it)."""
    told = queue.Queue()
    job = engine.prepare(text, language, voice, seed, seconds, told.put)
    engine.submit(job)
    return job, told


def hear(told):
    """Return (samples, how it ended) of a request, once it has."""
    wavs = []
    while not isinstance(event := told.get(timeout=120), str | Exception):
        wavs += event.tolist()
    return wavs, event


def step_until(engine, done):
    """Do what the engine's thread does, until `done()`."""
    while not done():
        engine._admit()
        for shelf in list(engine.batches):
            engine._step(shelf)


def wait_for(done, seconds=60):
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def served(engine, **options):
    """Yield the address of a server around an engine."""
    app = create_app(engine, BASE, asr_model="models/asr-mini", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=2, backlog=4096))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: engine.ready)
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
