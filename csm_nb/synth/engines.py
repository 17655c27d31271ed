"""Speech from engines other than espeak-ng: Azure, any OpenAI-compatible server, any command; resumable, within a budget."""

import json
import os
import shlex
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import httpx
import numpy as np
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.languages import get_language
from csm_nb.manifest import write_manifest
from csm_nb.provenance import hash_value, write_json
from csm_nb.recipe import suggest
from csm_nb.text.letters import count_fewest, count_letters

ENGINES = ("azure", "openai", "command")
# Voices of Azure by language: names, the rest is `<locale>-<Name>Neural`
AZURE_VOICES = {
    "no": ("Pernille", "Finn", "Iselin"), "sv": ("Sofie", "Mattias", "Hillevi"), "da": ("Christel", "Jeppe"),
    "de": ("Katja", "Conrad"), "fr": ("Denise", "Henri"), "es": ("Elvira", "Alvaro"), "nl": ("Fenna", "Maarten", "Colette"),
    "it": ("Elsa", "Isabella", "Diego"), "pl": ("Agnieszka", "Marek", "Zofia"),
}  # fmt: skip
# The variables of the environment that hold a key; a key stands nowhere else
KEYS = {"azure": "AZURE_SPEECH_KEY", "openai": "OPENAI_API_KEY"}
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 60.0  # s; doubled after each, or as long as the server asks for
TIMEOUT = 120.0  # s for one answer
FASTEST, SLOWEST = 40.0, 1.5  # letters per second; speech is 10 to 20: what is outside was cut off, or says something else
GIVE_UP = 10  # clips in a row that fail: the engine is down, or refuses all


class EngineError(RuntimeError):
    """Speech that can not be had: no key, no voice, over the budget, or an engine that refuses; what was spoken stays."""


@dataclass(frozen=True)
class Engine:
    """An engine: "azure", "openai" (a server that speaks /v1/audio/speech) or "command", and how it is asked.

    `url` is the server's (Azure's by AZURE_SPEECH_REGION, if empty), or the command: its words, with {voice}, {language} and
    {out} (a wav that it writes), the text on its standard input. `price` is per million characters, in any currency.
    """

    name: str
    url: str = ""
    model: str = ""
    price: float = 0.0
    concurrency: int = 4


def read_engine(given: dict) -> tuple[Engine, list[str], float]:
    """Return (engine, voices, budget) of a notebook's parameter `engine`. Raises EngineError with the fields there are."""
    kinds = {one.name: type(one.default) for one in fields(Engine)} | {"name": str, "voices": list, "budget": float}
    for name, value in given.items():
        if name not in kinds:
            raise EngineError(f"an engine has no field {name!r}{suggest(name, kinds)} Its fields are {', '.join(kinds)}")
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise EngineError(f"{name} of the engine is {value!r}; allowed is {kinds[name].__name__}")
        if type(value) in (int, float) and value < (name == "concurrency"):
            raise EngineError(f"{name} of the engine is {value!r}; allowed is {int(name == 'concurrency')} and more")
    if given.get("name") not in ENGINES:
        raise EngineError(f"the engine's name is {given.get('name')!r}; allowed are {', '.join(ENGINES)}; {{}} is espeak-ng")
    engine = Engine(**{name: value for name, value in given.items() if name not in ("voices", "budget")})
    return engine, given.get("voices", []), float(given.get("budget", 0.0))


def make_spoken(texts, language: str, out_dir, engine: Engine, voices=(), budget: float = 0.0, spoken_as: str | None = None,
                clips_dir=None) -> Path:
    """Speak `texts` in turn with the voices of `engine` and return the path of a manifest.jsonl in `out_dir`.

    The clips go to `clips_dir` (by default there too), named by what they are made of: several runs may share it.

    `spoken_as` lets voices of another language read (English with an accent). The cost is estimated before the first request,
    and nothing is asked for that would go over `budget`, what retries cost included. What is there already is not asked for
    again. Answers are looked at: no audio, cut off, or of a length that the text can not have, they are asked for again, as
    after 429 and 5xx, with growing pauses. A clip that still fails is left out, and listed in failed.json. Raises EngineError.
    """
    out_dir, heard_as = Path(out_dir), spoken_as or language
    clips_dir = Path(clips_dir or out_dir)
    voices = check_engine(engine, heard_as, voices)
    out_dir.mkdir(parents=True, exist_ok=True)
    clips_dir.mkdir(parents=True, exist_ok=True)
    clips = []
    for number, text in enumerate(texts):
        voice = voices[number % len(voices)]
        mark = hash_value([engine.name, engine.url, engine.model, voice, heard_as, text])
        clips.append((text, voice, clips_dir / f"{mark}.wav"))
    missing = [clip for clip in dict.fromkeys(clips) if find_fault(clip[2], clip[0], language)]
    purse = Purse(engine.price, budget)
    characters = sum(len(text) for text, _, _ in missing)
    print(f"{len(clips)} clips by {engine.name}: {len(clips) - len(missing)} are there, {len(missing)} to speak, "
          f"{characters:,} characters, {purse.cost(characters):.2f} of a budget of {budget:.2f}")
    if purse.cost(characters) > budget:
        raise EngineError(f"{len(missing)} clips cost {purse.cost(characters):.2f} ({characters:,} characters at "
                          f"{engine.price:g} per million), and the budget is {budget:.2f}: raise it, or ask for fewer; nothing "
                          "was asked for")
    failed = _speak_all(missing, engine, language, heard_as, purse)
    write_json(out_dir / "failed.json", failed)
    rows = [{"text": text, "audio_path": str(path), "speaker_id": f"{engine.name}-{voice}", "language": language,
             "duration": round(soundfile.info(path).duration, 3), "source": f"{engine.name} (synthetic)", "accent": heard_as,
             "voice": voice} for text, voice, path in clips if path.name not in failed]
    if failed:
        print(f"{len(failed)} of {len(clips)} clips could not be had, in {out_dir.name}/failed.json: "
              f"{next(iter(failed.values()))['reason']}")
    if not rows:
        raise EngineError(f"none of {len(clips)} clips could be had: {next(iter(failed.values()))['reason']}")
    return write_manifest(rows, out_dir / "manifest.jsonl")


def check_engine(engine: Engine, language: str, voices=()) -> list[str]:
    """Return the voices to speak with; raise EngineError for an engine, key, address or voice that is missing."""
    if engine.name not in ENGINES:
        raise EngineError(f"engine is {engine.name!r}; allowed are espeak-ng, {', '.join(ENGINES)}")
    if engine.name == "azure":
        if not engine.url and not os.environ.get("AZURE_SPEECH_REGION"):
            raise EngineError("azure needs AZURE_SPEECH_REGION in the environment, such as northeurope")
        if not engine.price:
            raise EngineError("azure needs the price of your plan per million characters, for the budget")
    elif not engine.url:
        what = "the address of a server, such as http://localhost:8000" if engine.name == "openai" else "a command with {out}"
        raise EngineError(f"{engine.name} needs {what}")
    if engine.name == "command" and "{out}" not in engine.url:
        raise EngineError(f"the command {engine.url!r} has no {{out}}, the wav that it has to write")
    if engine.name == "azure" and not os.environ.get(KEYS["azure"]):
        raise EngineError(f"azure needs its key in the environment variable {KEYS['azure']}, and only there")
    locale = get_language(language).azure
    known = [f"{locale}-{name}Neural" for name in AZURE_VOICES.get(language, ())] if engine.name == "azure" else []
    if not (voices or known):
        raise EngineError(f"no voice of {engine.name} is known for {language}; name some")
    return [*(voices or known)]


class Purse:
    """What may be spent: it counts the characters that audio came for or is on its way, and refuses more than the budget."""

    def __init__(self, price: float, budget: float):
        self.price, self.budget, self.sent, self.lock = price, budget, 0, threading.Lock()

    def cost(self, characters: int) -> float:
        """Return the price of so many characters."""
        return characters * self.price / 1e6

    def take(self, text: str) -> None:
        """Count a text that is about to be sent. Raises EngineError where the budget does not reach."""
        with self.lock:
            if self.cost(self.sent + len(text)) > self.budget + 1e-9:
                raise EngineError(f"the budget of {self.budget:.2f} is spent ({self.sent:,} characters sent); what was spoken "
                                  "stays, and is not asked for again")
            self.sent += len(text)

    def give_back(self, text: str) -> None:
        """Take a text off the count that the engine gave no audio for."""
        with self.lock:
            self.sent -= len(text)


def _speak_all(missing, engine, language, heard_as, purse):
    """Speak clips with as many at once as the engine may be asked; return {file: {text, voice, reason}} of those that failed."""
    failed, stop, row, lock = {}, [], [0], threading.Lock()

    def speak(clip):
        text, voice, path = clip
        if stop:
            return
        try:
            _speak_once(text, voice, path, engine, language, heard_as, purse)
            row[0] = 0
        except _Refused as error:
            with lock:
                failed[path.name] = {"text": text, "voice": voice, "reason": str(error)}
                row[0] += 1
                if row[0] >= GIVE_UP:
                    stop.append(EngineError(f"{engine.name} failed {row[0]} times in a row ({error}); what was spoken stays"))
        except Exception as error:
            stop.append(error)

    with ThreadPoolExecutor(max(1, engine.concurrency)) as pool:
        list(pool.map(speak, missing))
    if stop:
        raise stop[0]
    return failed


class _Refused(Exception):
    """A clip that an engine did not speak, with the reason in words; never with a header, which holds the key."""

    charged = False


class _Again(Exception):
    """An answer after which to ask again: its reason, the seconds that the server asks for, whether it is paid for."""

    def __init__(self, reason, wait=None, charged=False):
        super().__init__(reason)
        self.wait, self.charged = wait, charged


def _speak_once(text, voice, path, engine, language, heard_as, purse):
    reason = ""
    for attempt in range(ATTEMPTS):
        wait = FIRST_WAIT * 2**attempt
        purse.take(text)
        part = path.with_name(f".{path.stem}.{os.getpid()}.wav")  # some commands go by the ending
        try:
            _ASK[engine.name](text, voice, part, engine, heard_as)
            if fault := find_fault(part, text, language):
                raise _Again(f"its audio {fault}", charged=True)
            os.replace(part, path)
            return
        except (_Again, _Refused) as error:
            if not error.charged:
                purse.give_back(text)
            if isinstance(error, _Refused):
                raise
            reason, wait = str(error), wait if error.wait is None else error.wait
        finally:
            part.unlink(missing_ok=True)
        if attempt < ATTEMPTS - 1:
            time.sleep(min(LONGEST_WAIT, wait))
    raise _Refused(f"{reason}, {ATTEMPTS} times")


def find_fault(path, text: str, language: str) -> str:
    """Return why a clip can not be what `text` sounds like, "" if it can: not there, no audio, silent, cut off, too long."""
    try:
        wav = read_audio(path)
    except (AudioError, OSError) as error:
        return f"can not be read ({' '.join(str(error).split())[:80]})"
    seconds, fewest, most = len(wav) / SAMPLE_RATE, count_fewest(text, language), count_letters(text)
    if not len(wav) or np.abs(wav).max() < 1e-3:
        return "is silent"
    if seconds * FASTEST < fewest or seconds > max(3.0, most / SLOWEST):
        return f"has {seconds:.1f} s for {fewest} to {most} letters"
    return ""


def _ask_azure(text, voice, part, engine, language):
    url = engine.url or f"https://{os.environ['AZURE_SPEECH_REGION']}.tts.speech.microsoft.com"
    locale = "-".join(voice.split("-")[:2]) if voice.count("-") >= 2 else get_language(language).azure
    ssml = (f'<speak version="1.0" xmlns="http://www.w3.org/2001/10/synthesis" xml:lang={quoteattr(locale)}>'
            f"<voice name={quoteattr(voice)}>{escape(text)}</voice></speak>")
    headers = {"Ocp-Apim-Subscription-Key": os.environ[KEYS["azure"]], "Content-Type": "application/ssml+xml",
               "X-Microsoft-OutputFormat": "riff-24khz-16bit-mono-pcm", "User-Agent": "csm-nb"}
    _post(f"{url.rstrip('/')}/cognitiveservices/v1", headers, ssml.encode(), part)


def _ask_openai(text, voice, part, engine, language):
    key = os.environ.get(KEYS["openai"])
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = engine.url.rstrip("/")
    body = {"model": engine.model, "input": text, "voice": voice, "response_format": "wav"}
    url = url if url.endswith("/v1") else f"{url}/v1"
    _post(f"{url}/audio/speech", headers, json.dumps(body).encode(), part)


def _post(url, headers, content, part):
    try:
        answer = httpx.post(url, headers=headers, content=content, timeout=TIMEOUT)
    except httpx.TransportError as error:
        raise _Again(f"no answer ({type(error).__name__})") from None
    if answer.status_code == 429 or answer.status_code >= 500:
        raise _Again(f"the server answers {answer.status_code}", _read_wait(answer.headers.get("retry-after")))
    if answer.status_code in (401, 403):
        raise EngineError(f"the server refuses the key ({answer.status_code})")
    if answer.status_code != 200:
        raise _Refused(f"the server answers {answer.status_code}: {' '.join(answer.text.split())[:120]}")
    length = answer.headers.get("content-length")
    if length and int(length) != len(answer.content):
        raise _Again("the answer is cut off", charged=True)
    Path(part).write_bytes(answer.content)


def _read_wait(value):
    """Seconds of a Retry-After, which is a number or a date; None where it says neither."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _run_command(text, voice, part, engine, language):
    words = [word.format(out=part, voice=voice, language=language) for word in shlex.split(engine.url)]
    try:
        done = subprocess.run(words, input=text, text=True, capture_output=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise EngineError(f"there is no command {words[0]!r}") from None
    except subprocess.TimeoutExpired:
        raise _Again(f"the command took more than {TIMEOUT:.0f} s") from None
    if done.returncode:
        raise _Refused(f"the command ended with {done.returncode}: {' '.join(done.stderr.split())[-120:]}")


_ASK = {"azure": _ask_azure, "openai": _ask_openai, "command": _run_command}
