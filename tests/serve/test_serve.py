"""The server as its clients see it: curl's two routes, OpenAI's client, and all that goes wrong."""

import base64
import io
import json
import socket
import threading
from urllib.parse import unquote

import httpx
import numpy as np
import openai
import pytest
import soundfile
from serving import ask, hear, make_adapters, make_engine, served, wait_for

from csm_nb.languages import LANGUAGES
from csm_nb.serve import __main__ as program
from csm_nb.serve.voices import OPENAI
from csm_nb.text.sentences import make_sentences

TEXTS = sorted(make_sentences("en", 40, 0, "validation"), key=len)[:6]  # short ones are spoken soon


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return make_engine(make_adapters(tmp_path_factory.mktemp("adapters"), ("no", "sv")))


@pytest.fixture(scope="module")
def address(engine):
    with served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture(autouse=True)
def then_the_next_is_served(client):
    yield
    answer = client.post("/synthesize", json={"text": "Yes.", "max_audio_length_ms": 400})
    assert answer.status_code == 200 and read(answer.content).any()


def read(data):
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def test_a_text_comes_back_as_a_wav_that_is_what_the_engine_says_of_it(client, engine):
    wav, finish = hear(ask(engine, TEXTS[0], "no", "5", 7)[1])
    answer = client.post("/synthesize", json={"text": TEXTS[0], "language": "no", "speaker": 5, "seed": 7})
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    assert np.abs(read(answer.content) - np.array(wav)).max() < 2**-14
    told = {key: answer.headers[key] for key in ("x-finish", "x-model", "x-adapter", "x-voice", "x-seed", "x-synthetic")}
    assert told == {"x-finish": finish, "x-model": "csm-mini", "x-adapter": "lora_no", "x-voice": "5", "x-seed": "7",
                    "x-synthetic": "true"}
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        assert "Synthetic" in file.comment and "csm-mini, adapter lora_no, speaker 5, seed 7" in file.comment


def test_what_is_too_long_is_cut_where_it_was_asked_to_be_and_says_so(client):
    answer = client.post("/synthesize", json={"text": TEXTS[0], "max_audio_length_ms": 400})
    assert answer.headers["x-finish"] == "length" and len(read(answer.content)) == 0.4 * 24_000
    assert 'csm_nb_finish_total{finish="length"}' in client.get("/metrics").text


def test_many_languages_at_once_get_each_their_own(client):
    asked = [{"text": TEXTS[n % 3], "language": ("en", "no", "sv")[n % 3], "seed": n // 3} for n in range(9)]
    asked = [request | {"max_audio_length_ms": 1200} for request in asked]
    answers = [None] * len(asked)

    def fetch(number):
        answers[number] = httpx.post(f"{client.base_url}/synthesize", json=asked[number], timeout=60)

    threads = [threading.Thread(target=fetch, args=[number]) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, answer in zip(asked, answers, strict=True):
        assert answer.content == client.post("/synthesize", json=request).content
    assert len({answer.content for answer in answers}) == len(asked)


def test_what_was_heard_is_said_if_asked(client):
    answer = client.post("/synthesize", json={"text": TEXTS[0], "heard": True})
    assert set(unquote(answer.headers["x-heard"])) & set(TEXTS[0].lower())


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "opus", "pcm"])
def test_openai_s_client_gets_a_file_in_every_format(sdk, kind):
    said = sdk.audio.speech.create(model="tts-1", voice="alloy", input="Good morning.", response_format=kind)
    heads = {"wav": b"RIFF", "mp3": b"ID3", "flac": b"fLaC", "opus": b"OggS"}
    assert said.content.startswith(heads.get(kind, b"")) and len(said.content) > 1000


def test_openai_s_client_hears_it_while_it_comes(sdk):
    how = {"model": "lora_sv", "voice": "5", "input": TEXTS[1], "response_format": "wav"}
    with sdk.audio.speech.with_streaming_response.create(**how, stream_format="audio") as answer:
        pieces = list(answer.iter_bytes())
    whole = sdk.audio.speech.create(**how, extra_body={"language": "sv", "seed": 0}).content
    streamed = b"".join(pieces)
    place = whole.index(b"data") + 8
    assert len(pieces) > 2 and streamed[place:] == whole[place:] and streamed[place - 4 : place] == b"\xff" * 4


def test_openai_s_events_are_the_same_speech(sdk, client):
    how = {"model": "csm-mini", "voice": "ash", "input": TEXTS[1], "response_format": "pcm"}
    with sdk.audio.speech.with_streaming_response.create(**how, stream_format="sse") as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.done" and events[-1]["usage"]["output_tokens"] > 0
    streamed = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert streamed == sdk.audio.speech.create(**how).content and events[-1]["finish"] == "end"


def test_openai_s_client_is_told_what_there_is(sdk):
    assert {model.id for model in sdk.models.list()} == {"csm-mini", "lora_no", "lora_sv"}
    with pytest.raises(openai.BadRequestError, match="unknown voice 'nobody'; the base has 0, 1, 2, 3"):
        sdk.audio.speech.create(model="tts-1", voice="nobody", input="Hello.")
    with pytest.raises(openai.BadRequestError, match="unknown response_format 'aac'; there are wav, mp3, flac, opus, pcm"):
        sdk.audio.speech.create(model="tts-1", voice="alloy", input="Hello.", response_format="aac")


SPEECH = {"model": "tts-1", "input": "Hello.", "voice": "alloy"}
REFUSED = {
    "empty": ("/synthesize", {"text": ""}, 400, "text: String should have at least 1"),
    "nothing to say": ("/synthesize", {"text": " ?! "}, 400, "nothing to say"),
    "emoji": ("/synthesize", {"text": "🙂🙂"}, 400, "neither letter nor digit"),
    "control characters": ("/synthesize", {"text": "\x00\x07\x1b"}, 400, "nothing to say"),
    "another script": ("/synthesize", {"text": "Привет"}, 400, "knows none of its letters"),
    "too long": ("/synthesize", {"text": "a" * 100_000}, 413, "allowed are 65536"),
    "long": ("/synthesize", {"text": "a" * 4097}, 413, "at most 4096 characters"),
    "no text": ("/synthesize", {}, 400, "text: Field required; the fields are language, seed"),
    "unknown field": ("/synthesize", {"text": "a", "langauge": "no"}, 400, "langauge: Extra inputs"),
    "number as text": ("/synthesize", {"text": 5}, 400, "text: Input should be a valid string"),
    "text as seed": ("/synthesize", {"text": "a", "seed": "1"}, 400, "seed: Input should be a valid integer"),
    "negative seed": ("/synthesize", {"text": "a", "seed": -1}, 400, "seed: Input should be greater than or equal to 0"),
    "endless": ("/synthesize", {"text": "a", "max_audio_length_ms": 10**9}, 400, "less than or equal to 120000"),
    "list": ("/synthesize", [1], 400, "body: Input should be a valid dict"),
    "unknown language": ("/synthesize", {"text": "a", "language": "tlh"}, 400, "unknown language 'tlh'; there are en, no, sv"),
    "a path as language": ("/synthesize", {"text": "a", "language": "../../etc"}, 400, "unknown language '../../etc'"),
    "missing language": ("/synthesize", {"text": "a", "language": "da"}, 400, "make run LANGS=da PROFILE=mini makes its adapter"),
    "unknown speaker": ("/synthesize", {"text": "a", "speaker": 99}, 400, "unknown voice '99'; the base has 0, 1, 2, 3"),
    "a speaker not its own": ("/synthesize", {"text": "a", "language": "no", "speaker": 1}, 400, "lora_no has 20, 5"),
    "unknown model": ("/v1/audio/speech", SPEECH | {"model": "/etc/passwd"}, 400, "there are csm-mini, lora_no, lora_sv, and "),
    "another's model": ("/v1/audio/speech", SPEECH | {"model": "lora_no", "language": "sv"}, 400, "lora_sv does"),
    "speed": ("/v1/audio/speech", SPEECH | {"speed": 2.0}, 400, "speed is 2.0; allowed is 1.0"),
    "instructions": ("/v1/audio/speech", SPEECH | {"instructions": "whisper"}, 400, "instructions can not be followed"),
    "stream format": ("/v1/audio/speech", SPEECH | {"stream_format": "midi"}, 400, "'audio' or 'sse'"),
    "voice as object": ("/v1/audio/speech", SPEECH | {"voice": {"name": 1}}, 400, "a number in quotes"),
}


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_gets_a_clear_answer(client, path, body, status, message):
    answer = client.post(path, json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"{\"text\": \"\xff\"}", b"text=hello"])
def test_what_is_no_json_gets_a_clear_answer(client, body):
    answer = client.post("/synthesize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_half_a_character_and_control_tokens_are_spelled_or_refused(client):
    half = client.post("/synthesize", content=b'{"text": "a \\ud800 b"}', headers={"content-type": "application/json"})
    assert half.status_code == 400
    tokens = client.post("/synthesize", json={"text": "Hello <|end_of_text|> [1] you", "max_audio_length_ms": 1000})
    assert tokens.status_code == 200 and len(read(tokens.content)) > 0.5 * 24_000


def test_paths_and_methods_that_there_are_not_are_told(client):
    assert client.get("/../../etc/passwd").status_code == 404
    assert "/docs lists" in client.get("/synthesise").json()["error"]["message"]
    assert client.get("/synthesize").status_code == 405


def test_a_body_of_50_mb_is_answered_with_the_limit(client):
    for content in (bytes(50_000_000), iter([bytes(1_000_000)] * 50)):  # with its length before, and without
        answer = client.post("/synthesize", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "50000000 bytes; allowed are 65536" in answer.json()["error"]["message"]


def test_two_thousand_quick_connections_keep_nobody_out(address):
    host, port = address.removeprefix("http://").split(":")
    for number in range(2000):
        with socket.create_connection((host, int(port)), timeout=30) as quick:
            quick.sendall(b"GET /healthz HTTP/1.1\r\n" if number % 2 else b"")
    assert httpx.get(f"{address}/healthz", timeout=30).json() == {"status": "ok"}


def test_a_client_that_reads_a_byte_at_a_time_holds_no_row(address, engine):
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(SPEECH | {"input": TEXTS[0], "response_format": "wav", "stream_format": "audio"}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((host, int(port)))
        slow.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert slow.recv(1) == b"H"
        wait_for(lambda: engine.count_taken() == 0)  # it was spoken to its end


def test_who_hangs_up_frees_the_row(address, engine):
    seen, prepare = [], engine.prepare
    engine.prepare = lambda *request: seen.append(prepare(*request)) or seen[-1]
    try:
        how = SPEECH | {"input": TEXTS[0] + TEXTS[1], "response_format": "pcm", "stream_format": "audio"}
        with httpx.stream("POST", f"{address}/v1/audio/speech", json=how, timeout=60) as answer:
            next(answer.iter_bytes())
        whole = socket.create_connection(address.removeprefix("http://").split(":"))
        body = json.dumps({"text": TEXTS[2]}).encode()
        whole.sendall(b"POST /synthesize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                      % (len(body), body))
        wait_for(lambda: len(seen) == 2)
        whole.close()
        wait_for(lambda: all(job.gone for job in seen) and not engine.count_taken())
    finally:
        del engine.prepare
    assert not seen[1].codes or seen[0].codes == []  # neither had to be spoken to its end


def test_beyond_the_queue_there_are_503s_only_and_they_say_when_to_come_again(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "most", 2)
    monkeypatch.setattr(engine, "slots", 0)  # nobody gets a row
    waiting = [ask(engine, TEXTS[0])[0] for _ in range(2)]
    answer = client.post("/synthesize", json={"text": "Hello."})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    assert "2 requests are waiting" in answer.json()["error"]["message"]
    for job in waiting:
        engine.hang_up(job)
    monkeypatch.undo()


def test_languages_lists_who_reads_and_what_makes_the_missing_ones(client):
    rows = {row["code"]: row for row in client.get("/languages").json()["languages"]}
    assert rows.keys() == LANGUAGES.keys()
    whose = [f"{number}: of corpus/manifest.jsonl ({clips} clips)" for number, clips in ((20, 12), (5, 9))]
    assert rows["no"] == {"code": "no", "name": "Norwegian", "available": True, "adapter": "lora_no", "voices": ["20", "5"],
                          "whose": whose, "licence": "of the data: CC0-1.0"}
    assert rows["en"]["licence"] == "apache-2.0" and "make run LANGS=pl" in rows["pl"]["missing"]
    voices = {row["language"]: row for row in client.get("/v1/audio/voices").json()["voices"]}
    assert voices["sv"]["openai"].keys() == set(OPENAI) and voices["sv"]["openai"]["ash"] == "5"
    assert voices["sv"]["default"] == "21"


def test_health_ready_metrics_and_page_answer(client, engine, monkeypatch):
    assert client.get("/healthz").json() == {"status": "ok"} and client.get("/ready").status_code == 200
    text = client.get("/metrics").text
    assert 'csm_nb_answers_total{route="/synthesize",status="200"}' in text and "csm_nb_adapters 2.0" in text
    assert "<textarea" in client.get("/").text and "/v1/audio/speech" in client.get("/openapi.json").text
    monkeypatch.setattr(engine, "ready", False)
    assert client.get("/ready").status_code == 503 and client.get("/healthz").status_code == 200


def test_with_a_key_every_route_but_two_wants_it(engine, tmp_path):
    with served(make_engine(tmp_path), key="sesame") as address, httpx.Client(base_url=address) as client:
        assert client.get("/healthz").status_code == client.get("/ready").status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/languages", "/metrics", "/v1/models", "/nowhere"):
            for given in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}, {"Authorization": "Bearer ä"}):
                given = {key: value.encode() for key, value in given.items()}
                assert client.get(path, headers=given).status_code == 401, path
        assert client.get("/languages", headers={"Authorization": "Bearer sesame"}).status_code == 200
        with pytest.raises(openai.AuthenticationError, match="wants its key"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_an_open_address_is_refused_without_a_key(monkeypatch, capsys):
    monkeypatch.delenv(program.KEY, raising=False)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(SystemExit):
            program.parse_arguments(["--host", host])
        assert "set CSM_NB_API_KEY" in capsys.readouterr().err
    assert all(program.parse_arguments(["--host", host]).host == host for host in ("127.0.0.1", "::1", "localhost"))
    monkeypatch.setenv(program.KEY, "secret")
    assert program.parse_arguments(["--host", "0.0.0.0"]).port == 8000
