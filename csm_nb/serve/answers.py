"""What is said, on its way out: as one file, or while it comes."""

import asyncio
import base64
import json
import logging
import time
from contextlib import aclosing, closing

import numpy as np
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from csm_nb.serve.asks import AGAIN, Ask, Refusal, Server, find_reader
from csm_nb.serve.engine import FullError, Job
from csm_nb.serve.formats import FORMATS, Encoder
from csm_nb.speak.generate import SpeechError

SILENT = 0.01  # of full scale; what is quieter is not heard as the beginning of speech
GONE = "gone"  # the finish of what nobody waits for any more
log = logging.getLogger("uvicorn.error")


def begin(server: Server, text: str, language: str, voice: str, ask: Ask) -> tuple[Job, asyncio.Queue]:
    """Return a request that waits for its turn, and what will be told of it (engine.Job). Raises Refusal."""
    reader, events, loop = find_reader(server, language), asyncio.Queue(), asyncio.get_running_loop()
    if server.log_texts:
        log.info("%s, voice %s, seed %d: %r", language, voice, ask.seed, text)
    try:
        job = server.engine.prepare(text, language, voice, ask.seed, ask.max_audio_length_ms / 1000,
                                    lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        server.engine.submit(job)
    except FullError as error:
        raise Refusal(503, f"{error}; try again in {AGAIN} s") from error
    except SpeechError as error:
        raise Refusal(400, str(error), "text") from error
    except KeyError as error:
        raise Refusal(400, f"{reader.name} was taken away just now", "language") from error
    except ValueError as error:
        raise Refusal(400, str(error), "voice") from error
    return job, events


async def listen(server: Server, request: Request, job: Job, events: asyncio.Queue):
    """Yield samples as they come, until they end or the client is gone. Who stops listening frees the row of the batch."""

    async def wait_for_end():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        server.engine.hang_up(job)
        events.put_nowait(GONE)

    watch, start, audible, samples = asyncio.create_task(wait_for_end()), time.monotonic(), False, 0
    try:
        while not isinstance(event := await events.get(), str):
            if isinstance(event, FullError):
                raise Refusal(503, str(event)) from event
            if isinstance(event, Exception):
                raise event
            if not audible and np.abs(event).max(initial=0) > SILENT:
                audible = True
                server.figures.first.observe(time.monotonic() - start)
            samples += len(event)
            yield event
        if event != GONE:
            server.figures.finish.labels(event).inc()
        server.figures.seconds.inc(samples / server.engine.rate)
    finally:
        server.engine.hang_up(job)
        watch.cancel()


def describe(server: Server, job: Job) -> tuple[dict[str, str], str]:
    """Return an answer's headers, and what its file says of itself."""
    name = job.reader.name or "none"
    headers = {"X-Synthetic": "true", "X-Model": server.base, "X-Adapter": name, "X-Voice": job.voice, "X-Seed": str(job.seed)}
    return headers, (f"Synthetic speech, no recording of a person. Model {server.base}, adapter {name}, speaker {job.voice}, "
                     f"seed {job.seed}.")


async def say_whole(server: Server, request: Request, job: Job, events, kind: str) -> tuple[Response, np.ndarray]:
    """Return the answer with all that is said, and its samples."""
    headers, about = describe(server, job)
    wavs = [wav async for wav in listen(server, request, job, events)]
    if not wavs:
        raise Refusal(499, "the client has hung up")
    encoder, wav = Encoder(kind, server.engine.rate, about, False), np.concatenate(wavs)
    encoder.feed(wav)
    return Response(encoder.close(), media_type=FORMATS[kind][2], headers=headers | {"X-Finish": job.finish}), wav


async def say_while_it_comes(server: Server, request: Request, job: Job, events, kind: str, sse: bool, letters: int):
    """Return an answer that goes on while it is spoken, as bytes of a file or as OpenAI's events, once something is said."""
    headers, about = describe(server, job)
    wavs = listen(server, request, job, events)
    first = await anext(wavs, None)  # an error before is an answer of its own
    if first is None:
        raise Refusal(499, "the client has hung up")

    async def encode():
        async with aclosing(wavs):
            with closing(Encoder(kind, server.engine.rate, about, True)) as encoder:
                yield encoder.feed(first)
                async for wav in wavs:
                    yield encoder.feed(wav)
                yield encoder.close()

    async def tell():
        async with aclosing(encode()) as pieces:
            async for piece in pieces:
                if piece and sse:
                    yield _write_event("speech.audio.delta", audio=base64.b64encode(piece).decode())
                elif piece:
                    yield piece
        if sse:
            said = sum(map(len, job.codes))
            usage = {"input_tokens": letters, "output_tokens": said, "total_tokens": letters + said}
            yield _write_event("speech.audio.done", usage=usage, finish=job.finish)

    media = "text/event-stream" if sse else FORMATS[kind][2]
    return StreamingResponse(tell(), media_type=media, headers=headers | {"Cache-Control": "no-store"})


def _write_event(kind, **fields):
    return f"data: {json.dumps({'type': kind} | fields)}\n\n"
