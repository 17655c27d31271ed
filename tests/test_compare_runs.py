"""bench/compare_runs.py sees the last digit of every figure, and a stage that was not completed."""

import importlib.util
import json
import os

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("compare_runs", ROOT / "bench" / "compare_runs.py")
compare_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_runs)
METRICS = {"verdict": "learned", "loss": 0.1 + 0.2, "rows": [{"cer": 0.25}, {"cer": float("nan")}], "empty": {}}


def write_run(runs, metrics, place="da/02_synthetic/abc", age=0):
    folder = runs / place
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "done.json").write_text("{}")
    os.utime(folder / "done.json", (1e9 - age, 1e9 - age))


@pytest.fixture
def pair(tmp_path):
    """Return two folders of runs, the first with METRICS in it."""
    write_run(tmp_path / "before", METRICS)
    return [tmp_path / "before", tmp_path / "after"]


def compare(pair, *options):
    return compare_runs.main([*map(str, pair), *options])


def test_the_same_figures_under_another_hash_are_the_same(pair, capsys):
    write_run(pair[1], METRICS, "da/02_synthetic/def")
    assert compare(pair) == 0 and "1 of 1 runs are the same" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "said"), [
    ({"loss": 0.3}, "loss differs: 0.30000000000000004 -> 0.3"),
    ({"verdict": "unclear"}, 'verdict differs: "learned" -> "unclear"'),
    ({"rows": [{"cer": 0.25}, {"cer": 0.5}]}, "rows[1].cer differs: NaN -> 0.5"),
    ({"rows": [{"cer": 0.25}]}, "rows[1].cer missing: NaN"),
    ({"empty": {"n": 1}}, "empty missing: {}"),
])  # fmt: skip
def test_a_value_that_differs_or_is_missing_is_named_with_all_its_digits(pair, capsys, change, said):
    write_run(pair[1], METRICS | change)
    assert compare(pair) == 1 and f"da/02_synthetic: {said}" in capsys.readouterr().out


def test_a_new_value_is_listed_and_is_no_difference(pair, capsys):
    write_run(pair[1], METRICS | {"next": "run 03"})
    assert compare(pair) == 0 and 'next new: "run 03"' in capsys.readouterr().out


def test_a_value_that_was_meant_to_change_can_be_left_out(pair):
    write_run(pair[1], METRICS | {"loss": 0.3})
    assert compare(pair, "--ignore", "loss") == 0


def test_a_stage_that_was_not_completed_is_a_difference(pair, capsys):
    write_run(pair[1], METRICS, "da/03_adapter/abc")
    assert compare(pair) == 1 and "da/02_synthetic: not complete in" in capsys.readouterr().out


def test_of_several_complete_runs_the_newest_counts(pair):
    write_run(pair[1], METRICS | {"loss": 9.0}, "da/02_synthetic/old", age=60)
    write_run(pair[1], METRICS, "da/02_synthetic/new")
    assert compare(pair) == 0


def test_folders_without_a_run_are_refused(pair, tmp_path, capsys):
    assert compare([tmp_path / "nowhere", pair[0]]) == 2 and "no complete run" in capsys.readouterr().err
