"""The table of the miniatures counts what runs found, of runs on these very models and no others."""

import os

import pytest
from huggingface_hub import ModelCard

from csm_nb.mini.evaluate import NORDIC, read_default_run, tabulate
from csm_nb.paths import ROOT, STAGES
from csm_nb.provenance import hash_folder, write_json


@pytest.fixture
def runs(tmp_path):
    """Complete runs of all stages on a base model, 60 s each, one after the other."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    base = hash_folder(tmp_path / "base")
    for i, code in enumerate(NORDIC):
        for j, stage in enumerate(STAGES):
            write_run(tmp_path / "runs" / code / stage / "a", code, base, 60.0 * (i * len(STAGES) + j))
    return tmp_path / "runs"


def write_run(folder, code, base, started, cer=0.1):
    folder.mkdir(parents=True)
    figures = {"heard_right": 0.95, "low": 0.835, "high": 0.986, "runaways": 1, "sentences": 40}
    write_json(folder / "metrics.json", {"cer": cer} | figures)
    write_json(folder / "run.json", {"inputs": {"base_model": {"hash": base}}, "started": started, "seconds": 60.0})
    write_json(folder / "done.json", {})
    os.utime(folder / "done.json", (started, started))


def test_the_newest_complete_runs_are_counted_from_the_first_start_to_the_last_end(runs):
    write_run(runs / "da/04_confusion/b", "da", hash_folder(runs.parent / "base"), 60.0 * 20, cer=0.3)
    run = read_default_run(runs, runs.parent / "base")
    assert [run["adapters"][code]["cer"] for code in NORDIC] == [0.1, 0.1, 0.3]
    assert run["adapters"]["no"] == {
        "cer": 0.1, "heard_right": 0.95, "low": 0.835, "high": 0.986, "runaways": 1, "sentences": 40}
    assert run["minutes"] == 21


def test_runs_that_are_missing_or_on_other_models_are_not_counted(runs):
    (runs / "sv/03_adapter/a/done.json").unlink()
    assert read_default_run(runs, runs.parent / "base") is None
    write_json(runs / "sv/03_adapter/a/done.json", {})
    assert read_default_run(runs, runs.parent / "base")
    (runs.parent / "base/config.json").write_text('{"layers": 2}')
    assert read_default_run(runs, runs.parent / "base") is None


def test_the_table_shows_what_was_missed_as_it_shows_what_was_reached(runs):
    judged = {"asr": {"unheard": {"no": 0.04, "fr": 0.3}}, "lid": {"unheard": {"no": 1.0, "fr": 0.5}}}
    figures = {
        "clips": 30, "original": judged, "decoded": judged,
        "megabytes": 24.96, "codec": {"f0_correlation": "0.5", "f0_rmse_cents": "99"},
        "base": {"cer": 0.4, "runaways": 0.1, "heard": {"no": {"en": 0.9}, "sv": {"en": 1.0}, "da": {}}},
        "run": read_default_run(runs, runs.parent / "base"),
    }
    table = tabulate(figures)
    for cell in ("17.0 (4.0 to 30.0) %", "| 40.0 % | <= 15 % |", "no 90 %, sv 100 %, da 0 %", "25.0 MB",
                 "no 10 %, sv 10 %, da 10 %", "3 of 120 sentences", "no 95 (84 to 99) %",
                 "75.0 (50.0 to 100.0) %, 95 % interval 62.8 to 84.2 %", "18.0 minutes"):
        assert cell in table
    assert "no complete run" in tabulate(figures | {"run": None})


@pytest.mark.parametrize(("name", "task", "languages"), [
    ("csm-mini", "text-to-speech", 1),
    ("asr-mini", "automatic-speech-recognition", 10),
    ("lid-mini", "audio-classification", 10),
])
def test_the_card_of_a_miniature_has_the_header_that_the_hub_reads(name, task, languages):
    data = ModelCard.load(ROOT / "models" / name / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", task)
    assert len([data.language] if isinstance(data.language, str) else data.language) == languages
