"""The server under load, on loopback: `python bench/serve.py [--requests 200] [--rates 1 2] [--clients 16] [--memory 1000]`.

It starts a server of its own with three adapters that say something else than the base, and asks for streams of samples in
three languages: open-loop (Poisson: clients that come whether or not others were served), and clients in a circle that ask
again as soon as they were served. Each answer is held against the same request spoken alone. Playback begins with the first
piece, or --buffer later; the first audible sample is the first above 1 % of full scale, at the time that it is played.
"""

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch

from csm_nb.csm.adapters import add_adapter, remove_adapters
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter
from csm_nb.paths import ROOT
from csm_nb.text.sentences import make_sentences

RATE, SILENT, LANGUAGES = 24_000, 0.01, ("no", "sv", "da")


def make_adapters(base, folder):
    """Save an adapter for each language whose weights are random."""
    model, _ = load_base(base, "cpu")
    for seed, code in enumerate(LANGUAGES):
        worn = add_adapter(model, 32, 64, 0.0, mlp=True, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in worn.named_parameters():
                if "lora_B" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.01)
        save_adapter(worn, Path(folder) / f"lora_{code}", {"language": code})
        remove_adapters(worn)


def start_server(args, folder):
    """Return (process, address) of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "csm_nb.serve", "--profile", args.profile, "--port", str(port), "--adapters", str(folder),
               "--slots", str(args.slots), "--queue", str(args.queue), "--device", args.device]
    process, address = subprocess.Popen(command, cwd=ROOT), f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return process, address
        except httpx.TransportError:
            pass
        assert process.poll() is None, "the server has ended"
        time.sleep(0.2)


async def ask(client, body, buffer=0.0):
    """Return an answer: status, data (samples), stalls, and in s first piece, first audible sample, silence before it, length."""
    start, pieces = time.perf_counter(), []
    async with client.stream("POST", "/v1/audio/speech", json=body) as answer:
        async for piece in answer.aiter_bytes():
            pieces.append((time.perf_counter() - start, piece))
    data = b"".join(piece for _, piece in pieces)
    if answer.status_code != 200:
        return {"status": answer.status_code}
    wav, first = np.frombuffer(data, "<i2"), pieces[0][0]
    clock, stalls, samples = first + buffer, 0, 0
    audible = int(np.argmax(np.abs(wav) > SILENT * 2**15))
    heard = None
    for arrived, piece in pieces:
        stalls += arrived > clock + 1e-3 and samples > audible  # in silence before speech nobody hears it
        clock = max(clock, arrived)
        if heard is None and samples + len(piece) // 2 > audible:
            heard = clock + (audible - samples) / RATE
        clock, samples = clock + len(piece) / 2 / RATE, samples + len(piece) // 2
    return {"status": 200, "data": data, "first": first, "audible": heard, "silence": audible / RATE, "stalls": stalls,
            "seconds": len(wav) / RATE}


def make_requests(count):
    """Return the bodies of `count` different requests."""
    texts = make_sentences("en", -(-count // len(LANGUAGES)), 0, "validation")
    return [{"model": "tts-1", "voice": "alloy", "input": texts[n // len(LANGUAGES)], "language": LANGUAGES[n % len(LANGUAGES)],
             "seed": n, "response_format": "pcm", "stream_format": "audio"} for n in range(count)]


async def run_open(client, bodies, rate, buffer=0.0):
    """Ask as a Poisson process of `rate` requests per second does."""
    draw, tasks = random.Random(0), []
    for body in bodies:
        tasks.append(asyncio.create_task(ask(client, body, buffer)))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*tasks)


async def run_circle(client, bodies, clients, buffer=0.0):
    """Ask by so many clients, each again as soon as it was served."""
    waiting, answers = list(enumerate(bodies)), [None] * len(bodies)

    async def go_round():
        while waiting:
            number, body = waiting.pop(0)
            answers[number] = await ask(client, body, buffer)

    await asyncio.gather(*(go_round() for _ in range(clients)))
    return answers


def report(name, answers, alone, taken):
    """Print a row of the table."""
    good = [one for one in answers if one["status"] == 200]
    other = sum(one["status"] not in (200, 503) for one in answers)
    swapped = sum(one["status"] == 200 and one["data"] != alone[n % len(alone)]["data"] for n, one in enumerate(answers))
    first, audible, silence = (np.percentile([1000 * one[key] for one in good], [50, 95]) if good else (0, 0)
                               for key in ("first", "audible", "silence"))
    stalled, speed = sum(one["stalls"] > 0 for one in good), sum(one["seconds"] for one in good) / taken
    cells = [name, len(answers), len(good), len(answers) - len(good) - other, other, swapped, f"{first[0]:.0f} / {first[1]:.0f}",
             f"{audible[0]:.0f} / {audible[1]:.0f}", f"{silence[0]:.0f}", stalled, f"{speed:.1f}"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


async def measure_hang_up(client, body):
    """Return the milliseconds from a client's hanging up until its row is free, as /metrics tells."""
    async with client.stream("POST", "/v1/audio/speech", json=body) as answer:
        async for _ in answer.aiter_bytes():
            break
    start = time.perf_counter()
    while "csm_nb_rows_taken 0.0" not in (await client.get("/metrics")).text:
        pass
    return 1000 * (time.perf_counter() - start)


async def measure(args, address, process):
    distinct = make_requests(args.distinct)
    bodies = [distinct[n % len(distinct)] for n in range(args.requests)]
    limits, buffer = httpx.Limits(max_connections=None), args.buffer / 1000
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        print("| load | asked | spoken | 503 | other | not as alone | first piece, ms p50 / p95 | first audible, ms | "
              "silence before, ms | streams that stall | audio-s/s |\n|" + " --- |" * 11)
        start = time.perf_counter()
        alone = await run_circle(client, distinct, 1, buffer)
        report("one client", alone, alone, time.perf_counter() - start)
        runs = [(f"open, {rate:g} requests/s", run_open(client, bodies, rate, buffer)) for rate in args.rates]
        runs.append((f"{args.clients} clients in a circle", run_circle(client, bodies, args.clients, buffer)))
        runs.append((f"{args.requests} at once, queue of {args.queue}", run_open(client, bodies, 1e6, buffer)))
        for name, run in runs:
            start = time.perf_counter()
            report(name, await run, alone, time.perf_counter() - start)
        hung = [await measure_hang_up(client, distinct[0]) for _ in range(20)]
        print(f"\nhung up: the row is free after {np.median(hung):.0f} ms, at most {max(hung):.0f} (20 times)")
        short = [body | {"max_audio_length_ms": 400} for body in distinct]
        for quarter in range(4 if args.memory else 0):
            await run_circle(client, [short[n % len(short)] for n in range(args.memory // 4)], args.clients)
            used = psutil.Process(process.pid).memory_info().rss / 1e6
            print(f"{used:.0f} MB after {(quarter + 1) * args.memory // 4} more requests", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--base", default="models/csm-mini", help="what the adapters are made for: the profile's base_model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--distinct", type=int, default=24)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0], help="requests per second")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--buffer", type=float, default=0.0, help="ms that a player waits after the first piece")
    parser.add_argument("--memory", type=int, default=1000, help="requests over which memory is looked at; 0: none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(args.base, folder)
        process, address = start_server(args, folder)
        try:
            print(f"{args.profile}, {args.device}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, {args.slots} rows")
            asyncio.run(measure(args, address, process))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
