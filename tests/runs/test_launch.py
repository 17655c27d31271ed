"""A run is trained by several processes where its notebook began it, and what can not be is said before anything is loaded."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from csm_nb.claims import claim
from csm_nb.corpora import tokens
from csm_nb.paths import TRAINING
from csm_nb.provenance import read_json, write_json
from csm_nb.recipe import TrainingError
from csm_nb.runs import launch
from csm_nb.runs.params import read_cell
from csm_nb.train.checkpoints import list_checkpoints

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "csm_nb.runs.launch"]


def make_run(folder, **changes):
    """The folder of a run of 01 as a notebook leaves it that was stopped in its training."""
    folder.mkdir(parents=True)
    params = {name: parameter.default for name, parameter in read_cell("01_anchor").items()}
    given = {"steps": 3, "rank": 4, "alpha": 8, "max_tokens": 128, "log_every": 1} | changes
    params |= {"language": "no", "device": "cpu", "method": given.pop("method", "lora"), "tag": given.pop("tag", "none")}
    params["recipe"] = given
    params["runs_dir"] = str(folder.parent / "runs")
    write_json(folder / "run.json", {"status": "running", "stage": "01_anchor", "language": "no", "params": params,
                                     "inputs": {"base_model": {"path": "models/csm-mini", "hash": ""}},
                                     "used": {"tokens": [str(folder / "tokens.parquet")]}})
    rng = np.random.default_rng(0)
    rows = [{"text": f"Setning {i}.", "codes": rng.integers(1, 512, (20, 8)).tolist(), "speaker_id": "0", "language": "no",
             "duration": 0.8} for i in range(12)]
    schema = tokens._SCHEMA.with_metadata({"frame_rate": "25.0", "num_codebooks": "8", "codebook_size": "512"})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "tokens.parquet")
    return folder


@pytest.mark.parametrize("changes", [
    {"text_weight": 0.5, "train_text": True, "gradient_checkpointing": True}, {"method": "full"},
    {"steps": 0, "epochs": 1.5, "tag": "token"}], ids=str)  # which one process would make in twice the steps
def test_two_processes_train_a_run_that_one_then_finds_done(tmp_path, changes):
    folder = make_run(tmp_path / "run", **changes)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*LAUNCH, folder], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [training] = (tmp_path / "data" / "trainings").glob("*/")
    assert [step for step, _ in list_checkpoints(training)][-1] == 3
    assert done.stdout.count("step 3/3  loss") == 1 and done.stdout.count("10 clips to train on; 2 clips of 2 held-out") == 1
    tags = read_json(list_checkpoints(training)[-1][1] / "base.json")["tags"]
    assert tags == {"no": "<|reserved_special_token_3|>" if "tag" in changes else ""}
    written = (training / "metrics.jsonl").read_text()
    history = launch.train_run(folder)  # as the notebook does, in one process
    assert history == [row for row in map(json.loads, written.splitlines()) if "train_loss" not in row]
    assert [*(tmp_path / "data" / "trainings").glob("*/")] == [training]


def test_a_run_that_can_not_be_trained_is_refused_with_what_to_do(tmp_path):
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    with pytest.raises(TrainingError, match=r"no run of 01_anchor, 02.* \(found: no run.json\); name a run's folder"):
        launch.train_run(tmp_path)
    worker = f"process {os.getpid()} on .* still works in .*stop it first"
    with claim(folder / "run.json"), pytest.raises(TrainingError, match=worker):
        launch.train_run(folder)
    (folder / "done.json").write_text("{}")
    with pytest.raises(TrainingError, match="is done; start its notebook"):
        launch.train_run(folder)
    (folder / "done.json").unlink()
    write_json(folder / "run.json", record | {"used": {}})
    with pytest.raises(TrainingError, match="names no tokens yet"):
        launch.train_run(folder)


def test_the_command_says_how_and_fails_with_what_to_do(tmp_path, monkeypatch, capsys):
    for argument, code in (("--help", 0), (str(tmp_path), f"{tmp_path} holds no run of 01_anchor")):
        monkeypatch.setattr(sys, "argv", ["launch", argument])
        with pytest.raises(SystemExit) as ended:
            launch.main()
        assert str(ended.value.code).startswith(str(code))
    assert "torchrun --nproc-per-node 8 -m csm_nb.runs.launch runs/" in capsys.readouterr().out


def test_every_stage_that_trains_has_the_parameters_that_a_launch_reads():
    for stage in TRAINING:
        assert {"method", "tag", "also", "recipe", "seed", "device", "runs_dir"} <= read_cell(stage).keys()
