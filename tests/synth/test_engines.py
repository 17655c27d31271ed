"""Speech is bought once, within the budget, whatever the server answers; the key is nowhere but in the environment."""

import io
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from csm_nb.manifest import read_manifest
from csm_nb.synth import engines
from csm_nb.synth.engines import Engine, EngineError, make_spoken

KEY = "sk-a-key-that-nobody-may-see"
TEXTS = [f"Setning nummer {word} er her, & <den> sier \"{word}\"." for word in ("en", "to", "tre", "fire", "fem", "seks")]


def make_wav(seconds, level=0.3):
    buffer = io.BytesIO()
    soundfile.write(buffer, level * np.sin(np.arange(int(24_000 * seconds)) / 20), 24_000, format="WAV")
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """It speaks both protocols; `answers` are given out, one per request to a text, before the right one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.heads, self.busy, self.most = {}, Counter(), [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/cognitiveservices/v1":
            voice = ElementTree.fromstring(body)[0]
            text, key = voice.text, self.headers["Ocp-Apim-Subscription-Key"]
            assert self.headers["X-Microsoft-OutputFormat"] == "riff-24khz-16bit-mono-pcm"
            server.heads.append((ElementTree.fromstring(body).attrib, voice.attrib))
        else:
            assert self.path == "/v1/audio/speech"
            asked = json.loads(body)
            text, key = asked["input"], self.headers["Authorization"].removeprefix("Bearer ")
            server.heads.append(asked)
        server.asked[text] += 1
        faults = server.answers.get(text) or server.answers.get("", [])
        fault = faults.pop(0) if faults else 200
        status, content, headers = 200, make_wav(2.5), {}
        if key != KEY:
            status, content = 401, b"no such key " + key.encode()
        elif fault == "cut":
            headers["Content-Length"] = str(len(content))
            content = content[: len(content) // 2]
        elif fault == "text":
            content = b"<html>sorry</html>"
        elif fault == "silent":
            content = make_wav(2.5, 0)
        elif fault == "short":
            content = make_wav(0.2)
        elif isinstance(fault, int) and fault != 200:
            status, content, headers = fault, b"wait", {"Retry-After": "0.01"}
        self.send_response(status)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(content))))
        for name in headers.keys() - {"Content-Length"}:
            self.send_header(name, headers[name])
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(engines, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("AZURE_SPEECH_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_SPEECH_REGION", "nowhere")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def speak(server, folder, name="azure", **values):
    engine = Engine(name, server.url, "a-model", price=16.0, concurrency=values.pop("concurrency", 3))
    voices = values.pop("voices", () if name == "azure" else ("nova", "echo"))
    texts, budget = values.pop("texts", TEXTS), values.pop("budget", 1.0)
    return read_manifest(make_spoken(texts, "no", folder, engine, voices, budget, **values))


@pytest.mark.parametrize("name", ["azure", "openai"])
def test_texts_are_spoken_in_turn_and_asked_for_once(server, tmp_path, name):
    rows = speak(server, tmp_path, name)
    assert [row["text"] for row in rows] == TEXTS and all(row["duration"] == 2.5 for row in rows)
    assert {row["source"] for row in rows} == {f"{name} (synthetic)"} and len({row["speaker_id"] for row in rows}) > 1
    assert set(server.asked) == set(TEXTS)  # signs of markup arrive as they were
    assert speak(server, tmp_path, name) == rows and set(server.asked.values()) == {1}
    speak(server, tmp_path, name, texts=[*TEXTS, "En til, som er ny."])
    assert server.asked.total() == len(TEXTS) + 1


def test_an_accent_is_the_voice_of_another_language(server, tmp_path):
    rows = speak(server, tmp_path, texts=["An English text."], spoken_as="da")
    assert (rows[0]["language"], rows[0]["accent"]) == ("no", "da") and server.heads[0][1]["name"] == "da-DK-ChristelNeural"


@pytest.mark.parametrize("name", ["azure", "openai"])
@pytest.mark.parametrize("faults", [[429, 429], [500, 503], ["cut"], ["text"], ["silent"], ["short"],
                                    [429, "cut", 502, "text"]], ids=str)
def test_what_went_wrong_is_asked_for_again(server, tmp_path, name, faults):
    server.answers[TEXTS[2]] = list(faults)
    rows = speak(server, tmp_path, name)
    assert len(rows) == len(TEXTS) and server.asked[TEXTS[2]] == len(faults) + 1
    assert json.loads((tmp_path / "failed.json").read_text()) == {}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_numbers_take_as_long_as_they_are_read_out(server, tmp_path):
    assert len(speak(server, tmp_path, texts=["12", "Nei."])) == 2  # 2.5 s each
    server.answers["987654"] = ["short"]  # .2 s
    assert len(speak(server, tmp_path, texts=["987654"])) == 1 and server.asked["987654"] == 2
    wav = tmp_path / "long.wav"
    wav.write_bytes(make_wav(8))
    assert engines.find_fault(wav, "98765432", "no") == "" and "8.0 s for" in engines.find_fault(wav, "Nei.", "no")


def test_a_clip_that_never_comes_is_listed_and_the_others_stay(server, tmp_path):
    server.answers[TEXTS[1]] = [429] * 99
    server.answers[TEXTS[4]] = [400]
    rows = speak(server, tmp_path)
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert len(rows) == 4 and {one["text"]: one["reason"] for one in failed.values()} == {
        TEXTS[1]: f"the server answers 429, {engines.ATTEMPTS} times", TEXTS[4]: "the server answers 400: wait"}
    server.answers.clear()
    assert len(speak(server, tmp_path)) == 6 and server.asked[TEXTS[0]] == 1


def test_nothing_is_asked_for_that_costs_more_than_the_budget(server, tmp_path):
    cost = sum(map(len, TEXTS)) * 16 / 1e6
    with pytest.raises(EngineError, match="nothing was asked for"):
        speak(server, tmp_path, budget=cost * 0.99)
    assert not server.asked
    server.answers[TEXTS[0]] = [429]  # which costs nothing
    assert len(speak(server, tmp_path, budget=cost)) == 6


def test_answers_that_are_paid_for_and_no_use_end_with_the_budget(server, tmp_path):
    server.answers[TEXTS[0]] = ["short"] * 99
    with pytest.raises(EngineError, match="the budget of .* is spent.*what was spoken stays"):
        speak(server, tmp_path, budget=sum(map(len, TEXTS)) * 16 / 1e6 * 1.2, concurrency=1)
    assert server.asked.total() == 7  # of 46 characters each


def test_an_engine_that_is_down_is_given_up_and_gone_on_with_later(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "ATTEMPTS", 1)
    texts = [f"Dette er setning {i} av mange." for i in range(60)]
    server.answers[""] = [200] * 8 + [503] * 200
    with pytest.raises(EngineError, match="failed 10 times in a row.*503"):
        speak(server, tmp_path, texts=texts, concurrency=1)
    assert server.asked.total() == 18
    server.answers.clear()
    assert len(speak(server, tmp_path, texts=texts)) == 60 and server.asked.total() == 18 + 52


@pytest.mark.parametrize("name", ["azure", "openai"])
def test_the_key_is_in_no_file_no_line_and_no_exception(server, tmp_path, monkeypatch, capsys, name):
    server.answers[TEXTS[1]] = [429] * 99
    server.answers[TEXTS[4]] = [400]
    speak(server, tmp_path, name)
    monkeypatch.setenv(engines.KEYS[name], KEY[::-1])
    with pytest.raises(EngineError) as refused:
        speak(server, tmp_path / "other", name)
    said = "".join(capsys.readouterr()) + repr(refused.value) + repr(refused.value.__cause__) + repr(refused.value.__context__)
    said += "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in said and KEY[::-1] not in said and "refuses the key (401)" in str(refused.value)


def test_any_command_speaks(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text("import sys, numpy, soundfile\nout, voice = sys.argv[1:]\ntext = sys.stdin.read()\n"
                      "if voice == 'bad': sys.exit('no such voice')\n"
                      "soundfile.write(out, .3 * numpy.sin(numpy.arange(1500 * len(text)) / 20), 24000)\n")
    engine = Engine("command", f"{sys.executable} {script} {{out}} {{voice}}")
    rows = read_manifest(make_spoken(TEXTS, "no", tmp_path / "clips", engine, ["a"]))
    assert len(rows) == 6 and rows[0]["speaker_id"] == "command-a"
    with pytest.raises(EngineError, match="none of 2 clips could be had: the command ended with 1: no such voice"):
        make_spoken(TEXTS[:2], "no", tmp_path / "bad", engine, ["bad"])
    with pytest.raises(EngineError, match="there is no command 'speek'"):
        make_spoken(TEXTS, "no", tmp_path / "none", Engine("command", "speek {out}"), ["a"])


@pytest.mark.parametrize(("engine", "message"), [
    (Engine("polly"), "engine is 'polly'; allowed are espeak-ng, azure, openai, command"),
    (Engine("azure"), "price of your plan"),
    (Engine("openai"), "address of a server"),
    (Engine("openai", "http://localhost:1"), "no voice of openai is known for no; name some"),
    (Engine("command", "espeak"), "has no {out}"),
])
def test_what_is_missing_is_said_before_anything_is_asked_for(monkeypatch, tmp_path, engine, message):
    monkeypatch.setenv("AZURE_SPEECH_REGION", "northeurope")
    monkeypatch.setenv("AZURE_SPEECH_KEY", KEY)
    with pytest.raises(EngineError, match=message.replace("{", r"\{")):
        make_spoken(TEXTS, "no", tmp_path, engine)


@pytest.mark.parametrize("name", ["AZURE_SPEECH_REGION", "AZURE_SPEECH_KEY"])
def test_what_is_not_in_the_environment_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setenv("AZURE_SPEECH_REGION", "northeurope")
    monkeypatch.setenv("AZURE_SPEECH_KEY", KEY)
    monkeypatch.delenv(name)
    with pytest.raises(EngineError, match=f"{name}.*"):
        make_spoken(TEXTS, "no", tmp_path, Engine("azure", price=16.0))
