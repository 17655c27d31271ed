"""The lowest held-out loss is saved unless another speaks better beyond noise, and every figure is of the saved weights."""

import contextlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_train import make_rows, plain_loss

from csm_nb.csm.adapters import add_adapter, load_adapter, train_fully
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter
from csm_nb.judge.judges import load_asr, load_lid
from csm_nb.languages import LANGUAGES
from csm_nb.recipe import Recipe, TrainingError
from csm_nb.synth.espeak import VOICES
from csm_nb.text.sentences import make_sentences, normalise_sentence, split_of
from csm_nb.train import select
from csm_nb.train.checkpoints import list_checkpoints, mark_complete, save_weights
from csm_nb.train.loss import compute_loss
from csm_nb.train.packing import batch_clips, read_clips
from csm_nb.train.select import (
    TEXTS,
    compare_losses,
    describe_choice,
    describe_speech,
    draw_texts,
    judge_model,
    mark_choice,
    measure_clips,
    select_checkpoint,
    summarise_speech,
)
from csm_nb.train.trainer import train_model

VOICE, RECIPE = VOICES[0].speaker_id, Recipe(30)
ROWS = make_rows((9, 21, 14, 30, 11, 25, 16, 8, 12))  # random codes: noise in the weights lowers their loss
ENGLISH = make_sentences("en", TEXTS, 0, "validation")


@pytest.fixture(scope="module")
def judges():
    return load_lid("models/lid-mini", "cpu"), load_asr("models/asr-mini", "cpu", "en")


def trained_weights(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def write_checkpoint(model, folder):
    save_weights(model, folder)
    mark_complete(folder, {"step": int(folder.name.split("-")[1])})


def ruin(model, names="lora_B"):
    """Noise on what is trained, so that speech becomes babble."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in trained_weights(model).items():
            if names in name:
                value += 0.3 * torch.randn_like(value)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(adapted model, processor, folder): checkpoint 20 speaks English as the base does, 30 has the lower loss and babbles."""
    folder = tmp_path_factory.mktemp("lora")
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.1).eval()
    write_checkpoint(model, folder / "checkpoint-10")
    write_checkpoint(model, folder / "checkpoint-20")
    ruin(model)
    write_checkpoint(model, folder / "checkpoint-30")
    return model, processor, folder


@pytest.fixture
def loss_only(training):
    """Return a call of select_checkpoint without judges, of the folder of `training`."""
    model, processor, folder = training
    return lambda **options: select_checkpoint(model, processor, folder, ROWS, RECIPE, **options)


@pytest.fixture(scope="module")
def table(training, judges):
    model, processor, folder = training
    return select_checkpoint(model, processor, folder, ROWS, RECIPE, ENGLISH, "en", *judges, VOICE)


# Losses, clip by clip


@pytest.mark.parametrize("weights", [(), (3, 1, 1, 0, 1, 1, 1, 0)], ids=["alike", "weighed"])
def test_the_loss_of_a_clip_is_that_of_the_clip_alone(monkeypatch, weights):
    monkeypatch.setattr(select, "half_precision", lambda device: contextlib.nullcontext())
    model, processor = load_base("models/csm-mini", "cpu")
    rows = ROWS[:5]
    losses = measure_clips(model, processor, rows, Recipe(1, depth_ratio=1.0, max_tokens=80, codebook_weights=weights))
    with torch.no_grad():
        if weights:
            clips = read_clips(rows, processor, 80, 25.0)
            expected = [compute_loss(model, batch_clips(clips, [i]), weights).loss.item() for i in range(5)]
        else:
            expected = [sum(plain_loss(model, processor, [row])).item() for row in rows]
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-4)  # the shortest comes first


def test_weights_that_no_training_takes_are_refused_in_words(training):
    with pytest.raises(TrainingError, match="8 numbers"):
        measure_clips(*training[:2], ROWS, Recipe(1, codebook_weights=(1, 2)))


@pytest.mark.parametrize("count", range(1, 10))
def test_every_clip_has_a_loss_whatever_is_drawn(training, count):
    rows = make_rows((1, 2, 3, 1, 2, 1, 1, 1, 1)[:count])  # transformers can not take as many depth frames as codebooks
    losses = measure_clips(*training[:2], rows, Recipe(1, depth_ratio=0.01))
    assert len(losses) == count and np.isfinite(losses).all() and losses.min() > 5


def test_losses_of_clips_are_the_same_whenever_they_are_measured_and_leave_everything_as_it_was(training):
    model, processor, _ = training
    model.train()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in trained_weights(model).items()}
    first, again = (measure_clips(model, processor, ROWS, RECIPE) for _ in range(2))
    assert len(first) == len(ROWS) and (first == again).all()
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in trained_weights(model).items())
    model.eval()
    assert (measure_clips(model, processor, ROWS, RECIPE) == first).all()  # dropout was off


def test_no_more_clips_are_measured_than_the_training_evaluates(training, monkeypatch):
    every = measure_clips(*training[:2], ROWS, RECIPE)
    monkeypatch.setattr(select, "VALIDATION_CLIPS", 5)
    few = measure_clips(*training[:2], ROWS, RECIPE)
    assert len(every) == 9 and len(few) == 5
    assert np.abs(few[:, None] - every).min(1).max() < 0.1  # five of them; bfloat16 rounds by what else is in a batch


@pytest.mark.parametrize(("falls", "verdict", "words"), [
    ([0.3] * 10 + [0.2] * 10, "learned", "a fall of 0.25 "),
    ([0.001] * 20, "no gain", "learned is a fall of 0.01 and more"),
    ([1.0] * 8 + [-0.8] * 8, "unclear", r"about \d+ clips would show"),
    ([-0.3] * 20, "no gain", "a fall of -0.30 "),
    ([0.0] * 20, "no gain", "a fall of 0.00 "),
    ([0.5] * 19 + [float("nan")], "no gain", "a fall of nan "),
    ([0.01, 0.02, 0.0] * 6, "unclear", "a fall of 0.01 .*whole interval$"),
    ([0.3] * 7, "unclear", "8 clips and more to decide: hold out 1 more"),
    ([0.3], "unclear", "hold out 7 more"),
], ids=["every clip falls", "by a hair", "less than the spread", "it rises", "nothing", "no number", "at the bound", "few clips",
        "one clip"])  # fmt: skip
def test_learned_is_a_fall_beyond_the_spread_over_clips(falls, verdict, words):
    before = np.linspace(3, 9, len(falls))  # clips differ far more than the fall
    gain = compare_losses(before, before - falls)
    assert gain["verdict"] == verdict and re.search(words, gain["because"])
    assert gain["loss_fall"] == pytest.approx(np.mean(falls), abs=1e-4, nan_ok=True) and gain["held_out_clips"] == len(falls)
    assert gain["first_loss"] - gain["last_loss"] == pytest.approx(gain["loss_fall"], abs=2e-4, nan_ok=True)
    assert not gain["loss_fall_low"] > gain["loss_fall"] and not gain["loss_fall"] > gain["loss_fall_high"]
    json.dumps(gain)


def test_as_many_clips_as_are_named_decide():
    falls = np.resize([1.0, -0.8], 20)
    wanted = int(re.search(r"about (\d+) clips", compare_losses(np.full(20, 5.0), 5 - falls)["because"])[1])
    verdicts = [compare_losses(np.full(n, 5.0), 5 - np.resize(falls, n))["verdict"] for n in (wanted // 2, 2 * wanted)]
    assert verdicts == ["unclear", "learned"]


def test_losses_of_different_clips_are_not_compared():
    with pytest.raises(ValueError, match="9 clips before and 8 after"):
        compare_losses(np.ones(9), np.ones(8))


# The rule


def choose_by(losses, scores=()):
    table = mark_choice(pd.DataFrame({"step": range(1, len(losses) + 1), "held-out loss": losses}), list(map(np.array, scores)))
    assert table.chosen.sum() == table["by loss"].sum() == 1
    return table.step[table.chosen].item(), table


@pytest.mark.parametrize(("losses", "scores", "lowest", "chosen", "why"), [
    ((3.0, 1.0, 2.0), (), 2, 2, "the lowest held-out loss"),
    ((1.0, 1.0, 2.0), (), 2, 2, "the lowest held-out loss"),
    ((1.0,), (), 1, 1, "the only one in the last third"),
    ((float("nan"), 2.0, 3.0), (), 2, 2, "the lowest held-out loss"),
    ((1.0, 2.0), ([0.5] * 32, [0.5] * 32), 1, 1, "no other has a better score beyond the interval"),
    ((1.0, 2.0), ([0.5] * 32, [0.9] * 32), 1, 1, "no other has a better score beyond the interval"),
    ((1.0, 2.0), ([1.0, 0.0] * 16, [0.0, 0.9] * 16), 1, 1, "no other has a better score beyond the interval"),
    ((1.0, 2.0), ([1.0, 0.0] * 16, [0.7, 0.0] * 16), 1, 2, r"than step 1, .*: by 0.150 \(0.\d+ to 0.\d+\) over 32"),
    ((3.0, 2.0, 1.0), ([0.3] * 32, [0.2] * 32, [0.5] * 32), 3, 2, r"than step 3, .* by 0.300"),
    ((2.0, 3.0, 1.0), ([0.3] * 32, [0.3] * 32, [0.5] * 32), 3, 1, r"than step 3, .* by 0.200"),
], ids=["lowest loss", "of equals the later", "one alone", "no number comes last", "equal scores", "worse", "better within the "
        "interval", "better beyond it", "of two better ones the best", "of equally better ones the lower loss"])  # fmt: skip
def test_the_lowest_loss_is_replaced_only_beyond_the_interval(losses, scores, lowest, chosen, why):
    step, table = choose_by(losses, scores)
    assert step == chosen and table.step[table["by loss"]].item() == lowest
    assert re.search(why, table.why[table.chosen].item()) and table.why.str.len().min() > 0


def test_texts_are_compared_one_by_one():
    hard = np.linspace(0, 2, 32)  # texts differ far more than checkpoints do
    assert choose_by((1.0, 2.0), (hard + 0.05, hard))[0] == 2
    assert choose_by((1.0, 2.0), (hard + 0.05, hard[::-1]))[0] == 1


def test_checkpoints_that_speak_alike_are_rarely_swapped_and_a_better_one_often_wins():
    rng = np.random.default_rng(0)
    swapped = {0.0: 0, 0.3: 0}
    for better in swapped:
        for _ in range(50):
            skill = rng.uniform(0, 1, 32)
            scores = [(skill + rng.normal(0, 0.4, 32)).clip(0, 3), (skill + rng.normal(0, 0.4, 32) - better).clip(0, 3)]
            swapped[better] += choose_by((1.0, 2.0), scores)[0] == 2
    assert swapped[0.0] <= 4 and swapped[0.3] >= 30


def test_only_the_last_third_of_the_steps_is_looked_at(training, loss_only):
    assert loss_only().step.tolist() == [20, 30]  # not 10
    assert loss_only(choice="last").step.tolist() == [30]


def test_without_judges_the_loss_alone_chooses(loss_only, monkeypatch):
    monkeypatch.setattr(select, "judge_model", lambda *_: pytest.fail("a judge was asked"))
    table = loss_only()
    assert table.step[table.chosen].tolist() == [30] and "score" not in table
    last = loss_only(texts=ENGLISH, choice="last")  # one candidate needs no judge
    assert last.step[last.chosen].tolist() == [30] and last.why.tolist() == ["the last one, as choice=last asks"]


def test_babble_is_not_chosen_though_its_loss_is_lower(table):
    assert table.step.tolist() == [20, 30]
    assert table.chosen.tolist() == [True, False] and table["by loss"].tolist() == [False, True]
    good, bad = table.itertuples(index=False)
    assert good.CER < bad.CER and good.score < bad.score and table["better low"][0] > 0
    sums = table.CER + (1 - table["heard right"]) + table.runaways
    assert np.allclose(table.score, sums, atol=2e-3)
    assert table.why[0].startswith("a better score than step 30, beyond the interval: by ")
    assert table.why[1] == "the lowest held-out loss"


def test_judged_again_it_is_the_same_whatever_the_model_held_before(training, judges, table):
    model, processor, folder = training
    ruin(model)
    again = select_checkpoint(model, processor, folder, ROWS, RECIPE, ENGLISH, "en", *judges, VOICE)
    pd.testing.assert_frame_equal(again, table)
    best = load_file(folder / "checkpoint-20/adapter_model.safetensors")
    held = {re.sub(r"\.(default|modules_to_save)\b", "", name): value for name, value in trained_weights(model).items()}
    assert best.keys() == held.keys() and all(torch.equal(best[name], held[name]) for name in best)


def test_figures_are_of_the_weights_that_are_saved(training, loss_only, tmp_path):
    model, processor, _ = training
    table = loss_only()
    after = measure_clips(model, processor, ROWS, RECIPE)
    assert after.mean() == pytest.approx(table["held-out loss"][table.chosen].item(), abs=1e-3)
    save_adapter(model, tmp_path / "adapter", compare_losses(after + 1, after), "models/csm-mini")
    loaded = load_adapter(load_base("models/csm-mini", "cpu")[0], tmp_path / "adapter")
    assert measure_clips(loaded, processor, ROWS, RECIPE) == pytest.approx(after, abs=1e-5)
    assert f"| last_loss | {after.mean():.4f}".rstrip("0") in (tmp_path / "adapter/README.md").read_text()


def test_the_choice_is_described_for_the_metrics(table):
    choice = json.loads(json.dumps(describe_choice(table, [{"step": 30, "loss": 3.0}])))
    assert (choice["steps"], choice["trained_steps"], choice["step_by_loss"], choice["checkpoints"]) == (20, 30, 30, 2)
    assert choice["chosen_because"] == table.why[0]


def test_of_fully_trained_models_the_best_is_loaded_with_its_tables_tied(tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = train_fully(model).eval()
    write_checkpoint(model, tmp_path / "checkpoint-3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ruin(model, "q_proj")
    ruin(model, "embed_audio_tokens")
    write_checkpoint(model, tmp_path / "checkpoint-2")
    table = select_checkpoint(model, processor, tmp_path, ROWS, RECIPE, choice="last")
    assert table.step[table.chosen].item() == 3
    tables = model.backbone_model.embed_tokens.embed_audio_tokens, model.depth_decoder.model.embed_tokens
    assert tables[0].weight.data_ptr() == tables[1].weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_broken_checkpoints_are_left_out_and_named(training, tmp_path, capsys):
    model, processor, folder = training
    write_checkpoint(model, tmp_path / "checkpoint-10")
    for step in (20, 30, 40):
        write_checkpoint(model, tmp_path / f"checkpoint-{step}")
    weights = tmp_path / "checkpoint-20/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    kept = {name: value.clone() for name, value in trained_weights(model).items()}
    with torch.no_grad():
        next(iter(trained_weights(model).values())).fill_(float("nan"))
    save_weights(model, tmp_path / "checkpoint-30")
    (tmp_path / "checkpoint-40/adapter_model.safetensors").unlink()
    table = select_checkpoint(model, processor, tmp_path, ROWS, RECIPE)
    printed = capsys.readouterr().out
    assert table.step.tolist() == [10] and table.chosen.all() and table["by loss"].all()
    assert all(torch.equal(value, kept[name]) for name, value in trained_weights(model).items())
    for part in ("checkpoint-20: can not be read", "checkpoint-30: holds weights that are no numbers", "checkpoint-40: can not"):
        assert f"left out, {part}" in printed
    for name in ("adapter_model.safetensors", "complete.json"):
        (tmp_path / "checkpoint-10" / name).unlink()
    with pytest.raises(TrainingError, match="no checkpoint can be used.*checkpoint-20"):
        select_checkpoint(model, processor, tmp_path, ROWS, RECIPE)


@pytest.mark.parametrize(("options", "message"), [
    ({"texts": ENGLISH[:8]}, "8 texts to choose by; allowed are 32 and more"),
    ({"texts": ENGLISH[:8] * 4}, "8 texts to choose by"),  # more takes of a text are no more texts
    ({"choice": "first"}, "choice is 'first'; allowed are best and last"),
])
def test_what_can_not_choose_is_refused(loss_only, options, message):
    with pytest.raises(TrainingError, match=message):
        loss_only(**options)


def test_without_a_checkpoint_it_says_what_to_do(training, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(TrainingError, match="no complete checkpoint.*train again"):
        select_checkpoint(*training[:2], tmp_path, ROWS, RECIPE)


def test_what_a_training_leaves_can_be_chosen_from(tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.1)
    recipe = Recipe(4, save_every=1, eval_every=1, depth_ratio=1.0)
    before = measure_clips(model, processor, ROWS, recipe)
    assert before == pytest.approx(measure_clips(model, processor, ROWS, recipe), abs=1e-6)
    history = train_model(model, processor, ROWS, ROWS, tmp_path, recipe)
    table = select_checkpoint(model, processor, tmp_path, ROWS, recipe)
    assert table.step.tolist() == [step for step, _ in list_checkpoints(tmp_path)][1:] == [3, 4]
    logged = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    assert table["held-out loss"].tolist() == pytest.approx([logged[3], logged[4]], rel=0.01)  # over clips, and over frames
    assert before.mean() == pytest.approx(logged[0], rel=0.01)


# What is said


def test_sentences_that_choose_and_report_are_read_nowhere_else():
    for code, language in LANGUAGES.items():
        to_choose, to_report = draw_texts(code, 3)
        assert len(set(to_choose)) == len(set(to_report)) == TEXTS >= 32 and not set(to_choose) & set(to_report)
        assert {split_of(text) for text in (*to_choose, *to_report)} == {"validation"}  # 04 reads "test" and the probes
        probes = set(map(normalise_sentence, language.probes))
        assert not {normalise_sentence(text) for text in (*to_choose, *to_report)} & probes


def test_a_clip_that_babbles_counts_as_one(monkeypatch):
    given = {}

    def speak(model, processor, texts, speaker, seed, keep, language):
        given.update(texts=texts, speaker=speaker, seed=seed)
        return [SimpleNamespace(wav=np.zeros(9), ended=ended) for ended in (True, True, False)]

    monkeypatch.setattr(select, "speak", speak)
    monkeypatch.setattr(select, "transcribe", lambda asr, wavs, keep: [ENGLISH[0], ENGLISH[1], "bla " * 500])
    monkeypatch.setattr(select, "identify_languages", lambda lid, wavs, keep: [{"no": 0.9, "sv": 0.1}, {"sv": 1.0}, {"sv": 1.0}])
    judged = judge_model(None, None, ENGLISH[:3], "no", None, None, "7", 5)
    assert given == {"texts": ENGLISH[:3], "speaker": "7", "seed": 5}
    assert judged.score.tolist() == [0, 1, 3]  # per text: CER + not heard as the language + runaway
    figures = summarise_speech(judged)
    assert (figures["CER"], figures["heard right"], figures["runaways"]) == pytest.approx((1 / 3,) * 3)
    assert figures["score"] == pytest.approx(1 / 3 + 2 / 3 + 1 / 3)


def test_shares_on_the_card_have_wilsons_interval():
    judged = pd.DataFrame({"CER": [0.0] * 8 + [0.5] * 8, "right": True, "runaway": False, "score": 0.25})
    figures = json.loads(json.dumps(describe_speech(judged)))
    assert (figures["heard_right_low"], figures["heard_right"], figures["heard_right_high"]) == (0.8064, 1.0, 1.0)
    assert (figures["runaways_low"], figures["runaways"], figures["runaways_high"]) == (0.0, 0.0, 0.1936)
    assert figures["cer"] == 0.25 and 0.1 < figures["cer_low"] < 0.25 < figures["cer_high"] < 0.4
    assert figures["judged_texts"] == 16
