"""What is watched of a training is right, and watching changes nothing."""

import json
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from conftest import ROOT, write_notebook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from csm_nb.audio import read_audio
from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import load_base
from csm_nb.recipe import Recipe
from csm_nb.train import callbacks
from csm_nb.train.trainer import train_model

RECIPE = Recipe(4, max_tokens=128, log_every=1, eval_every=2, save_every=2)


def make_rows():
    rng = np.random.default_rng(0)
    texts = ["Hei du.", "Jeg vet ikke.", "Kom hit nå!", "Nei."]
    return [{"text": text, "speaker_id": "0", "codes": rng.integers(1, 512, (12, 8), dtype=np.uint16)} for text in texts]


def train(folder, recipe=RECIPE, every=None, texts=("Nei.", "Ja.")):
    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    model = add_adapter(model, 4, 8, 0.1)
    samples = None if every is None else callbacks.SpeakSamples(model, processor, texts, "0", every, folder / "samples")
    watch = callbacks.show_progress(recipe, samples)
    return train_model(model, processor, make_rows(), make_rows()[:1], folder / "training", recipe, watch)


def strip(history):
    return [{k: v for k, v in row.items() if k in ("step", "loss", "eval_loss", "grad_norm")} for row in history]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return folder, train(folder, every=1)


def test_a_training_that_speaks_on_the_way_has_the_losses_of_one_that_does_not(watched, tmp_path):
    assert strip(watched[1]) == strip(train(tmp_path))


def test_samples_are_kept_by_step_but_for_the_last(watched):
    folder = watched[0] / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0", "step-1", "step-2", "step-3"]
    assert all(len(read_audio(folder / "step-2" / f"{i}.wav")) for i in range(2))


def test_without_a_number_of_steps_it_speaks_before_the_first_and_half_way(tmp_path):
    train(tmp_path, every=0)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0", "step-2"]


def test_samples_that_fail_are_named_and_the_training_goes_on(watched, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no sound card in hell")

    monkeypatch.setattr(callbacks, "speak", fail)
    assert strip(train(tmp_path, every=2)) == strip(watched[1])
    assert "step 2: no samples, the training goes on (RuntimeError: no sound card in hell)" in capsys.readouterr().out


def read_events(folder):
    events = EventAccumulator(str(folder / "training/tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_the_log(watched):
    events = read_events(watched[0])
    logged = [(row["step"], pytest.approx(row["loss"])) for row in watched[1] if "loss" in row]
    assert events["train/loss"] == logged and [step for step, _ in events["eval/loss"]] == [0, 2, 4]
    assert {"train/learning_rate", "train/grad_norm", "train/depth_loss"} <= events.keys()


def test_a_resumed_training_goes_on_in_tensorboard_and_speaks_only_what_it_did_not(watched, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    model = add_adapter(model, 4, 8, 0.1)
    with pytest.raises(KeyboardInterrupt):
        train_model(model, processor, make_rows(), make_rows()[:1], tmp_path / "training", RECIPE,
                    [*callbacks.show_progress(RECIPE), Stop()])
    history = train(tmp_path, every=1)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-3"]
    assert strip(history) == strip(watched[1])
    assert [step for step, _ in read_events(tmp_path)["train/loss"]] == [1, 2, 3, 4]
    lines = (tmp_path / "training/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]


def test_an_executed_notebook_holds_the_last_figure_once_and_the_players(tmp_path):
    places = [str(ROOT / "tests"), str(Path(__file__).parent)]
    cell = f"import sys; sys.path[:0] = {places!r}\nfrom pathlib import Path\n"
    cell += "from test_progress import train\ntrain(Path(folder), every=2);"
    write_notebook(tmp_path / "watch.ipynb", 'folder: str = ""', cell)
    papermill.execute_notebook(tmp_path / "watch.ipynb", tmp_path / "out.ipynb", {"folder": str(tmp_path)}, progress_bar=False)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    shown = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/jpeg" in data for data in shown) == 1
    assert sum("<audio" in str(data.get("text/html")) for data in shown) == 2  # before the first step, and of the second
