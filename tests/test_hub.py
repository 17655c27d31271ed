"""A model is found by folder or hub id, and one that is not there says how to get it."""

import pytest

from csm_nb.hub import ModelError, describe_model, fetch_model
from csm_nb.judge import load_lid
from csm_nb.params import ROOT


def make_model(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


def test_a_folder_below_the_root_is_found_by_its_relative_name():
    assert fetch_model("models/csm-mini") == ROOT / "models/csm-mini"


def test_a_hub_id_while_offline_says_how_to_download_it_and_where_to_put_it():
    with pytest.raises(ModelError, match="(?s)hf download sesame/csm-1b --local-dir models/csm-1b.*in params/"):
        fetch_model("sesame/csm-1b")


def test_a_judge_that_is_a_hub_id_gives_the_same_advice():
    with pytest.raises(ModelError, match="hf download facebook/mms-lid-126"):
        load_lid("facebook/mms-lid-126", "cpu")


def test_a_hub_id_in_the_local_cache_is_found_without_a_network(tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--someone--small"
    make_model(cached / "snapshots" / commit, config_json="{}", model_safetensors="x")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert fetch_model("someone/small").name == commit


def test_a_folder_that_is_not_there_lists_what_there_is():
    with pytest.raises(ModelError, match="no such folder.*csm-mini"):
        fetch_model("models/csm-minni")


@pytest.mark.parametrize(("files", "lacks"), [
    ({}, "config.json and weights"), ({"config_json": "{}"}, "weights"), ({"model_safetensors": "x"}, "config.json"),
    ({"config_json": "{}", "model_safetensors": ""}, "weights"),
])
def test_a_folder_that_is_not_whole_names_what_it_lacks(tmp_path, files, lacks):
    with pytest.raises(ModelError, match=f"lacks {lacks}"):
        fetch_model(make_model(tmp_path / "model", **files))


def test_every_report_can_say_what_its_model_is():
    said = {name: describe_model(f"models/{name}") for name in ("csm-mini", "asr-mini", "lid-mini")}
    assert all("synthetic" in text and "miniature" in text.lower() for text in said.values()), said


def test_a_card_is_read_past_its_metadata_headings_and_pictures(tmp_path):
    card = "---\nlicense: mit\n---\n# Name\n\n![picture](x.png)\n\nWhat it\nis.\n\nMore.\n"
    make_model(tmp_path / "model", config_json="{}", model_safetensors="x", README_md=card)
    assert describe_model(tmp_path / "model").endswith(": What it is.")


def test_a_model_without_a_card_is_named_as_such(tmp_path):
    assert "no model card" in describe_model(make_model(tmp_path / "model", config_json="{}", model_safetensors="x"))
