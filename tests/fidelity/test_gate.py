"""A training is refused for the codec that it uses, and for no other one's verdict."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_codec_moshi import SMALL, make_mimi
from transformers import MimiModel

from csm_nb.codec.mimi import fingerprint_codec, load_codec
from csm_nb.codec.moshi import MoshiCodec, convert_config, convert_moshi
from csm_nb.fidelity.gate import check_verdict
from csm_nb.provenance import write_json
from csm_nb.recipe import ParameterError
from csm_nb.runs.folders import Run

BASE = "models/csm-mini"


@pytest.fixture(scope="module")
def used():
    """What 00 records of the codec in BASE."""
    codec = load_codec(BASE)
    return {"codec": fingerprint_codec(codec), "codebooks": codec.config.num_quantizers}


@pytest.fixture
def check(tmp_path):
    """Return a training's call of check_verdict."""
    run = Run("01_anchor", "da", tmp_path / "training", {"base_model": BASE, "runs_dir": str(tmp_path / "runs")}, {})
    return lambda ignore_verdict=False: check_verdict(run, ignore_verdict)


@pytest.fixture
def complete(tmp_path):
    """Return a function that leaves a complete run of 00, each newer than the one before."""
    def leave(verdict, metrics, language="da", **params):
        number = len(list(tmp_path.glob("runs/*/*/*")))
        folder = tmp_path / "runs" / language / "00_mimi_sanity" / str(number)
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "run.json", {"params": {"codec_model": "some/mimi", "audio": ""} | params})
        write_json(folder / "done.json", {"verdict": verdict})
        os.utime(folder / "done.json", (number + 1, number + 1))
    return leave


@pytest.mark.parametrize("audio", ["", "my/manifest.jsonl"], ids=["synthetic", "recordings"])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("said", ["go", "unclear", "stop", None])
def test_training_is_refused_on_the_stop_of_recordings_and_on_nothing_else(check, complete, used, said, ignored, audio):
    if said:
        complete(said, used, audio=audio)
    if said == "stop" and audio and not ignored:
        with pytest.raises(ParameterError, match="says stop of the codec some/mimi, on recordings .*set ignore_verdict=true"):
            check()
    else:
        told = check(ignored)
        assert (said or "not run") in told and ("ignore_verdict is set" in told) == bool(said == "stop" and audio)
        assert ("the training goes on, since recordings" in told) == (said == "stop" and not audio)


def test_the_stop_of_another_codec_of_fewer_codebooks_or_of_another_language_forbids_nothing(check, complete, used):
    complete("stop", used | {"codec": "another"})
    complete("stop", used | {"codebooks": 1})
    complete("stop", {})  # made before codecs were recorded
    complete("stop", used, language="sv")
    assert "no verdict on the codec in models/csm-mini" in check() and "3 runs of it are of other codecs" in check()
    complete("go", used)
    complete("stop", used | {"codec": "another"})
    assert "says go" in check()


def test_the_newest_verdict_on_recordings_counts_before_one_on_synthetic_speech(check, complete, used):
    complete("stop", used)
    complete("unclear", used, audio="old/manifest.jsonl")
    complete("go", used, audio="my/manifest.jsonl")
    complete("stop", used)
    assert "says go" in check() and "on recordings (my/manifest.jsonl)" in check()


def test_a_codec_is_the_same_alone_and_inside_another_model_and_in_bfloat16(tmp_path, used):
    shutil.copytree(BASE, tmp_path / "base")
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    state = load_file(weights)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    save_file(rounded, weights, {"format": "pt"})
    assert fingerprint_codec(load_codec(tmp_path / "base")) == used["codec"]
    name = next(name for name in state if name.startswith("codec_model.decoder") and state[name].ndim == 3)
    save_file(state | {name: state[name] + 0.1}, weights, {"format": "pt"})
    assert fingerprint_codec(load_codec(tmp_path / "base")) != used["codec"]
    codec = load_codec(BASE)
    codec.save_pretrained(tmp_path / "mimi")
    assert json.loads((tmp_path / "mimi" / "config.json").read_text())["model_type"] == "mimi"
    assert fingerprint_codec(load_codec(tmp_path / "mimi")) == used["codec"]


def test_a_codec_is_the_same_by_moshi_and_by_transformers():
    mimi = make_mimi(SMALL)
    converted = MimiModel(convert_config(SMALL))
    converted.load_state_dict(convert_moshi(mimi.state_dict(), converted.config.head_dim))
    assert fingerprint_codec(MoshiCodec(mimi, convert_config(SMALL))) == fingerprint_codec(converted)
    torch.nn.init.ones_(next(value for value in converted.parameters() if value.ndim == 3))
    assert fingerprint_codec(MoshiCodec(mimi, convert_config(SMALL))) != fingerprint_codec(converted)
