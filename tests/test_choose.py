"""The checkpoint that speaks best is chosen, whatever the loss says, and its weights are in the model afterwards."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_train import make_rows

from csm_nb import choose
from csm_nb.batches import TrainingError
from csm_nb.checkpoints import list_checkpoints, mark_complete, save_weights
from csm_nb.choose import choose_checkpoint, describe_choice, judge_model, mark_choice
from csm_nb.csm import add_adapter, load_base, train_fully
from csm_nb.judge import load_asr, load_lid
from csm_nb.synth import VOICES
from csm_nb.train import Recipe, train_model

TEXTS, VOICE = ["Good morning.", "Come here now!", "I do not know."], VOICES[0].speaker_id


@pytest.fixture(scope="module")
def judges():
    return load_lid("models/lid-mini", "cpu"), load_asr("models/asr-mini", "cpu", "en")


def trained_weights(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def write_checkpoint(model, folder, eval_loss):
    save_weights(model, folder)
    mark_complete(folder, {"step": int(folder.name.split("-")[1]), "eval_loss": eval_loss})


def ruin(model, names="lora_B"):
    """Noise on what is trained, so that speech becomes babble."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in trained_weights(model).items():
            if names in name:
                value += 0.3 * torch.randn_like(value)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(adapted model, processor, folder): checkpoint 10 speaks English as the base does, 20 has the lower loss and babbles."""
    folder = tmp_path_factory.mktemp("lora")
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0).eval()
    write_checkpoint(model, folder / "checkpoint-10", 4.0)
    ruin(model)
    write_checkpoint(model, folder / "checkpoint-20", 3.5)
    return model, processor, folder


@pytest.fixture(scope="module")
def table(training, judges):
    model, processor, folder = training
    return choose_checkpoint(model, processor, folder, TEXTS, "en", *judges, VOICE)


def test_babble_is_not_chosen_though_its_loss_is_lower(table):
    assert table.step.tolist() == [10, 20]
    assert table.chosen.tolist() == [True, False] and table["by loss"].tolist() == [False, True]
    good, bad = table.itertuples(index=False)
    assert good.CER < bad.CER and good.score < bad.score
    sums = table.CER + (1 - table["heard right"]) + table.runaways
    assert np.allclose(table.score, sums, atol=2e-3)
    assert (table["CER low"] <= table.CER).all() and (table.CER <= table["CER high"]).all() and (table.CER <= 1).all()


def test_the_choice_is_described_for_the_metrics(table):
    choice = json.loads(json.dumps(describe_choice(table)))
    assert (choice["chosen_step"], choice["step_by_loss"], choice["checkpoints"]) == (10, 20, 2)
    assert choice["chosen_score"] == table.score.min()


def test_judged_again_it_is_the_same_whatever_the_model_held_before(training, judges, table):
    model, processor, folder = training
    ruin(model)
    pd.testing.assert_frame_equal(choose_checkpoint(model, processor, folder, TEXTS, "en", *judges, VOICE), table)
    best = load_file(folder / "checkpoint-10/adapter_model.safetensors")
    held = {re.sub(r"\.(default|modules_to_save)\b", "", name): value for name, value in trained_weights(model).items()}
    assert best.keys() == held.keys() and all(torch.equal(best[name], held[name]) for name in best)


def test_of_fully_trained_models_the_best_is_loaded_with_its_tables_tied(judges, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = train_fully(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_checkpoint(model, tmp_path / "checkpoint-1", 4.0)
    ruin(model, "q_proj")
    ruin(model, "embed_audio_tokens")
    write_checkpoint(model, tmp_path / "checkpoint-2", 3.0)
    table = choose_checkpoint(model, processor, tmp_path, TEXTS[:2], "en", *judges, VOICE)
    assert table.step[table.chosen].item() == 1
    tables = model.backbone_model.embed_tokens.embed_audio_tokens, model.depth_decoder.model.embed_tokens
    assert tables[0].weight.data_ptr() == tables[1].weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_broken_checkpoints_are_left_out_and_named(training, judges, tmp_path, capsys):
    model, processor, folder = training
    write_checkpoint(model, tmp_path / "checkpoint-10", 4.0)
    for step in (20, 30, 40):
        write_checkpoint(model, tmp_path / f"checkpoint-{step}", 3.0)
    weights = tmp_path / "checkpoint-20/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    kept = {name: value.clone() for name, value in trained_weights(model).items()}
    with torch.no_grad():
        next(iter(trained_weights(model).values())).fill_(float("nan"))
    save_weights(model, tmp_path / "checkpoint-30")
    (tmp_path / "checkpoint-40/adapter_model.safetensors").unlink()
    table = choose_checkpoint(model, processor, tmp_path, TEXTS[:1], "en", *judges, VOICE)
    printed = capsys.readouterr().out
    assert table.step.tolist() == [10] and table.chosen.all() and table["by loss"].all()
    assert all(torch.equal(value, kept[name]) for name, value in trained_weights(model).items())
    for part in ("checkpoint-20: can not be read", "checkpoint-30: holds weights that are no numbers", "checkpoint-40: can not"):
        assert f"left out, {part}" in printed
    for name in ("adapter_model.safetensors", "complete.json"):
        (tmp_path / "checkpoint-10" / name).unlink()
    with pytest.raises(TrainingError, match="no checkpoint can be used.*checkpoint-20"):
        choose_checkpoint(model, processor, tmp_path, TEXTS[:1], "en", *judges, VOICE)


def test_without_a_checkpoint_it_says_what_to_do(training, judges, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(TrainingError, match="no complete checkpoint.*train again"):
        choose_checkpoint(*training[:2], tmp_path, TEXTS, "en", *judges)


def test_what_a_training_leaves_can_be_chosen_from(judges, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.1)
    history = train_model(model, processor, make_rows(), make_rows(), tmp_path, Recipe(4, save_every=2, eval_every=2))
    table = choose_checkpoint(model, processor, tmp_path, TEXTS[:1], "en", *judges)
    losses = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    assert table.step.tolist() == [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]
    assert table["held-out loss"].tolist() == pytest.approx([losses[2], losses[4]], abs=1e-3)


@pytest.mark.parametrize(("scores", "losses", "chosen", "by_loss"), [
    ((0.5, 0.4, 0.6), (1.0, 3.0, 2.0), 2, 1),
    ((0.5, 0.5, 0.5), (3.0, 1.0, 2.0), 2, 2),
    ((0.5, 0.5, 0.6), (1.0, 1.0, 1.0), 2, 3),
    ((0.5, 0.5, 0.5), (float("nan"), 2.0, float("nan")), 2, 2),
    ((0.5, 0.4, 0.4), (float("nan"),) * 3, 3, None),
], ids=["lowest score", "then lower loss", "then later", "a missing loss comes last", "no loss at all"])  # fmt: skip
def test_the_lowest_score_is_chosen_and_ties_are_settled(scores, losses, chosen, by_loss):
    table = mark_choice(pd.DataFrame({"step": [1, 2, 3], "held-out loss": losses, "score": scores}))
    assert table.step[table.chosen].tolist() == [chosen]
    assert table.step[table["by loss"]].tolist() == ([by_loss] if by_loss else [])


def test_a_clip_that_babbles_counts_as_one_and_every_take_counts(monkeypatch):
    given = {}

    def speak(model, processor, texts, speaker, seed):
        given.update(texts=texts, speaker=speaker, seed=seed)
        return [SimpleNamespace(wav=np.zeros(9), ended=number < 8) for number in range(12)]

    monkeypatch.setattr(choose, "speak", speak)
    monkeypatch.setattr(choose, "transcribe", lambda asr, wavs: [TEXTS[0]] * 4 + [TEXTS[1]] * 4 + ["bla " * 500] * 4)
    monkeypatch.setattr(choose, "identify_languages", lambda lid, wavs: [{"no": 0.9, "sv": 0.1}, {"sv": 1.0}] * 6)
    figures = judge_model(None, None, TEXTS, "no", None, None, "7", 5)
    assert given == {"texts": [text for text in TEXTS for _ in range(4)], "speaker": "7", "seed": 5}
    assert figures["CER"] == pytest.approx(1 / 3) and figures["heard right"] == figures["low"] == figures["high"] == 0.5
    assert figures["runaways"] == pytest.approx(1 / 3) and figures["score"] == pytest.approx(1 / 3 + 0.5 + 1 / 3)
