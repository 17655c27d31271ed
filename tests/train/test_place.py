"""A training has one folder: the same work finds it again, whatever else was edited, and other work has another."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_progress import make_rows

from csm_nb import claims, paths
from csm_nb.claims import claim, is_held
from csm_nb.corpora import tokens
from csm_nb.csm.adapters import add_adapter, train_fully
from csm_nb.csm.load import load_base
from csm_nb.provenance import read_json
from csm_nb.recipe import Recipe
from csm_nb.train import place
from csm_nb.train.checkpoints import list_checkpoints
from csm_nb.train.cost import measure_cost
from csm_nb.train.trainer import train_model

RECIPE = Recipe(4, max_tokens=128, log_every=1)


def make_model(seed=0, rank=4, alpha=8):
    model, processor = load_base("models/csm-mini", "cpu")
    return add_adapter(model, rank, alpha, 0.1, seed=seed), processor


@pytest.fixture(scope="module")
def model():
    return make_model()[0]


def name(model, rows=None, held=None, recipe=RECIPE):
    made_of = place.describe_training(model, rows or make_rows(), held or make_rows()[:1], recipe)
    return place.hash_value(made_of)


QUIET = {"log_every": 3, "log_seconds": 9.0, "save_every": 2, "save_minutes": 1.0, "keep_checkpoints": 7, "eval_every": 2}


@pytest.mark.parametrize("field", QUIET)
def test_how_often_it_logs_saves_and_looks_makes_no_other_training(model, field):
    assert name(model, recipe=replace(RECIPE, **{field: QUIET[field]})) == name(model)


MOVING = {"lr": 1e-3, "steps": 5, "max_tokens": 64, "batch_size": 2, "depth_ratio": 0.5, "text_weight": 0.1, "seed": 1,
          "schedule": "linear", "patience": 2, "codebook_weights": (2.0, *[1.0] * 7)}


@pytest.mark.parametrize("field", MOVING)
def test_every_field_that_moves_a_weight_makes_another_training(model, field):
    assert name(model, recipe=replace(RECIPE, **{field: MOVING[field]})) != name(model)


def test_evaluations_count_where_they_may_end_the_training(model):
    patient = replace(RECIPE, patience=2)
    assert name(model, recipe=replace(patient, eval_every=1)) != name(model, recipe=patient)


def change_code(rows):
    rows[2]["codes"] = rows[2]["codes"].copy()
    rows[2]["codes"][5, 3] += 1


@pytest.mark.parametrize("change", [
    change_code, lambda rows: rows[0].update(text="Ja."), lambda rows: rows[0].update(speaker_id="1"), lambda rows: rows.pop(),
    list.reverse, lambda rows: rows[1].update(codes=rows[1]["codes"][:-1]),
], ids=["a code", "a text", "a speaker", "a clip", "the order", "a length"])
def test_what_is_trained_on_and_what_is_held_out_make_another_training(model, change):
    rows = copy.deepcopy(make_rows())
    change(rows)
    assert len({name(model), name(model, rows), name(model, held=rows)}) == 3


def test_rows_of_a_file_have_the_hash_of_the_same_rows_in_memory(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"language": "no", "duration": 0.5, "codes": row["codes"].tolist()} for row in make_rows()]
    schema = tokens._SCHEMA.with_metadata({"frame_rate": "25.0", "num_codebooks": "8", "codebook_size": "512"})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "tokens.parquet")
    read = tokens.read_tokens(tmp_path / "tokens.parquet")
    assert place.hash_rows(read) == place.hash_rows(make_rows())
    assert place.hash_rows(read.select([2, 0])) == place.hash_rows([make_rows()[2], make_rows()[0]])


def test_the_weights_that_it_begins_with_make_another_training(model):
    names = {name(model), name(make_model(seed=1)[0]), name(make_model(alpha=16)[0]), name(make_model(rank=2)[0])}
    full = train_fully(load_base("models/csm-mini", "cpu")[0])
    names.add(name(full))
    with torch.no_grad():
        full.lm_head.weight[0, 0] += 1
    names.add(name(full))
    assert len(names) == 6
    assert name(make_model()[0]) == name(model)


def test_the_key_is_the_same_before_and_after_the_cost_was_measured():
    model, processor = make_model()
    before = name(model)
    measure_cost(model, processor, make_rows(), RECIPE, steps=1)
    assert name(model) == before


EDITS = {
    "train/select.py": ("LEAST_FALL = 0.01", "LEAST_FALL = 0.02"),  # a rule of selection
    "train/callbacks.py": ('words = [f"step {', 'words = [f"Step {'),  # a line of the log
    "train/cost.py": ("RuntimeError", "ValueError"), "show/results.py": ("def draw_losses(", "def draw_losses(more=0, *"),
    "csm/adapters.py": ("changes nothing", "changes not a thing"), "hub.py": ("no such folder", "no folder"),
    "text/sentences/no.yaml": ("letters", "# letters"), "train/trainer.py": ('"""Training from', '"""A training from'),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csm_nb", tmp_path / "csm_nb", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "csm_nb")
    return tmp_path / "csm_nb"


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_of_what_moves_no_weight_makes_no_other_training(model, package, file):
    before = name(model)
    edit(package / file, *EDITS[file])
    assert name(model) == before


@pytest.mark.parametrize("file", ["train/trainer.py", "train/packing.py", "train/loss.py", "train/pace.py", "csm/attention.py",
                                  "csm/load.py", "train/checkpoints.py", "clean.py"])
def test_an_edit_of_the_code_that_moves_weights_makes_another_training(model, package, file):
    before = name(model)
    with open(package / file, "a", encoding="utf-8") as code:
        code.write("\nEDITED = 1\n")
    assert name(model) != before


def test_a_training_that_is_through_is_found_by_the_next_run_and_not_done_again(tmp_path, capsys):
    model, processor = make_model()
    folder = place.place_training(model, make_rows(), make_rows()[:1], RECIPE, tmp_path)
    assert folder.parent == tmp_path / "trainings" and read_json(folder / "training.json")["recipe"]["steps"] == 4
    history = train_model(model, processor, make_rows(), make_rows()[:1], folder, RECIPE)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    made = (folder / "checkpoint-4" / "complete.json").stat().st_mtime_ns
    model, processor = make_model()
    again = replace(RECIPE, log_every=2)
    assert place.place_training(model, make_rows(), make_rows()[:1], again, tmp_path) == folder
    assert train_model(model, processor, make_rows(), make_rows()[:1], folder, again) == history
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (folder / "checkpoint-4" / "complete.json").stat().st_mtime_ns == made
    assert "trained before: 4 steps" in capsys.readouterr().out


def test_another_learning_rate_trains_anew_beside_the_first(tmp_path):
    model = make_model()[0]
    folders = {place.place_training(model, make_rows(), make_rows()[:1], replace(RECIPE, lr=lr), tmp_path) for lr in (1e-3, 2e-3)}
    assert len(folders) == 2


WORK = """
import sys, time
sys.path[:0] = [{tests!r}, {mine!r}]
from dataclasses import replace
from transformers import TrainerCallback
from test_place import RECIPE, claims, make_model, make_rows, place, train_model
claims.LEASE = 2.0
model, processor = make_model()
recipe = replace(RECIPE, steps=30, save_every=2)
folder = place.place_training(model, make_rows(), make_rows()[:1], recipe, sys.argv[1])
print(folder, flush=True)
class Dawdle(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[2]))
train_model(model, processor, make_rows(), make_rows()[:1], folder, recipe, [Dawdle()])
"""


def test_two_processes_that_ask_for_one_training_do_it_once_and_the_second_goes_on_when_the_first_is_killed(tmp_path):
    code = WORK.format(tests=str(ROOT / "tests"), mine=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, str(tmp_path)]  # and the seconds that a step takes longer
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "2"], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    folder = first.stdout.readline().strip()
    deadline = time.monotonic() + 120
    while len(list_checkpoints(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_held_with(folder, 2.0)
    second = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert second.stdout.readline().strip() == folder
    assert second.stdout.readline().startswith(f"process {first.pid} on ")  # it waits
    first.send_signal(signal.SIGKILL)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0 and "goes on from checkpoint-" in said
    assert list_checkpoints(folder)[-1][0] == 30 and not is_held_with(folder, 2.0)
    first.stdout.close()
    first.wait()


def is_held_with(folder, lease):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "LEASE", lease)
        return is_held(folder)


def test_a_claim_of_a_host_that_died_is_taken_over_when_its_lease_is_over_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LEASE", 1.0)
    with claim(tmp_path / "run") as lease:
        marker = tmp_path / ".run.lease"
        text = marker.read_text().replace(f"host={lease.owner.hostname}", "host=another-host")
    marker.write_text(text)  # as a host leaves it that lost its power
    began = time.monotonic()
    assert is_held(tmp_path / "run") and claims.name_holder(tmp_path / "run").endswith("on another-host")
    with claims.hold(tmp_path / "run"):
        assert 0.5 < time.monotonic() - began < 20
    assert not is_held(tmp_path / "run")
