"""One adapter of several languages: equal hours of each, and its name and its stages found by what it was taught."""

import numpy as np
import pytest

from csm_nb.provenance import write_json
from csm_nb.recipe import ParameterError
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
