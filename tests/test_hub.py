"""A model is found by folder or hub id, whole or named with its fault, and one that is not there says how to get it."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from csm_nb import hub, paths, provenance
from csm_nb.codec.mimi import load_codec
from csm_nb.csm.load import load_base
from csm_nb.hub import ModelError, describe_model, download_model, fetch_model, find_faults, find_model, list_missing
from csm_nb.judge.judges import load_lid
from csm_nb.languages import get_language
from csm_nb.paths import ROOT, STAGES
from csm_nb.runs import models
from csm_nb.runs.__main__ import main
from csm_nb.runs.chain import plan_tasks
from csm_nb.runs.folders import find_inputs
from csm_nb.runs.params import read_cell

WEIGHTS = {"w": np.zeros(1000, np.float32)}


def make_model(folder, weights=("model.safetensors",), **files):
    """A small model that is whole: config.json, tokenizer, processor and weights; `files` over them, None for none."""
    folder.mkdir(parents=True)
    for name in weights:
        save_file(WEIGHTS, folder / name)
    for name, text in ({"config_json": "{}", "tokenizer_json": "{}", "processor_config_json": "{}"} | files).items():
        path = folder / name.replace("_json", ".json").replace("_md", ".md")
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's root of its own: params/, the shipped models linked under models/, no other model, no hub's cache."""
    (tmp_path / "models").mkdir()
    os.symlink(ROOT / "params", tmp_path / "params")
    for name in ("csm-mini", "lid-mini", "asr-mini"):
        os.symlink(ROOT / "models" / name, tmp_path / "models" / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_folder_below_the_root_is_found_by_its_relative_name():
    assert fetch_model("models/csm-mini") == ROOT / "models/csm-mini"


def test_a_hub_id_while_offline_says_how_to_download_it_and_where_to_put_it(root):
    with pytest.raises(ModelError, match="(?s)hf download sesame/csm-1b --local-dir models/csm-1b.*in params/"):
        fetch_model("sesame/csm-1b")


def test_a_judge_that_is_a_hub_id_gives_the_same_advice(root):
    with pytest.raises(ModelError, match="hf download facebook/mms-lid-126"):
        load_lid("facebook/mms-lid-126", "cpu")


def test_a_hub_id_in_the_local_cache_is_found_without_a_network(tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--someone--small"
    make_model(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fetch_model("someone/small").name == commit
    (cached / "snapshots" / commit / "model.safetensors").write_text("x")  # cut off, and no network to go on by
    with pytest.raises(ModelError, match="hf download someone/small"):
        fetch_model("someone/small")


def test_a_folder_that_is_not_there_lists_what_there_is():
    with pytest.raises(ModelError, match="no such folder.*csm-mini"):
        fetch_model("models/csm-minni")


@pytest.mark.parametrize(("files", "weights", "lacks"), [
    ({"config_json": None}, (), r"config.json and weights \(\*.safetensors\)"), ({}, (), "weights"),
    ({"config_json": None}, ("model.safetensors",), "config.json"),
    ({"tokenizer_json": None}, ("model.safetensors",), "a tokenizer"),
    ({"processor_config_json": None}, ("model.safetensors",), "a processor"),
])
def test_a_folder_that_is_not_whole_names_what_it_lacks(tmp_path, files, weights, lacks):
    with pytest.raises(ModelError, match=f"lacks {lacks}.*hf download OWNER/model --local-dir "):
        fetch_model(make_model(tmp_path / "model", weights, **files), "base_model")


@pytest.mark.parametrize(("stage", "values", "message"), [
    ("03_adapter", {"base_model": "models/asr-mini"}, "says model_type wav2vec2-bert; allowed for base_model is a CSM model"),
    ("03_adapter", {"base_model": "models/lid-mini"}, "says model_type wav2vec2-bert; allowed for base_model is a CSM model"),
    ("00_mimi_sanity", {"codec_model": "models/lid-mini"}, "allowed for codec_model is Mimi, or a CSM model"),
    ("00_mimi_sanity", {"align_model": "models/lid-mini"}, "allowed for align_model is a CTC recogniser"),
    ("04_confusion", {"lid_model": "models/asr-mini"}, "says architectures Wav2Vec2BertForCTC; allowed for lid_model is a "),
    ("04_confusion", {"asr_model": "models/csm-mini"}, "allowed for asr_model is a speech recogniser"),
    ("04_confusion", {"asr_model": "models/lid-mini"}, "allowed for asr_model is a speech recogniser"),
])
def test_a_model_of_another_kind_is_refused_before_anything_starts(stage, values, message):
    with pytest.raises(ModelError, match=message):
        plan_tasks(["da"], [stage], "test", ({"init_adapter": ""} if stage == "03_adapter" else {}) | values)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 6211186784\n"
INDEX = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})


def break_model(folder, fault):
    """Break one file of a model as people's are broken."""
    weights = folder / "model.safetensors"
    if fault == "pointer":
        weights.write_bytes(POINTER)
    elif fault == "half":
        weights.write_bytes(weights.read_bytes()[:-1500])
    elif fault == "head only":
        weights.write_bytes(weights.read_bytes()[:5])
    elif fault == "empty":
        weights.write_bytes(b"")
    elif fault == "dangling":
        weights.unlink()
        weights.symlink_to("../../blobs/4d7a2146")
    elif fault == "page":
        weights.write_text("<html>Access to this model is restricted</html>")
    elif fault == "half a config":
        (folder / "config.json").write_text('{"model_type": "cs')
    elif fault == "tokenizer pointer":
        (folder / "tokenizer.json").write_bytes(POINTER)
    elif fault == "half a zip":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    elif fault == "shard missing":
        weights.rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(INDEX)
    elif fault == "shard pointer":
        weights.rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(INDEX)
        (folder / "two.safetensors").write_bytes(POINTER)
    elif fault == "named index missing":
        (folder / "config.json").write_text('{"transformers_weights": "transformers.safetensors.index.json"}')
    elif fault == "broken index":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text("{}")


FAULTS = [
    ("pointer", "model.safetensors is a git-lfs pointer"), ("half", "model.safetensors is cut off"),
    ("head only", "model.safetensors is cut off"), ("empty", "model.safetensors is empty"),
    ("dangling", "model.safetensors is a link to ../../blobs/4d7a2146, which is not there"),
    ("page", "model.safetensors is cut off or no safetensors file"), ("half a config", "config.json is no JSON"),
    ("tokenizer pointer", "tokenizer.json is a git-lfs pointer"), ("half a zip", "pytorch_model.bin is cut off"),
    ("shard missing", "two.safetensors is not there"), ("shard pointer", "two.safetensors is a git-lfs pointer"),
    ("named index missing", "transformers.safetensors.index.json is not there"),
    ("broken index", "index of weights can not be used"),
]


@pytest.mark.parametrize(("fault", "says"), FAULTS)
def test_a_model_that_is_not_whole_is_named_with_file_fault_and_command(root, fault, says):
    folder = make_model(root / "models/csm-1b")
    assert find_faults(folder, "base_model") == []
    break_model(folder, fault)
    with pytest.raises(ModelError, match=f"sesame/csm-1b: .*{says}.*hf download sesame/csm-1b --local-dir models/csm-1b"):
        fetch_model("sesame/csm-1b")


def test_weights_that_are_not_read_may_be_as_they_like(root):
    folder = make_model(root / "models/csm-1b", ("one.safetensors", "two.safetensors"),
                        config_json='{"transformers_weights": "transformers.safetensors.index.json"}')
    (folder / "transformers.safetensors.index.json").write_text(INDEX)
    (folder / "model.safetensors").write_bytes(POINTER)
    (folder / "ckpt.pt").write_bytes(POINTER)
    assert fetch_model("sesame/csm-1b") == folder
    assert [path.name for path in hub.find_weights(folder)] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(("key", "source"), [("base_model", "csm-mini"), ("lid_model", "lid-mini"), ("asr_model", "asr-mini")])
def test_a_broken_model_is_named_before_any_notebook_starts(tmp_path, key, source):
    mine = shutil.copytree(ROOT / "models" / source, tmp_path / "mine")
    os.truncate(mine / "model.safetensors", 2_000_000)
    with pytest.raises(ModelError, match="mine is not whole: model.safetensors is cut off .*2000000 bytes"):
        plan_tasks(["da"], ["02_synthetic"], "test", {key: str(mine), "init_adapter": "", "runs_dir": str(tmp_path / "runs")})
    words = ["--langs", "da", "--stages", "02_synthetic", "--profile", "test", "--set", "init_adapter=", f"{key}={mine}"]
    assert main(words) == 2
    assert not (tmp_path / "runs").exists()


def test_a_shipped_model_that_is_broken_says_how_it_comes_back(root):
    (root / "models/asr-mini").unlink()
    make_model(root / "models/asr-mini", model_safetensors=POINTER)
    (root / "models/asr-mini/model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match="git checkout -- models/asr-mini"):
        fetch_model("models/asr-mini", "asr_model")


def test_a_hub_id_is_looked_for_under_models_by_its_last_name_for_every_model(root):
    for name, source in (("csm-1b", "csm-mini"), ("mms-lid-126", "lid-mini"), ("nb-whisper-large", "asr-mini")):
        os.symlink(ROOT / "models" / source, root / "models" / name)
    assert load_base("sesame/csm-1b", "cpu")[0].config.num_codebooks == 8
    assert load_codec("sesame/csm-1b").config.num_quantizers == 8
    assert load_lid("facebook/mms-lid-126", "cpu").model.config.num_labels > 2
    assert "miniature" in describe_model("sesame/csm-1b").lower()
    assert list_missing([{"base_model": "sesame/csm-1b", "language": "no", "asr_model": "by-language"}]) == []
    assert list_missing([{"language": "sv", "asr_model": "by-language", "lid_model": "facebook/mms-lid-126"}]) == [
        "KBLab/kb-whisper-large"]


def test_a_path_is_no_hub_id_and_no_hub_id_is_a_shipped_model(root):
    make_model(root / "models/mine")
    (root / "data").mkdir()
    assert find_model("data/mine") is None and find_model("someone/csm-mini") is None
    with pytest.raises(ModelError, match="data/mine: no such folder"):
        fetch_model("data/mine")
    assert find_model("someone/mine") == root / "models/mine"
    folder = make_model(root / "data/mine")
    assert fetch_model("data/mine") == folder
    with pytest.raises(ModelError, match="a file, where a folder is wanted"):
        fetch_model("data/mine/model.safetensors")


def test_a_folder_that_is_a_dangling_link_is_named_and_the_hub_not_asked(root):
    os.symlink("/elsewhere/csm-1b", root / "models/csm-1b")
    for check in (fetch_model, lambda name: hub.check_models([{"language": "da", "base_model": name}])):
        with pytest.raises(ModelError, match="csm-1b is a link to /elsewhere/csm-1b, which is not there"):
            check("sesame/csm-1b")


def test_moshis_models_are_looked_at_file_by_file(tmp_path):
    folder = make_model(tmp_path / "moshiko", ("tokenizer-e351c8d8-checkpoint125.safetensors",), config_json=None)
    params = {"language": "da", "codec_model": str(folder), "backend": "moshi"}
    hub.check_models([params])
    (weights,) = folder.glob("*.safetensors")
    os.truncate(weights, 100)
    for name in (folder, weights):
        with pytest.raises(ModelError, match="checkpoint125.safetensors is cut off"):
            hub.check_models([params | {"codec_model": str(name)}])


def test_a_hub_id_counts_by_the_folder_that_it_is_found_in(root):
    params = {"language": "no", "base_model": "sesame/csm-1b", "asr_model": "by-language"}
    assert {key: value["hash"] for key, value in find_inputs(params).items()} == {
        "base_model": "sesame/csm-1b", "asr_model": "NbAiLab/nb-whisper-large"}
    folder = make_model(root / "models/csm-1b")
    make_model(root / "models/nb-whisper-large")
    here = find_inputs(params)
    assert here["base_model"] == {"path": "models/csm-1b", "hash": provenance.hash_folder(folder)}
    save_file({"w": np.ones(1000, np.float32)}, root / "models/nb-whisper-large/model.safetensors")
    assert find_inputs(params)["asr_model"]["hash"] != here["asr_model"]["hash"]
    compared = find_inputs(params | {"compare": ["no", "sv"]})["asr_model"]
    assert compared["path"] == "openai/whisper-large-v3, models/nb-whisper-large, KBLab/kb-whisper-large"


def test_without_a_hub_a_run_says_at_once_which_models_to_bring(root, capsys):
    assert main(["--langs", "no", "--stages", "01_anchor", "02_synthetic", "--profile", "csm-1b"]) == 2
    said = capsys.readouterr().err
    for name in ("sesame/csm-1b", "facebook/mms-lid-126", "NbAiLab/nb-whisper-large"):
        assert f"hf download {name} --local-dir models/{name.split('/')[1]}" in said


FILES = {  # of a repository that holds its weights twice, as sesame/csm-1b does
    "config.json": 1, "tokenizer.json": 2, "processor_config.json": 1, "README.md": 1, "LICENSE": 1, "ckpt.pt": 6_000,
    "model.safetensors": 6_000, "model.safetensors.index.json": 1, "transformers.safetensors.index.json": 1,
    "one.safetensors": 4_000, "two.safetensors": 2_000, "model.onnx": 5, "prompts/a.wav": 7, "original/config.json": 1,
}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub of one repository; returns the file patterns that were asked for."""
    source, asked = tmp_path / "remote", []
    make_model(source, ("model.safetensors", "one.safetensors", "two.safetensors"),
               config_json='{"transformers_weights": "transformers.safetensors.index.json"}')
    (source / "transformers.safetensors.index.json").write_text(INDEX)

    def copy(name, files, local_dir):
        folder = local_dir or tmp_path / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if (source / file).is_file():
                shutil.copy(source / file, folder / file)
        return folder

    def snapshot(name, allow_patterns=None, local_dir=None, local_files_only=False, etag_timeout=0):
        if local_files_only:
            raise hub.LocalEntryNotFoundError("nothing cached")
        asked.extend(allow_patterns)
        return str(copy(name, allow_patterns, local_dir))

    siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in FILES.items()]
    info = SimpleNamespace(siblings=siblings, card_data={"license": "apache-2.0"})
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=lambda name, **_: info))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, local_dir=None, **_: str(copy(name, [file], local_dir) / file))
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return asked


def test_only_the_weights_that_transformers_reads_are_fetched(root, remote):
    folder = download_model("sesame/csm-1b", root / "models/csm-1b")
    assert remote == ["LICENSE", "README.md", "config.json", "one.safetensors", "processor_config.json", "tokenizer.json",
                      "transformers.safetensors.index.json", "two.safetensors"]
    assert fetch_model("sesame/csm-1b") == folder == find_model("sesame/csm-1b")


def test_a_hub_id_that_is_nowhere_here_is_fetched_and_checked(root, remote):
    assert find_faults(fetch_model("sesame/csm-1b", "base_model")) == [] and "ckpt.pt" not in remote


def test_every_report_can_say_what_its_model_is():
    said = {name: describe_model(f"models/{name}") for name in ("csm-mini", "asr-mini", "lid-mini")}
    assert all("synthetic" in text and "miniature" in text.lower() for text in said.values()), said


def test_a_card_is_read_past_its_metadata_headings_and_pictures(tmp_path):
    card = "---\nlicense: mit\n---\n# Name\n\n![picture](x.png)\n\nWhat it\nis.\n\nMore.\n"
    make_model(tmp_path / "model", README_md=card)
    assert describe_model(tmp_path / "model").endswith(": What it is.")


def test_a_model_without_a_card_is_named_as_such(tmp_path):
    assert "no model card" in describe_model(make_model(tmp_path / "model"))


def test_a_card_in_another_encoding_stops_no_report(tmp_path):
    folder = make_model(tmp_path / "model", README_md="# X\n\nEt måltal.\n".encode("latin-1"))
    assert describe_model(folder).endswith("Et m\ufffdltal.")


def test_what_a_profile_needs_is_listed_by_language_and_stage_with_size_and_licence(root):
    table = models.list_needed(["no", "da"], "csm-1b").set_index("model")
    assert set(table.index) == set(models.KNOWN)
    assert (table.here == "").all() and table.GB["sesame/csm-1b"] == 6.6
    assert "not for commercial" in table.licence["facebook/mms-lid-126"]
    assert table.languages["CoRal-project/roest-wav2vec2-315m-v2"] == "da"
    assert table.used["sesame/csm-1b"] == "base_model of 01 02 03 04 05"
    assert table.used["openai/whisper-large-v3"] == "asr_model of 04"
    assert table.used["NbAiLab/nb-whisper-large"] == "asr_model of 00 02 03 04 05"
    shipped = models.list_needed(["sv"], "mini").set_index("model")
    assert shipped.here.to_dict() == {f"models/{name}": f"models/{name}" for name in ("csm-mini", "lid-mini", "asr-mini")}
    assert (shipped.fault == "").all() and (shipped.licence == "apache-2.0").all() and 0.01 < shipped.GB["models/csm-mini"] < 0.02


def test_the_recognisers_of_by_language_are_those_that_the_notebook_loads():
    shared = "".join((paths.PACKAGE / "teaching" / f"{name}.py").read_text(encoding="utf-8") for name in ("stage", "several"))
    for stage in set(STAGES) - {"01_anchor"}:  # which asks no judge
        source = (paths.NOTEBOOKS / f"{stage}.ipynb").read_text(encoding="utf-8").replace('\\"', '"')
        source += shared if "stage.load_judges(run)" in source else ""
        asked = set(re.findall(r"load_asr\(run.asr_model, run.device, ([^)]+)\)", source))
        params = {name: cell.default for name, cell in read_cell(stage).items()}
        taught = ["sv", "da"] if "also" in params else ["sv"]
        params |= {"language": "sv", "asr_model": "by-language"} | ({"also": taught[1:]} if "also" in params else {})
        params |= {"compare": ["no", "sv"]} if "compare" in params else {}
        heard = {"run.language": ["sv"], "code": ["en", "no", "sv", "da"] if "compare" in params else taught}
        assert asked <= heard.keys() and asked
        wanted = dict.fromkeys(get_language(code).asr for kind in asked for code in heard[kind])
        assert set(hub.list_models(params)["asr_model"]) == set(wanted)


def test_the_list_says_what_is_missing_and_how_it_comes_here(root, capsys):
    assert models.main(["--profile", "mini", "--langs", "da", "--fetch"]) == 0
    assert "3 of 3 models are here" in capsys.readouterr().out
    assert models.main(["--profile", "csm-1b", "--langs", "pl", "--fetch"]) == 1
    said = capsys.readouterr().out
    assert "hf download sesame/csm-1b --local-dir models/csm-1b" in said and "0 of 4 models are here" in said
    assert "PFLOP" in said and "price_per_hour" in said and "GB of disk are free" in said
    assert models.main(["--profile", "nothing"]) == 2


def test_the_rest_is_fetched_to_models_and_found_there(root, remote, monkeypatch):
    monkeypatch.setattr(models, "is_offline_mode", lambda: False)
    table = models.list_needed(["no"], "csm-1b", ["02_synthetic"])
    assert set(table.licence) == {"apache-2.0"} and table.GB.tolist()[0] == pytest.approx(6007e-9)
    assert models.fetch_missing(table) == []
    table = models.list_needed(["no"], "csm-1b", ["02_synthetic"])
    assert sorted(table.here) == ["models/csm-1b", "models/mms-lid-126", "models/nb-whisper-large"] and set(table.fault) == {""}
    assert not (root / "models/csm-1b/ckpt.pt").exists()


def test_without_a_network_the_hub_is_asked_once_and_the_commands_are_said(root, monkeypatch, capsys):
    asked = []

    def fail(name, **_):
        asked.append(name)
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=fail))
    monkeypatch.setattr(models, "is_offline_mode", lambda: False)
    assert models.main(["--profile", "csm-1b", "--langs", "no", "--fetch"]) == 1
    said = capsys.readouterr()
    assert len(asked) == 3 and "hf download sesame/csm-1b --local-dir models/csm-1b" in said.out  # list, fetch, list again
    assert said.err.count("error:") == 1 and "ConnectError" in said.err


def test_a_disk_that_will_not_hold_the_models_is_said_before_anything_is_fetched(root, remote, monkeypatch):
    monkeypatch.setattr(hub, "count_free_disk", lambda: 5000)
    (said,) = models.fetch_missing(models.list_needed(["no"], "csm-1b", ["01_anchor"]))
    assert "make room" in said and remote == []
