"""The routes."""

import asyncio
import threading
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from csm_nb.judge.judges import load_asr, transcribe
from csm_nb.languages import LANGUAGES
from csm_nb.serve.answers import begin, say_while_it_comes, say_whole
from csm_nb.serve.asks import (
    ALIASES,
    Refusal,
    Server,
    Speech,
    Synthesize,
    answer_fault,
    answer_fields,
    answer_refusal,
    answer_route,
    check_speech,
    list_models,
    tell_missing,
)
from csm_nb.serve.door import Door
from csm_nb.serve.engine import Engine
from csm_nb.serve.figures import Figures
from csm_nb.serve.voices import OPENAI

routes, hearing = APIRouter(), threading.Lock()


def create_app(engine: Engine, base: str, profile: str = "mini", key: str = "", asr_model: str = "",
               log_texts: bool = False) -> FastAPI:
    """Return the application around an engine, which starts and ends with it. `base` is the folder or id of the base model.

    With `key` every route but /healthz and /ready wants it as a bearer token. `asr_model` is what /synthesize hears with.
    """

    @asynccontextmanager
    async def run_engine(app):
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    handlers = {Refusal: answer_refusal, HTTPException: answer_route, RequestValidationError: answer_fields,
                Exception: answer_fault}
    app = FastAPI(title="csm-nb", description="Synthetic speech from one base model and its adapters.", lifespan=run_engine,
                  exception_handlers=handlers)
    figures = Figures(engine)
    app.state.server = Server(engine, figures, str(base).rstrip("/").split("/")[-1], profile, asr_model, log_texts)
    app.include_router(routes)
    app.add_middleware(Door, key=key, figures=figures)
    return app


@routes.post("/synthesize", response_class=Response)
async def synthesize(ask: Synthesize, request: Request):
    """Speak a text; a whole WAV comes back. X-Finish says whether it ended by itself (end) or at its longest (length)."""
    server, language = request.app.state.server, ask.language or "en"
    voice = "" if ask.speaker is None else str(ask.speaker)
    answer, wav = await say_whole(server, request, *begin(server, ask.text, language, voice, ask), "wav")
    if ask.heard:
        answer.headers["X-Heard"] = quote(await asyncio.to_thread(hear, server, wav, language))
    return answer


@routes.post("/v1/audio/speech", response_class=Response)
async def speech(ask: Speech, request: Request):
    """Speak a text in OpenAI's form: one file, or with stream_format while it comes."""
    server = request.app.state.server
    language, voice = check_speech(server, ask)
    job, events = begin(server, ask.input, language, voice, ask)
    if ask.stream_format:
        return await say_while_it_comes(server, request, job, events, ask.response_format, ask.stream_format == "sse",
                                        len(ask.input))
    return (await say_whole(server, request, job, events, ask.response_format))[0]


@routes.get("/v1/audio/voices")
async def voices(request: Request):
    """List the speakers of each language, whose voices they are and by what licence, and what OpenAI's names stand for."""
    return {"voices": [{"language": code, "default": reader.pick(""), "openai": {name: reader.pick(name) for name in OPENAI}}
                       | reader.describe() for code, reader in request.app.state.server.engine.shelf.readers.items()]}


@routes.get("/v1/models")
async def models(request: Request):
    """List the base and its adapters."""
    found = list_models(request.app.state.server).items()
    return {"object": "list", "aliases": ALIASES, "data": [
        {"id": name, "object": "model", "created": 0, "owned_by": "csm-nb", "language": language} for name, language in found]}


@routes.get("/languages")
async def languages(request: Request):
    """List every language: who reads it, or what is missing and what makes it; and the folders that can not be used."""
    server = request.app.state.server
    readers = server.engine.shelf.readers
    rows = [{"code": code, "name": entry.name, "available": code in readers}
            | (readers[code].describe() if code in readers else {"missing": tell_missing(server, code)})
            for code, entry in LANGUAGES.items()]
    return {"languages": rows, "unusable": server.engine.shelf.faults}


@routes.get("/healthz")
async def healthz():
    """Say that the server is there, whether or not it can speak yet."""
    return {"status": "ok"}


@routes.get("/ready")
async def ready(request: Request):
    """Say that a sentence was spoken; 503 until then."""
    engine = request.app.state.server.engine
    if not engine.ready or not engine.threads[0].is_alive():
        raise Refusal(503, f"no sentence could be spoken ({engine.fault})" if engine.fault else "no sentence was spoken yet")
    return {"status": "ready"}


@routes.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request):
    """Give figures to Prometheus."""
    return PlainTextResponse(request.app.state.server.figures.write(), media_type="text/plain; version=0.0.4")


@routes.get("/", response_class=HTMLResponse)
async def page():
    """Show the page."""
    return HTMLResponse((files("csm_nb.serve") / "page.html").read_text(encoding="utf-8"))


def hear(server: Server, wav, language: str) -> str:
    """Return what the profile's recogniser writes for a clip. Raises Refusal where there is none."""
    with hearing:
        try:
            return transcribe(load_recogniser(server.asr_model, str(server.engine.inner.device), language), [wav])[0]
        except ValueError as error:
            raise Refusal(400, f"heard: {error}", "heard") from error


@cache
def load_recogniser(asr_model, device, language):
    """Return the recogniser of a language, which is kept."""
    return load_asr(asr_model, device, language)
