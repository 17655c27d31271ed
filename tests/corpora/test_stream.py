"""A data set of the hub is streamed: by a server that speaks the hub's protocol, and goes away in the middle."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from conftest import ROOT

from csm_nb import paths
from csm_nb.corpora import cut
from csm_nb.corpora.listed import find_remote
from csm_nb.manifest import CorpusError
from csm_nb.recipe import ParameterError
from csm_nb.runs import folders, params

ENTRY = {"id": "somebody/tale", "config": "dk", "licence": "CC0", "use": ["train"], "filters": {"score": "> 0.5"}}
SCRIPT = """
import json, sys, time
from pathlib import Path
from csm_nb import paths
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # between the hub client's retries
paths.ROOT = Path(sys.argv[1])
from csm_nb.corpora.listed import describe_licence, take_corpus
from csm_nb.corpora.sources import load_corpus
corpus, limit = sys.argv[2], int(sys.argv[3])
try:
    rows = load_corpus(take_corpus("corpus", corpus, "da"), "da", limit, 0)
    print(json.dumps({"rows": rows, "licence": describe_licence(["da"], corpus)["licence"]}))
except ValueError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of the hub that a data set is read by. `server.files` are {path: bytes}, `server.broken` answers no range."""

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))["paths"] if length else []
        self.send([self.describe(path) for path in asked if path in self.server.files])

    def describe(self, path):
        return {"type": "file", "path": path, "size": len(self.server.files[path]), "oid": "0" * 40}

    def answer(self, body):
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/datasets/somebody/tale/tree/"):
            return self.send([self.describe(path) for path in self.server.files])
        if path.startswith("/api/datasets/somebody/tale"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.send({"id": "somebody/tale", "sha": "a" * 40, "siblings": siblings, "cardData": self.server.card})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if not path.startswith("/datasets/somebody/tale/resolve/") or name not in self.server.files:
            return self.send({"error": "not found"}, 404)
        data, asked = self.server.files[name], self.headers.get("Range")
        first, last = (int(x) for x in asked.removeprefix("bytes=").split("-")) if asked else (0, len(data) - 1)
        if asked and body:
            self.server.ranges.append((name, first, last))
            if self.server.left <= 0:
                self.close_connection = True
                return self.connection.close()
            self.server.left -= 1
        self.send_response(206 if asked else 200)
        data = data[first : last + 1]
        for key, value in {"Content-Length": len(data), "ETag": '"x"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes",
                           "Content-Range": f"bytes {first}-{last}/{len(self.server.files[name])}"}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def send(self, content, status=200):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def make_table(path, count=6, first=0):
    """Parquet of `count` clips of its own, two in a row group; every third fails the filter."""
    rows = []
    for number in range(first, first + count):
        wav = np.random.default_rng(number).normal(0, 0.1, 8000).astype(np.float32)  # noise: it does not shrink
        file = path.parent / "x.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, wav, 8000)
        rows.append({"text": f"nummer {number}", "speaker_id": number % 3, "score": 0.2 if number % 3 == 2 else 0.9,
                     "audio": {"bytes": file.read_bytes(), "path": f"{number}.wav"}})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made = {f"dk/train/000{at}.parquet": make_table(tmp_path / f"hub/{at}.parquet", first=6 * at) for at in range(2)}
    made |= dict.fromkeys(("dk/test/0000.parquet", "se/train/0000.parquet"), make_table(tmp_path / "hub/9.parquet", first=90))
    server.files, server.card, server.ranges, server.left = made, {"license": "cc0-1.0"}, [], 10**6
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "params").mkdir(parents=True)
    (root / "params/da.yaml").write_text(yaml.safe_dump({"language": "da", "corpora": {"tale": ENTRY}}))
    monkeypatch.setattr(paths, "ROOT", root)
    return root


def load(hub, project, corpus, limit):
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
                        "NO_PROXY": "127.0.0.1", "HF_HOME": str(project / "home"), "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(project), corpus, str(limit)], env=env, capture_output=True,
                          text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_listed_corpus_is_streamed_and_goes_on_after_the_network_went_away(hub, project, capsys):
    hub.left = 5
    broken = load(hub, project, "tale", 7)["error"]
    fetched, asked = hub.ranges[2:5], len(hub.ranges)  # after two footers
    kept = len(list((project / "data/clips").glob("*.wav")))
    assert 0 < kept < 7 and "somebody/tale: the stream broke off" in broken
    assert f"{kept} of 7 clips are in data/streams/tale-" in broken
    hub.left = 10**6
    done = load(hub, project, "tale", 100)["rows"]
    numbers = [int(row["text"].split()[1]) for row in done]
    assert sorted(numbers) == [number for number in range(12) if number % 3 != 2]  # train, dk, filtered
    assert all(Path(row["audio_path"]).is_file() and row["of_corpus"] == "somebody/tale" for row in done)
    assert not set(fetched) & set(hub.ranges[asked:])  # a row group is fetched once
    assert cut.stream_clips(ENTRY, "da", 5) == done[:5]  # here there is no network: nothing is fetched twice
    assert cut.stream_clips(ENTRY, "da", 100) == done
    assert "the filter score > 0.5 leaves out 4 of 12 rows" in capsys.readouterr().out


def test_any_id_of_the_hub_is_a_corpus_and_its_licence_is_that_of_its_card(hub, project):
    hub.files = {name: data for name, data in hub.files.items() if name.startswith("dk/train")}
    (project / "params/da.yaml").write_text("language: da\n")
    done = load(hub, project, "somebody/tale", 3)
    assert len(done["rows"]) == 3 and done["licence"] == "of the data: cc0-1.0"
    assert "unheard/of exists" in load(hub, project, "unheard/of", 3)["error"]


def test_without_a_network_a_listed_corpus_says_what_to_fetch_and_a_run_is_named_by_the_id(project):
    with pytest.raises(ParameterError, match=r"no data/corpora/tale; fetch somebody/tale, config dk .*hub was asked: Offline"):
        params.check_params("03_adapter", {"language": "da", "corpus": "tale"})
    assert find_remote("da", "tale") == find_remote("da", "somebody/tale") == ENTRY
    given = {"corpus": "tale", "language": "da", "compare": []}
    hashes = [folders.find_inputs(given | {"corpus": name})["corpus"]["hash"] for name in ("tale", "somebody/tale")]
    assert hashes[0] == hashes[1]
    (project / "data/corpora/tale").mkdir(parents=True)
    assert find_remote("da", "tale") == {}


def list_info(*files, configs=None):
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files], card_data={"configs": configs})


def test_the_files_of_a_configuration_are_those_that_the_card_names_else_those_of_its_folder():
    files = ["no/partial-train/0001.parquet", "no/train/0000.parquet"]
    converted = list_info(*files, "no/test/0000.parquet", "sv/train/0000.parquet")
    assert cut._choose_files(converted, {"id": "a/b", "config": "no"}) == files
    with pytest.raises(CorpusError, match=r"several configurations \(no, sv\); name one as `config`"):
        cut._choose_files(converted, {"id": "a/b"})
    card = [{"config_name": "no", "data_files": [{"split": "train", "path": "x/tr-*"}, {"split": "test", "path": "x/te-*"}]},
            {"config_name": "sv", "data_files": [{"split": "test", "path": ["y/*"]}]}]  # fmt: skip
    named = list_info("x/tr-0.parquet", "x/te-0.parquet", "y/0.parquet", "README.md", configs=card)
    assert cut._choose_files(named, {"id": "a/b", "config": "no"}) == ["x/tr-0.parquet"]
    assert cut._choose_files(named, {"id": "a/b", "config": "sv"}) == ["y/0.parquet"]
