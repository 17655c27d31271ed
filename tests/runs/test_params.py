"""Parameters are refused before anything starts; a run's hash changes with what matters and with nothing else."""

import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, write_notebook

from csm_nb import claims, paths, provenance, recipe
from csm_nb.claims import claim
from csm_nb.runs import chain, folders, params


@pytest.fixture
def here(project, monkeypatch):
    """Let the package's own `params` work in the small project."""
    monkeypatch.setattr(paths, "ROOT", project)
    monkeypatch.setattr(paths, "NOTEBOOKS", project / "notebooks")
    monkeypatch.setattr(paths, "PACKAGE", project / "csm_nb")
    return project


def wrap(values):
    """Return parameters with the fields of a recipe in their section."""
    section = {key: value for key, value in values.items() if key in recipe.FIELDS}
    return {key: value for key, value in values.items() if key not in section} | ({"recipe": section} if section else {})


def place(stage="00_mimi_sanity", **values):
    return folders.place_run(stage, params.check_params(stage, values))[0]


def complete(stage, **values):
    run = folders.open_run(stage, {name: p.default for name, p in params.read_cell(stage).items()} | values)
    (run.dir / "adapter").mkdir(exist_ok=True)
    (run.dir / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    folders.finish_run(run, {}, "go")
    return run


def test_later_files_and_overrides_win(here):
    values, origins = params.load_params(["params/da.yaml", "params/mini.yaml"], {"clips": 5})
    assert values == {"language": "da", "lr": 2.0e-3, "clips": 5}
    assert origins == {"language": "params/da.yaml", "lr": "params/mini.yaml", "clips": "command line"}
    checked = params.check_params("00_mimi_sanity", values, origins)
    assert (checked["lr"], checked["clips"], checked["audio"]) == (2.0e-3, 5, "")


def test_a_length_that_another_layer_replaced_is_from_nowhere():
    values, origins = params.load_params(["params/no.yaml", "params/test.yaml"], {"epochs": 0.5})
    assert ("01_anchor", "steps") not in origins and ("05_phonemes", "steps") not in origins
    assert origins["01_anchor", "epochs"] == "command line" and origins["01_anchor", "rank"] == "params/test.yaml"
    assert params.check_params("01_anchor", values, origins)["recipe"]["steps"] == 0


@pytest.mark.parametrize(("overrides", "message"), [
    ({"recipe": 3, "rank": 8}, "command line: recipe is 3; allowed are fields"),
    ({"recipe": {"rank": 16}, "rank": 8}, "command line: rank is given twice, as 8 and in recipe as 16; leave one"),
])  # fmt: skip
def test_a_field_alone_beside_a_recipe_is_read_with_it_or_refused(overrides, message):
    with pytest.raises(recipe.ParameterError, match=message):
        params.load_params(["params/no.yaml", "params/test.yaml"], overrides)


def test_a_comment_with_an_equals_sign_hides_no_parameter(here):
    write_notebook(here / "notebooks" / "00_mimi_sanity.ipynb", 'clips: int = 3  # 3 = enough\nname: str = "a=b"')
    found = params.read_cell("00_mimi_sanity")
    assert found == {"clips": params.Parameter("int", 3), "name": params.Parameter("str", "a=b")}


@pytest.mark.parametrize("line", ["n = 3", "n: int = 1 + 2", "n: int = '3'", "import os", "n: set = {1}"])
def test_a_cell_of_anything_but_annotated_literals_is_refused(here, line):
    write_notebook(here / "notebooks" / "00_mimi_sanity.ipynb", line)
    with pytest.raises(recipe.ParameterError, match="line 1 of the parameters cell"):
        params.read_cell("00_mimi_sanity")


def test_unknown_key_is_refused_with_file_key_and_the_known_ones(here):
    (here / "params" / "mini.yaml").write_text("clipz: 3\n")
    with pytest.raises(recipe.ParameterError, match=r"params/mini.yaml: unknown parameter 'clipz' \(value 3\).*clips"):
        params.load_params(["params/da.yaml", "params/mini.yaml"])


@pytest.mark.parametrize("text, message", [("- 1\n", "key: value"), ("a: [\n", "not readable as YAML"),
                                           ("a: 2026-99-99\n", "not readable as YAML"),
                                           ("lr: 1.0e-3\nseed: 1\nlr: 2.0e-3\n", "lr is given twice, in lines 1 and 3"),
                                           ("recipe: {steps: 3, steps: 4}\n", "steps is given twice, in line 1; leave one")])
def test_a_file_that_is_no_flat_yaml_is_refused(here, text, message):
    (here / "params" / "mini.yaml").write_text(text)
    with pytest.raises(recipe.ParameterError, match=f"params/mini.yaml: .*{message}"):
        params.load_params(["params/mini.yaml"])


def test_a_missing_file_is_refused_with_those_that_are_there(here):
    with pytest.raises(recipe.ParameterError, match="params/xx.yaml: no such file.*da.yaml, mini.yaml, sv.yaml"):
        params.load_params(["params/xx.yaml"])


@pytest.mark.parametrize("key, value, message", [
    ("clips", "12", "clips is .12. .str.; allowed is int"),
    ("clips", True, "clips is True .bool."),
    ("clips", 1.5, "clips is 1.5 .float."),
    ("lr", yaml.safe_load("1e-4"), r"lr is '1e-4' .str.*write 1.0e-4, with the point"),
    ("lr", "fast", "lr is .fast. .str.; allowed is float, such as 0.001$"),
    ("language", yaml.safe_load("no"), "language is False .bool."),
    ("language", "xx", "language is 'xx': .*da"),
    ("codebooks", ["all"], "codebooks is .*list of int"),
    ("codebooks", [], "codebooks is .*list of int"),
    ("base_model", "csm-1b", "base_model is 'csm-1b', and there is no such folder"),
    ("base_model", "models/nothing", "base_model is 'models/nothing', and there is no such folder; .*: base"),
    ("audio", "nowhere/manifest.jsonl", "audio is 'nowhere/manifest.jsonl'.*a manifest.jsonl, a folder of audio"),
])  # fmt: skip
def test_a_wrong_value_is_refused_with_origin_key_value_and_what_is_allowed(here, key, value, message):
    with pytest.raises(recipe.ParameterError, match=f"params/my.yaml: {message}"):
        params.check_params("00_mimi_sanity", {key: value}, {key: "params/my.yaml"})


@pytest.mark.parametrize(("stage", "key", "value", "message"), [
    ("00_mimi_sanity", "clips", -1, "allowed is from 1 on"),
    ("00_mimi_sanity", "clips", 0, "allowed is from 1 on"),
    ("00_mimi_sanity", "seed", -1, "allowed is from 0 to below 2147483648"),
    ("00_mimi_sanity", "codebooks", [0, 8], "allowed is from 1 on"),
    ("00_mimi_sanity", "codebooks", [8, 8], "allowed is each number once"),
    ("00_mimi_sanity", "codebooks", [True], "a list of int"),
    ("00_mimi_sanity", "device", "gpu", "allowed: auto, cpu, cuda, cuda:<number>, mps"),
    ("00_mimi_sanity", "device", "cuda:x", "allowed: auto, cpu, cuda, cuda:<number>, mps"),
    ("00_mimi_sanity", "f0_method", "crepe", "allowed: praat, pyin, torchcrepe"),
    ("00_mimi_sanity", "marks", "nowhere.tsv", "allowed: a file or a folder, or empty"),
    ("00_mimi_sanity", "audio", 7, "YAML reads .* digits as a number: write them in quotes"),
    ("00_mimi_sanity", "codec_model", "", "allowed: models/<folder>, owner/name of the hub; under models/ "),
    ("00_mimi_sanity", "asr_model", "byLanguage", "allowed: models/<folder>, owner/name of the hub, by-language; under models/ "),
    ("00_mimi_sanity", "align_model", "mini", "allowed: models/<folder>, owner/name of the hub, empty; under models/ "),
    ("02_synthetic", "init_adapter", "02_synthetic", r"trains before 02_synthetic \(01_anchor\), the folder of an"),
    ("03_adapter", "init_adapter", "04_confusion", r"trains before 03_adapter \(01_anchor, 02_synthetic\), the folder"),
    ("01_anchor", "runs_dir", "", "allowed is a folder, such as 'runs'"),
    ("03_adapter", "loudness", 23.0, "allowed is from -40 to 0"), ("03_adapter", "margin", -0.1, "allowed is from 0 to 5"),
    ("03_adapter", "pseudo_labels", 80, "allowed is from 0 to 1"), ("03_adapter", "min_dnsmos", 6.0, "allowed is from 0 to 5"),
    ("01_anchor", "max_tokens", 1, "allowed is from 64 on"),
    ("01_anchor", "lr", 0, "allowed is above 0 to 1"),
    ("01_anchor", "lr", float("nan"), "allowed is above 0 to 1"),
    ("01_anchor", "text_weight", float("inf"), "allowed is from 0 on"),
    ("01_anchor", "depth_ratio", 1.5, "allowed is above 0 to 1"),
    ("01_anchor", "depth_ratio", 0, "allowed is above 0 to 1"),
    ("01_anchor", "dropout", 1, "allowed is from 0 to below 1"),
    ("01_anchor", "rank", 0, "allowed is from 1 on"),
    ("01_anchor", "alpha", 0, "allowed is from 1 on"),
    ("01_anchor", "steps", -1, "allowed is from 0 on"),
    ("01_anchor", "epochs", -1, "allowed is from 0 on"),
    ("01_anchor", "steps", 2.5, r"\(float\); allowed is int"),
    ("01_anchor", "schedule", "step", "allowed: cosine, linear"),
    ("01_anchor", "dtype", "fp8", "allowed: auto, bfloat16, float32"),
    ("01_anchor", "backend", "jax", "allowed: transformers, unsloth"),
    ("01_anchor", "choice", "first", "allowed: best, last"),
    ("01_anchor", "train_mlp", 1, r"\(int\); allowed is bool"),
    ("01_anchor", "patience", -1, "allowed is from 0 on"),
    ("01_anchor", "codebook_weights", [1.0, -1], "allowed is from 0 on"),
    ("01_anchor", "codebook_weights", ["all"], "a list of float or int"),
    ("04_confusion", "compare", [], "a list of str"),
    ("04_confusion", "compare", [False, "da"], '"no" in quotes'),
])  # fmt: skip
def test_a_value_out_of_its_range_is_refused_with_what_is_allowed(stage, key, value, message):
    where = {(stage, key): "my.yaml"} if key in recipe.FIELDS else {key: "my.yaml"}
    with pytest.raises(recipe.ParameterError, match=f"my.yaml: {key} is .*{message}"):
        params.check_params(stage, wrap({key: value}), where)


def test_every_number_of_every_notebook_has_its_range_stated():
    stated = " ".join(params.RANGES.values()).split()
    for stage in paths.STAGES:
        for key, parameter in params.read_cell(stage).items():
            number = parameter.default[0] if isinstance(parameter.default, list) and parameter.default else parameter.default
            assert type(number) not in (int, float) or key in stated, key
    assert len(stated) == len(set(stated))


@pytest.mark.parametrize(("stage", "values", "message"), [
    ("00_mimi_sanity", {"codebooks": [1, 64]}, "models/csm-mini has 8 codebooks; allowed are numbers from 1 to 8"),
    ("00_mimi_sanity", {"clips": 100_000}, "clips is 100000: the templates of Danish hold .* held-out"),
    ("00_mimi_sanity", {"f0_method": "torchcrepe"}, "f0_method is 'torchcrepe': it needs a package"),
    ("01_anchor", {"codebook_weights": [1, 2]}, "codebook_weights is .*has 8 codebooks; allowed are as many weights"),
    ("01_anchor", {"codebook_weights": [0] * 8}, "not all 0"),
    ("01_anchor", {"four_bit": True, "device": "cpu"}, "four_bit is True: it needs an NVIDIA GPU"),
    ("01_anchor", {"backend": "unsloth", "device": "cpu"}, "backend is 'unsloth': it needs an NVIDIA GPU"),
    ("03_adapter", {"min_dnsmos": 2.5}, "needs the packages speechmos and onnxruntime: make setup EXTRAS=filters"),
    ("04_confusion", {"sentences": 1900}, "the templates of English hold .* held-out"),
    ("05_phonemes", {"sentences": 4000}, "sentences is 4000: the templates of Danish"),
    ("01_anchor", {"device": "cuda"}, "device is 'cuda': there is no CUDA device; allowed are auto and cpu$"),
    ("01_anchor", {"runs_dir": "README.md/runs"}, "README.md is no folder; allowed is a folder, or one that can be made"),
    ("01_anchor", {"device": "mps"}, "device is 'mps': there is no such device; allowed are auto and cpu$"),
])  # fmt: skip
def test_what_is_not_here_is_refused_before_anything_starts(monkeypatch, stage, values, message):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checked = params.check_params(stage, wrap(values))
    with pytest.raises(recipe.ParameterError, match=f"^notebooks/{stage}.ipynb: .*{message}"):
        params.check_inputs(stage, checked)


def test_a_device_is_one_of_those_that_there_are(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:1"):
        params.check_inputs("01_anchor", params.check_params("01_anchor", wrap({"device": device, "four_bit": device != "cpu"})))
    with pytest.raises(recipe.ParameterError, match="device is 'cuda:2': there are 2, from cuda:0 on; allowed are auto"):
        params.check_inputs("01_anchor", params.check_params("01_anchor", {"device": "cuda:2"}))


def test_the_trainer_takes_the_gpu_that_is_named(here, monkeypatch):
    import torch
    from accelerate import PartialState

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")  # put back afterwards
    monkeypatch.setattr(folders, "check_inputs", lambda *_: None)
    values = {name: p.default for name, p in params.read_cell("01_anchor").items()} | {"device": "cuda:1"}
    run = folders.open_run("01_anchor", values)
    PartialState._reset_state()
    assert PartialState().device == torch.device("cuda:1") and run.params["device"] == "cuda:1"
    PartialState._reset_state()


@pytest.mark.parametrize("package", ["pystoi", "pesq"])
def test_hash_changes_with_a_package_that_measures_more(here, monkeypatch, package):
    found, base = importlib.util.find_spec, place()
    training = place("01_anchor")
    installed = lambda name: name if name == package else None if name in ("pystoi", "pesq") else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", installed)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    older = place()
    assert older.name != base.name or found(package)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0")
    assert place().name not in (older.name, base.name)
    assert place("01_anchor") == training  # which measures nothing by it


def test_a_folder_that_the_runner_handed_down_is_the_one_that_is_written_to(here, monkeypatch):
    values = {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()}
    handed = place().with_name(f"{place().name}.7")
    monkeypatch.setenv(folders.HANDED_DOWN, str(handed))
    assert folders.open_run("00_mimi_sanity", values).dir == handed
    with pytest.raises(recipe.ParameterError, match="something was edited while it started"):
        folders.open_run("00_mimi_sanity", values | {"clips": 4})
    anchor = {name: p.default for name, p in params.read_cell("01_anchor").items()}
    assert folders.open_run("01_anchor", anchor).dir == place("01_anchor")  # another stage's: not meant


@pytest.mark.parametrize("key, value", [("method", "dora")])
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(key, value):
    with pytest.raises(recipe.ParameterError, match=f"my.yaml: {key} is '{value}'; allowed: {', '.join(params.CHOICES[key])}"):
        params.check_params("01_anchor", {key: value}, {key: "my.yaml"})


def test_the_codec_and_the_base_have_a_backend_each():
    checked = params.check_params("00_mimi_sanity", {"codec_backend": "moshi", "recipe": {"backend": "unsloth"}})
    assert checked["codec_backend"] == "moshi" and "recipe" not in checked
    with pytest.raises(recipe.ParameterError, match="codec_backend is 'unsloth'; allowed: transformers, moshi"):
        params.check_params("00_mimi_sanity", {"codec_backend": "unsloth"})


def test_a_full_training_goes_on_from_a_full_one_and_not_from_an_adapter(tmp_path):
    for method in recipe.TRAINED:
        (tmp_path / method).mkdir()
        (tmp_path / method / recipe.TRAINED[method]).write_text("{}")
    given = {"language": "da", "runs_dir": str(tmp_path), "base_model": "models/csm-mini"}
    assert folders.find_inputs(given | {"method": "full", "init_adapter": str(tmp_path / "full")})["init_adapter"]
    with pytest.raises(recipe.ParameterError, match="holds no config.json"):
        folders.find_inputs(given | {"method": "full", "init_adapter": str(tmp_path / "lora")})


def test_an_int_is_taken_where_a_float_belongs(here):
    assert isinstance(params.check_params("00_mimi_sanity", {"lr": 1})["lr"], float)
    assert place(lr=1) == place(lr=1.0)


def test_hash_ignores_where_a_run_happens_and_how_a_path_is_written(here):
    base = place()
    assert place(device="cpu") == base
    assert place(runs_dir="elsewhere").name == base.name
    assert place(base_model=str(here / "models" / "base")) == base
    assert len(base.name) == 12 and base.parent == here / "runs" / "da" / "00_mimi_sanity"


def test_hash_changes_with_every_parameter_that_matters(here):
    changes = [{}, {"seed": 1}, {"clips": 4}, {"language": "sv"}, {"codebooks": [1]}, {"base_model": "org/model"}]
    assert len({place(**change).name for change in changes}) == len(changes)


def test_hash_changes_with_the_weights_but_not_with_the_card(here):
    base = place()
    (here / "models" / "base" / "README.md").write_text("a card")
    assert place() == base
    (here / "models" / "base" / "model.safetensors").write_bytes(b"weights")
    assert place() != base


def test_hash_changes_with_imported_code_but_not_with_its_comments(here):
    base, helper = place(), here / "csm_nb" / "helper.py"
    helper.write_text("VALUE = 1  # the value\n")
    (here / "csm_nb" / "unused.py").write_text("VALUE = 2\n")
    assert place() == base
    helper.write_text("VALUE = 2\n")  # imported by work.py, which the notebook imports
    changed = place()
    assert changed != base
    (here / "csm_nb" / "words.yaml").write_text("- ord\n")
    assert place() not in (base, changed)


def test_hash_ignores_docstrings_and_layout(here):
    (here / "csm_nb" / "helper.py").write_text("VALUE = 1\ndef f(x):\n    return x\nclass A:\n    n = 1\n")
    base = place()
    text = '"""A module."""\n\nVALUE = 1\n\n\ndef f(x):\n    """Return x."""\n    return (\n        x)\n\n\n'
    (here / "csm_nb" / "helper.py").write_text(text + 'class A:\n    """An a."""\n\n    n = 1\n')
    assert place() == base
    (here / "csm_nb" / "helper.py").write_text(text + 'class A:\n    """An a."""\n\n    n = 2\n')
    assert place() != base


def test_hash_is_of_code_in_rooms_however_deep(here):
    room = here / "csm_nb" / "deep" / "deeper"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("")
    (room.parent / "__init__.py").write_text("")
    (room / "code.py").write_text("VALUE = 1\n")
    (here / "csm_nb" / "helper.py").write_text("from csm_nb.deep.deeper.code import VALUE\n")
    base = place()
    (room / "code.py").write_text("VALUE = 2\n")
    changed = place()
    (room / "words.yaml").write_text("- ord\n")
    assert len({base, changed, place()}) == 3


def test_hash_ignores_sentences_of_languages_that_are_not_asked_for_and_data_of_other_rooms(here):
    (here / "csm_nb" / "helper.py").write_text("from csm_nb.text import sentences\n")
    base, sentences = place(), here / "csm_nb" / "text" / "sentences"
    (sentences / "pl.yaml").write_text("letters: a\n")
    (here / "csm_nb" / "speak" / "words.yaml").write_text("- ord\n")
    (here / "csm_nb" / "runs" / "templates").mkdir(exist_ok=True)
    (here / "csm_nb" / "runs" / "templates" / "page.html").write_text("<p>")
    assert place() == base and place(language="sv").name != base.name
    for name in ("da", "en"):
        before = place()
        (sentences / f"{name}.yaml").write_text("letters: a\n")
        assert place() != before


@pytest.mark.parametrize("quiet", ["log_every", "log_seconds", "save_every", "save_minutes", "keep_checkpoints",
                                   "price_per_hour"])
def test_hash_ignores_parameters_that_change_no_number(quiet):
    known = {"language": "da", "lr": 1.0}
    hashes = [folders.hash_run("01_anchor", known | {quiet: value}, {}) for value in (1, 2)]
    nested = [folders.hash_run("01_anchor", known | {"recipe": {"rank": 4, quiet: value}}, {}) for value in (1, 2)]
    assert len(set(hashes)) == len(set(nested)) == 1
    assert folders.hash_run("01_anchor", known | {"recipe": {"rank": 8, quiet: 1}}, {}) != nested[0]
    assert folders.hash_run("01_anchor", known | {"sample_every": 3}, {}) != folders.hash_run("01_anchor", known, {})


def test_hash_changes_with_a_notebook_cell_but_not_with_the_default_of_an_overridden_parameter(here):
    notebook, base = here / "notebooks" / "00_mimi_sanity.ipynb", place(clips=5)
    text = notebook.read_text()
    notebook.write_text(text.replace("clips: int = 3", "clips: int = 4"))
    assert place(clips=5) == base
    notebook.write_text(text.replace('\\"score\\": 0.5', '\\"score\\": 0.6'))
    assert place(clips=5) != base


def test_hash_changes_with_a_clip_of_a_manifest_and_survives_a_bad_line(here):
    manifest, clip = here / "m.jsonl", here / "a.wav"
    clip.write_bytes(b"12")
    manifest.write_text('{"audio_path": "a.wav"}\nnot json\n{"audio_path": "missing.wav"}\n7\n')
    base = place(audio="m.jsonl")
    clip.write_bytes(b"123")
    assert place(audio="m.jsonl") != base


def test_hash_of_a_folder_of_audio_is_of_names_and_bytes(here):
    (here / "clips").mkdir()
    names, clip = [place(audio="clips")], here / "clips" / "a.wav"
    for content in (b"12", b"34"):
        clip.write_bytes(content)
        names.append(place(audio="clips"))
    clip.rename(clip.with_name("b.wav"))
    assert len({*names, place(audio="clips")}) == 4


def test_a_clip_that_changed_under_its_name_and_size_is_seen(here):
    (here / "m.jsonl").write_text('{"audio_path": "a.wav"}\n')
    (here / "a.wav").write_bytes(b"12")
    base = place(audio="m.jsonl")
    (here / "a.wav").write_bytes(b"34")
    assert place(audio="m.jsonl") != base


def test_what_takes_long_to_hash_is_remembered_and_read_again_when_its_time_changes(here, monkeypatch):
    (here / "clips").mkdir()
    clip, read, now = here / "clips" / "a.wav", [], iter(range(100, 10**9, 5))
    clip.write_bytes(b"12")
    os.utime(clip, (1, 1))
    monkeypatch.setattr(provenance.time, "time", lambda: float(next(now)))
    monkeypatch.setattr(provenance, "_hash_bytes", lambda path: read.append(path) or "x")
    for _ in range(2):
        provenance.hash_recordings(here / "clips")
    assert read == [clip]
    os.utime(clip, (2, 2))
    provenance.hash_recordings(here / "clips")
    assert read == [clip, clip]


def test_open_run_records_provenance_and_seeds(here):
    import numpy as np
    import torch

    first = complete("00_mimi_sanity", seed=7)
    draws = [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002
    record = provenance.read_json(first.dir / "run.json")
    assert record["status"] == "done" and record["params"]["seed"] == 7 and record["inputs"]["base_model"]["hash"]
    assert {"commit", "dirty", "versions", "host", "seconds", "peak_memory_bytes"} <= record.keys()
    assert provenance.read_json(first.dir / "metrics.json") == {"verdict": "go"}
    complete("00_mimi_sanity", seed=7)
    assert draws == [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002


def test_an_unfinished_run_is_taken_up_and_a_finished_one_never_overwritten(here):
    values = {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()}
    first = folders.open_run("00_mimi_sanity", values)
    assert folders.open_run("00_mimi_sanity", values).dir == first.dir
    folders.finish_run(first, {"x": 1}, "go")
    second = folders.open_run("00_mimi_sanity", values)
    assert second.dir.name == first.dir.name + ".2"
    assert folders.find_done(first.dir) == first.dir
    folders.finish_run(second, {"x": 2}, "stop")
    assert folders.open_run("00_mimi_sanity", values).dir.name == first.dir.name + ".3"
    assert provenance.read_json(first.dir / "metrics.json")["x"] == 1


def test_orphans_are_what_a_killed_runner_left_at_work(here):
    import psutil

    base = place()
    base.mkdir(parents=True)
    other = psutil.Process().parent()
    at_work, over = [other.pid, other.create_time()], [other.pid, other.create_time() - 60]
    provenance.write_json(base / folders.RUNNER, {"runner": over, "papermill": at_work})
    assert folders.find_orphans(base) == [at_work]
    provenance.write_json(base / folders.RUNNER, {"runner": at_work, "papermill": at_work})
    assert folders.find_orphans(base) == []


WORK = """
import sys, time
from pathlib import Path
from csm_nb import paths
from csm_nb.runs import folders, params
here = Path(sys.argv[1])
paths.ROOT, paths.NOTEBOOKS, paths.PACKAGE = here, here / "notebooks", here / "csm_nb"
values = {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()}
print(folders.open_run("00_mimi_sanity", values).dir, flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_process_writes_to_is_left_alone_and_taken_over_when_that_is_killed(here):
    command = [sys.executable, "-c", WORK, str(here)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    values = {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()}
    first = Path(other.stdout.readline().strip())
    assert folders.is_alive(first) and folders.open_run("00_mimi_sanity", values).dir.name == f"{first.name}.2"
    other.kill()  # and nobody asks how it ended: it stays a zombie
    deadline = time.monotonic() + 10
    while folders.is_alive(first) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert folders.open_run("00_mimi_sanity", values).dir == first
    other.communicate()


def test_a_run_that_the_runner_handed_down_is_refused_where_another_process_has_it(here, monkeypatch):
    values = {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()}
    monkeypatch.setenv(folders.HANDED_DOWN, str(place()))
    monkeypatch.setattr(folders, "MOMENT", 0.1)
    at_work = r"process \d+ on .* is at work in runs/da.*wait for its end"
    with claim(place() / "run.json"), pytest.raises(recipe.ParameterError, match=at_work):
        folders.open_run("00_mimi_sanity", values)


def test_two_calls_that_begin_at_once_run_in_folders_of_their_own(here):
    first, one = folders.claim_notebook(place())
    second, two = folders.claim_notebook(place())
    assert (first, second.name) == (place(), f"{first.name}.2")
    one.release(), two.release()
    assert not folders.is_alive(first)


def test_a_run_of_another_host_that_lost_its_power_is_taken_over_when_its_lease_is_over(here, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 0.5)
    base = place()
    with claim(base / "run.json") as lease:
        marker = base / ".run.json.lease"
        text = marker.read_text().replace(f"host={lease.owner.hostname}", "host=another-host")
    marker.write_text(text)
    assert folders.choose_folder(base).name == f"{base.name}.2"
    with claims.hold(base / "run.json"):
        pass
    assert folders.choose_folder(base) == base


def test_a_run_says_where_its_data_is_and_what_it_used_of_it(here):
    run = folders.open_run("00_mimi_sanity", {name: p.default for name, p in params.read_cell("00_mimi_sanity").items()})
    assert run.data == here / "data"
    folders.note_used(run, tokens=run.data / "tokens" / "a", training=run.data / "trainings" / "b")
    folders.note_used(run, training=[run.data / "trainings" / "c", run.data / "trainings" / "b"])
    folders.finish_run(run, {}, "go")
    used = provenance.read_json(run.dir / "run.json")["used"]
    assert used == {"tokens": ["data/tokens/a"], "training": ["data/trainings/b", "data/trainings/c"]}


def test_a_notebook_whose_parameters_cell_did_not_run_is_told_so(here):
    with pytest.raises(recipe.ParameterError, match="seed.* not set; run the parameters cell first"):
        folders.open_run("00_mimi_sanity", {"language": "da"})


def test_adapter_of_a_stage_is_the_newest_complete_one_on_the_same_base_and_language(here):
    with pytest.raises(recipe.ParameterError, match="run 01_anchor for da first"):
        place("02_synthetic")
    older = complete("01_anchor")
    newer = complete("01_anchor", seed=1)
    (here / "models" / "other").mkdir()
    (here / "models" / "other" / "config.json").write_text("other")
    complete("01_anchor", base_model="models/other")
    complete("01_anchor", language="sv")
    os.utime(older.dir / "done.json", (1, 1))
    run = folders.open_run("02_synthetic", {name: p.default for name, p in params.read_cell("02_synthetic").items()})
    assert folders.find_adapter("01_anchor", run) == newer.dir / "adapter"
    assert folders.find_adapter(str(older.dir), run) == older.dir / "adapter"
    assert folders.find_adapter("", run) is None
    with pytest.raises(recipe.ParameterError, match="holds no adapter_config.json"):
        folders.find_adapter("models/base", run)


def test_hash_changes_with_the_adapter_that_a_run_goes_on_from(here):
    complete("01_anchor")
    base = place("02_synthetic")
    complete("01_anchor", seed=1)
    assert place("02_synthetic") != base
    assert place("02_synthetic", init_adapter="").name != base.name


def test_records_are_json_whatever_numpy_says(tmp_path):
    import numpy as np

    content = {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": tmp_path, 1: (2,)}
    provenance.write_json(tmp_path / "a.json", content)
    assert provenance.read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1], "c": None, "d": str(tmp_path), "1": [2]}


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_parameter_file_fits_the_notebooks(path):
    values, origins = params.load_params([path])
    for stage in paths.STAGES:
        params.check_params(stage, values, origins)
    if "language" in values:
        assert values["language"] == path.stem and path.stem in values["compare"]


@pytest.mark.parametrize(("section", "stage", "expected"), [
    ({"rank": 8, "03_adapter": {"lr": 1e-4}}, "03_adapter", {"rank": 8, "lr": 1e-4}),
    ({"rank": 8, "lr": 1e-3, "03_adapter": {"lr": 1e-4}}, "02_synthetic", {"rank": 8, "lr": 1e-3}),
    ({"epochs": 3, "03_adapter": {"steps": 10}}, "03_adapter", {"steps": 10}),
    ({"epochs": 3, "03_adapter": {"steps": 10}}, "01_anchor", {"epochs": 3}),
])
def test_a_recipe_of_all_stages_gives_way_to_a_stage_s_own(section, stage, expected):
    assert recipe.pick_fields(section, stage) == expected


@pytest.mark.parametrize(("over", "stage", "expected"), [
    ({"lr": 2e-3}, "03_adapter", {"lr": 2e-3, "steps": 100}),  # what is said for all stages holds in each
    ({"epochs": 2}, "03_adapter", {"lr": 1e-4, "epochs": 2}),
    ({"03_adapter": {"epochs": 2}}, "03_adapter", {"lr": 1e-4, "epochs": 2}),
    ({"03_adapter": {"epochs": 2}}, "01_anchor", {"lr": 1e-3, "steps": 60}),
    ({"steps": 5}, "01_anchor", {"lr": 1e-3, "steps": 5}),
])
def test_what_is_said_later_replaces_a_profile_s_field_and_its_other_length(over, stage, expected):
    profile = {"lr": 1e-3, "01_anchor": {"steps": 60}, "03_adapter": {"lr": 1e-4, "steps": 100}}
    merged = recipe.merge_recipes(profile, over)
    assert recipe.pick_fields(merged, stage) == expected
    assert recipe.merge_recipes(merged, {}) == merged


@pytest.mark.parametrize(("section", "message"), [
    ({"rnk": 3}, "a recipe has no field 'rnk'; did you mean rank. Its fields are steps, epochs, rank"),
    ({"03_adapter": {"seed": 3}}, "seed is a parameter of its own; write it outside of `recipe:`"),
    ({"03_adapter": {"01_anchor": {"lr": 3}}}, "01_anchor stands in the fields of 03_adapter; allowed is a stage's"),
    ({"03_adaptr": {"lr": 3}}, "a recipe has no field '03_adaptr'; did you mean 03_adapter"),
    ({"03_adapter": 3}, "03_adapter is 3; allowed are fields of a recipe"),
    ({"steps": 3, "epochs": 1}, "steps is 3 and epochs 1; give one of the two"),
])
def test_a_recipe_of_unknown_fields_is_refused_with_those_there_are(tmp_path, section, message):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"recipe": section}))
    with pytest.raises(recipe.ParameterError, match=f"my.yaml: .*{message}"):
        params.load_params([tmp_path / "my.yaml"])


def test_one_field_is_set_from_the_command_line_and_the_rest_of_a_profile_stays():
    values, origins = params.load_params(params.find_params("no", "mini"), {"rank": 16, "recipe": {"03_adapter": {"lr": 0.5}}})
    checked = params.check_params("03_adapter", values, origins)["recipe"]
    assert (checked["rank"], checked["lr"], checked["steps"], checked["alpha"]) == (16, 0.5, 100, 64)
    assert params.check_params("02_synthetic", values, origins)["recipe"]["lr"] == 3e-3
    where = {name: origins.get(("03_adapter", name)) for name in ("rank", "lr", "steps", "dtype")}
    assert where == {"rank": "command line", "lr": "command line", "steps": "params/mini.yaml", "dtype": None}
    again = params.check_params("03_adapter", {"recipe": checked})["recipe"]
    assert again == checked  # as the runner hands it down


def test_a_field_is_taken_by_a_call_with_a_stage_that_trains_and_refused_by_one_without():
    task, = chain.plan_tasks(["no"], ["01_anchor"], "mini", {"rank": 16})
    assert task.params["recipe"]["rank"] == 16 and task.origins["rank"] == "command line"
    with pytest.raises(recipe.ParameterError, match="rank is 16, a parameter of 01_anchor, 02_synthetic"):
        chain.plan_tasks(["no"], ["00_mimi_sanity"], "mini", {"rank": 16})


def test_a_field_of_the_recipe_at_the_top_of_a_file_is_refused_with_where_it_belongs(tmp_path):
    (tmp_path / "my.yaml").write_text("rank: 3\n")
    with pytest.raises(recipe.ParameterError, match="my.yaml: rank is a field of the recipe; write it under `recipe:`"):
        params.load_params([tmp_path / "my.yaml"])


def test_a_training_without_a_length_is_three_epochs():
    assert (recipe.Recipe().steps, recipe.Recipe().epochs, recipe.Recipe(5).epochs) == (0, 3.0, 0.0)


def test_parameters_and_fields_of_a_recipe_have_different_names():
    assert not recipe.FIELDS.keys() & {name for stage in paths.STAGES for name in params.read_cell(stage)}
