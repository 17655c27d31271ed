"""What was trained is used again by every run that asks for it: after a failure, an edited figure, another line of the log."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from csm_nb.provenance import read_json


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the project whose code can be edited."""
    for name in ("csm_nb", "notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


def run(copy, *values):
    """The output of `make run` for the smallest 01_anchor, with what is set beside the profile."""
    command = [sys.executable, "-m", "csm_nb.runs", "--langs", "no", "--profile", "test", "--stages", "01_anchor"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    command += ["--set", "runs_dir=runs", *values]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False).stdout


def edit(copy, old, new):
    file = copy / "csm_nb" / "show" / "results.py"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def list_trainings(copy):
    """When each training's checkpoints were written, by its folder."""
    return {folder.name: sorted(marker.stat().st_mtime_ns for marker in folder.glob("checkpoint-*/complete.json"))
            for folder in (copy / "data" / "trainings").glob("*/")}


def test_a_training_outlives_a_failure_an_edited_figure_and_another_log_and_another_lr_trains_anew(copy):
    figure = "def draw_checkpoints("
    edit(copy, figure, "def draw_nothing(")
    assert "failed" in run(copy)  # after the training, in the figure of its checkpoints
    trainings = list_trainings(copy)
    assert len(trainings) == 1
    edit(copy, "def draw_nothing(", figure)
    assert "unclear" in run(copy) and list_trainings(copy) == trainings
    [folder] = [path.parent for path in (copy / "runs").rglob("done.json")]
    assert read_json(folder / "run.json")["used"]["training"] == [f"data/trainings/{[*trainings][0]}"]

    edit(copy, '"""', '"""Edited: ')
    assert "skipped: done before" in run(copy)
    assert "skipped: done before" in run(copy, "log_every=2", "keep_checkpoints=4")

    edit(copy, figure, "EDITED = 1\n\n\ndef draw_checkpoints(")
    assert "skipped" not in run(copy) and list_trainings(copy) == trainings
    assert len([*(copy / "runs").rglob("done.json")]) == 2

    run(copy, "lr=0.002")
    assert len(list_trainings(copy)) == 2 and list_trainings(copy).items() >= trainings.items()
