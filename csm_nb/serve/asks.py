"""What may be asked, checked at the door, and how a refusal is said: what was found, what is allowed, what to do."""

from dataclasses import dataclass
from typing import Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from csm_nb.languages import LANGUAGES
from csm_nb.serve.engine import Engine
from csm_nb.serve.figures import Figures
from csm_nb.serve.formats import FORMATS
from csm_nb.serve.voices import Reader

MOST_TEXT = 4096  # characters, as OpenAI's
MOST_SECONDS = 120  # of speech in one answer
ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # OpenAI's models, which programs ask for: whatever reads the language
AGAIN = 2  # s after which whoever was turned away may try again


@dataclass(frozen=True)
class Server:
    """What the routes work with: `base` is the base model's name, `profile` the one that missing adapters are made with."""

    engine: Engine
    figures: Figures
    base: str
    profile: str
    asr_model: str = ""
    log_texts: bool = False


class Ask(BaseModel):
    """What both ways of asking share; a field that there is not is refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    language: str | None = Field(None, description="a code of /languages")
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed says the same again")
    max_audio_length_ms: int = Field(30_000, ge=200, le=1000 * MOST_SECONDS)


class Synthesize(Ask):
    """POST /synthesize."""

    text: str = Field(min_length=1, max_length=MOST_TEXT)
    speaker: int | str | None = Field(None, description="a number of /v1/audio/voices; by default the language's first")
    heard: bool = Field(False, description="say in the header X-Heard what a recogniser hears (percent-encoded)")


class Speech(Ask):
    """POST /v1/audio/speech, in OpenAI's form; `language`, `seed` and `max_audio_length_ms` are this server's own."""

    model: str
    input: str = Field(min_length=1, max_length=MOST_TEXT)
    voice: str | dict = Field("alloy", description="a speaker's number, or one of OpenAI's names")
    response_format: str = "mp3"
    speed: float = 1.0
    stream_format: Literal["audio", "sse"] | None = Field(None, description="to hear it while it comes; without, it is one file")
    instructions: str | None = None


class Refusal(Exception):
    """An answer other than speech: its status, what is wrong and what is allowed, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def answer_refusal(request: Request, error: Refusal) -> JSONResponse:
    """Answer in the form of OpenAI's errors."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": None}}
    return JSONResponse(body, error.status, {"Retry-After": str(AGAIN)} if error.status == 503 else None)


def answer_route(request: Request, error: HTTPException) -> JSONResponse:
    """Answer a path or method that there is not."""
    return answer_refusal(request, Refusal(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}; /docs "
                                           "lists what there is"))


def answer_fault(request: Request, error: Exception) -> JSONResponse:
    """Answer a fault of this server's own."""
    return answer_refusal(request, Refusal(500, f"this request failed ({type(error).__name__}), no other did; the log says more"))


def answer_fields(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer fields that are missing, unknown, or of another type or size."""
    first = error.errors()[0]
    kind, field = first["type"], ".".join(map(str, first["loc"][1:2]))
    if kind == "json_invalid":
        return answer_refusal(request, Refusal(400, f"the body is no JSON: {first['ctx']['error']}"))
    asked = Speech if request.url.path.startswith("/v1/") else Synthesize
    more = f"; the fields are {', '.join(asked.model_fields)}" if kind in ("extra_forbidden", "missing") else ""
    return answer_refusal(request, Refusal(413 if kind == "string_too_long" else 400, f"{field or 'body'}: {first['msg']}{more}",
                                           field or None))


def list_models(server: Server) -> dict[str, str]:
    """Return {model: its language}: the base and the adapters."""
    readers = server.engine.shelf.readers.values()
    return {server.base: "en"} | {reader.name: reader.languages[0] for reader in readers if reader.name}


def tell_missing(server: Server, code: str) -> str:
    """Return why a language can not be read, and what makes it so that it can."""
    for name, why in server.engine.shelf.faults.items():
        if code in name.partition("_")[2].split("+"):
            return f"{name} can not be used: {why}"
    return f"make run LANGS={code} PROFILE={server.profile} makes its adapter, which is taken up without a restart"


def find_reader(server: Server, language: str) -> Reader:
    """Return who reads a language. Raises Refusal that lists the known ones, and says how a missing one is made."""
    readers = server.engine.shelf.readers
    if language not in LANGUAGES:
        raise Refusal(400, f"unknown language {language[:40]!r}; there are {', '.join(readers)}", "language")
    if language not in readers:
        raise Refusal(400, f"there is no adapter for {LANGUAGES[language].name} ({language}): {tell_missing(server, language)}. "
                           f"There are {', '.join(readers)}", "language")
    return readers[language]


def check_speech(server: Server, ask: Speech) -> tuple[str, str]:
    """Return (language, voice) of a request in OpenAI's form. Raises Refusal for what there is not."""
    models, kind = list_models(server), ask.response_format
    if ask.model not in models and ask.model not in ALIASES:
        raise Refusal(400, f"unknown model {ask.model[:40]!r}; there are {', '.join(models)}, and {', '.join(ALIASES)} stand for "
                           "what reads the language", "model")
    language = ask.language or models.get(ask.model, "en")
    name = find_reader(server, language).name or server.base
    if ask.model in models and ask.model != name:
        raise Refusal(400, f"model {ask.model} does not read {language}; {name} does", "model")
    if kind not in FORMATS:
        raise Refusal(400, f"unknown response_format {kind[:40]!r}; there are {', '.join(FORMATS)}", "response_format")
    if ask.speed != 1.0:
        raise Refusal(400, f"speed is {ask.speed}; allowed is 1.0: the pace is the voice's own", "speed")
    if ask.instructions:
        raise Refusal(400, "instructions can not be followed by this model: leave them out", "instructions")
    voice = ask.voice.get("id") if isinstance(ask.voice, dict) else ask.voice
    if not isinstance(voice, str):
        raise Refusal(400, 'voice: allowed are a name, a number in quotes, or {"id": "..."}', "voice")
    return language, voice
