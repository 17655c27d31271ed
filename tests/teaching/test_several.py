"""One adapter of several languages: equal hours of each, and its name and its stages found by what it was taught."""

import json

import numpy as np
import pytest

from csm_nb.audio import write_audio
from csm_nb.corpora.sources import load_corpus
from csm_nb.manifest import CorpusError
from csm_nb.provenance import write_json
from csm_nb.recipe import ParameterError
from csm_nb.runs.chain import plan_tasks
from csm_nb.runs.folders import find_inputs, name_trained
from csm_nb.runs.params import check_params
from csm_nb.teaching.several import balance_hours


def make_clips(code, count, seconds, **more):
    return [{"text": f"{code} {i}", "language": code, "duration": seconds} | more for i in range(count)]


def test_every_language_is_drawn_down_to_the_hours_of_the_smallest_and_one_stays_whole():
    rows = [*make_clips("no", 10, 2.0), *make_clips("sv", 4, 3.0), *make_clips("da", 30, 1.0)]
    kept = balance_hours(rows, ["no", "sv", "da"])
    hours = {code: sum(row["duration"] for row in kept if row["language"] == code) for code in ("no", "sv", "da")}
    assert hours == {"no": 12.0, "sv": 12.0, "da": 12.0}
    places = [rows.index(row) for row in kept]
    assert places == sorted(places) and kept == balance_hours(rows, ["no", "sv", "da"])
    assert kept != balance_hours(rows, ["no", "sv", "da"], seed=1)
    lengths = np.random.default_rng(0).random(50)
    alone = [row | {"duration": float(value)} for row, value in zip(make_clips("no", 50, 0), lengths, strict=True)]
    assert balance_hours(alone, ["no"]) == alone


def test_a_language_without_clips_is_named():
    with pytest.raises(CorpusError, match="no clip that can be used is of sv, and the adapter is to learn no, sv"):
        balance_hours(make_clips("no", 3, 1.0), ["no", "sv"])


def write_corpus(folder, *codes):
    folder.mkdir()
    lines = [{"text": f"tekst {code} {n}", "audio_path": f"{code}{n}.wav", "speaker_id": code, "language": code}
             for code in codes for n in range(3)]
    for number, line in enumerate(lines):
        write_audio(folder / line["audio_path"], np.sin(np.arange(30_000) * (number + 1) * 0.03).astype(np.float32) * 0.3)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_corpora_of_a_language_each_teach_an_adapter_of_several(tmp_path):
    corpus = f"{write_corpus(tmp_path / 'a', 'no')}, {write_corpus(tmp_path / 'b', 'sv')}"
    given = {"corpus": corpus, "also": ["sv"], "init_adapter": "", "runs_dir": str(tmp_path / "runs")}
    plan_tasks(["no"], ["03_adapter"], "test", given)
    assert [row["language"] for code in ("no", "sv") for row in load_corpus(corpus, code, 4)] == ["no"] * 3 + ["sv"] * 3
    for also in ([], ["da"]):
        with pytest.raises(ParameterError, match="nothing of language"):
            plan_tasks(["no"], ["03_adapter"], "test", given | {"also": also})


def test_a_corpus_that_says_no_languages_is_refused_for_several(tmp_path):
    write_corpus(tmp_path / "a", "no")
    (tmp_path / "a/manifest.jsonl").unlink()
    for clip in (tmp_path / "a").glob("*.wav"):
        clip.with_suffix(".txt").write_text("tekst")
    with pytest.raises(ParameterError, match="does not say which of its clips are no and which sv"):
        plan_tasks(["no"], ["03_adapter"], "test", {"corpus": str(tmp_path / "a"), "also": ["sv"], "init_adapter": ""})


def test_english_with_an_accent_teaches_the_language_of_the_accent():
    rows = [*make_clips("en", 2, 1.0, accent="no"), *make_clips("en", 3, 1.0, accent="sv")]
    assert [row["language"] for row in balance_hours(rows, ["no", "sv"])] == ["no", "no", "sv", "sv"]


def test_an_adapter_has_one_name_whichever_of_its_languages_is_asked_for():
    for language, also in (("no", ["da", "sv"]), ("da", ["sv", "no"])):
        params = {"language": language, "also": also, "method": "lora"}
        assert {name_trained(params, code) for code in ("no", "sv", "da")} == {"lora_no+sv+da"}
        assert name_trained(params, "de") == "lora_de"
    assert name_trained({"language": "no", "also": []}, "no") == "lora_no"


@pytest.mark.parametrize("also", [["no"], ["sv", "sv"], ["xx"], [1]], ids=str)
def test_more_languages_are_others_each_once(also):
    with pytest.raises(ParameterError, match="also is .*; allowed|also is .*allowed are languages beside"):
        check_params("02_synthetic", {"language": "no", "also": also})


def test_a_stage_goes_on_from_the_run_that_was_taught_the_same_languages_with_the_same_tag(tmp_path):
    params = {"language": "no", "runs_dir": str(tmp_path), "base_model": "models/csm-mini", "init_adapter": "01_anchor",
              "tag": "token", "also": ["sv", "da"]}
    base = find_inputs({"base_model": "models/csm-mini"})
    for name, taught in {"old": {}, "same": {"tag": "token", "also": ["da", "sv"]}, "text": {"tag": "text", "also": ["sv", "da"]},
                         "one": {"tag": "token", "also": []}}.items():
        folder = tmp_path / "no/01_anchor" / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter/adapter_config.json").write_text("{}")
        write_json(folder / "run.json", {"inputs": base, "params": taught})
        write_json(folder / "done.json", {})
    assert find_inputs(params)["init_adapter"]["path"].endswith("same/adapter")
    assert find_inputs(params | {"tag": "none", "also": []})["init_adapter"]["path"].endswith("old/adapter")
    with pytest.raises(ParameterError, match=r"no complete run with method=lora, tag=token, also=\['pl'\] on models/csm-mini"):
        find_inputs(params | {"also": ["pl"]})


def test_a_folder_that_was_trained_with_another_tag_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_json(tmp_path / "base.json", {"tags": {"no": "<lang:no>"}})
    given = {"init_adapter": str(tmp_path), "runs_dir": str(tmp_path / "runs")}
    with pytest.raises(ParameterError, match="init_adapter is .* was trained with tag=text, and tag is 'none'"):
        plan_tasks(["no"], ["03_adapter"], "test", given)
    assert plan_tasks(["no"], ["03_adapter"], "test", given | {"tag": "text"})
