"""The loss has the right scale, sees each clip alone, learns to stop, and a killed training goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import cross_entropy

from csm_nb.codec.mimi import encode, load_codec
from csm_nb.corpora.split import split_rows
from csm_nb.csm.adapters import add_adapter, train_fully
from csm_nb.csm.attention import use_attention
from csm_nb.csm.load import load_base
from csm_nb.device import has_fast_bfloat16
from csm_nb.provenance import read_json
from csm_nb.recipe import Recipe, TrainingError, read_recipe
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences
from csm_nb.train import checkpoints, trainer
from csm_nb.train.checkpoints import list_checkpoints, mark_complete, prune_checkpoints
from csm_nb.train.loss import build_inputs, compute_loss, prepare_model, restore_model
from csm_nb.train.packing import batch_clips, collate, pack_epoch, pack_row, plan_rows, read_clips
from csm_nb.train.trainer import train_model


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


def make_rows(lengths=(9, 21, 14)):
    rng = np.random.default_rng(0)
    texts = ["Hei du.", "Jeg vet ikke hva det er.", "Kom hit nå!", "Nei.", "Vi går hjem i dag."]
    return [{"text": texts[i % 5], "speaker_id": "0", "codes": rng.integers(1, 512, (frames, 8), dtype=np.uint16)}
            for i, frames in enumerate(lengths)]


@pytest.fixture
def rows():
    return make_rows()


def read(rows, processor, max_tokens=2048):
    return read_clips(rows, processor, max_tokens, 25.0)


def plain_loss(model, processor, rows):
    """The CSM loss from scratch: each clip alone, each frame alone through the depth decoder; (backbone, depth) means."""
    backbone, depth = [], []
    for row in rows:
        prompt = f"<|begin_of_text|>[{row['speaker_id']}]{row['text']}<|end_of_text|>"
        text = torch.tensor([processor.tokenizer(prompt, add_special_tokens=False).input_ids])
        codes = torch.cat([torch.from_numpy(row["codes"].astype(np.int64)), torch.zeros(1, 8, dtype=torch.long)])
        embeds = torch.cat([model.embed_text_tokens(text), model.backbone_model.embed_tokens(codes[None])], 1)
        hidden = model.backbone_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
        for number, frame in enumerate(codes):
            state = hidden[text.shape[1] + number - 1]
            backbone.append(-model.lm_head(state).float().log_softmax(-1)[frame[0]])
            ids = torch.cat([torch.zeros(1, dtype=torch.long), frame[:-1]])[None]
            logits = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=state[None], use_cache=False).logits[0]
            depth.append(cross_entropy(logits[-7:].float(), frame[1:]))
    return torch.stack(backbone).mean(), torch.stack(depth).mean()


def adapted(kind):
    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    if kind == "full":
        return train_fully(model), processor
    model = add_adapter(model, 4, 8, 0.0, mlp=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    return model, processor


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_and_gradients_of_a_packed_row_are_those_of_a_plain_computation(kind, rows):
    model, processor = adapted(kind)
    inner = model.get_base_model() if kind == "lora" else model
    backbone, depth = plain_loss(inner, processor, rows)
    (backbone + depth).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prepare_model(model, Recipe(1)).train()
    try:
        output = compute_loss(model, collate([pack_row(read(rows, processor), [2, 0, 1], 1.0)]))
        output.loss.backward()
    finally:
        restore_model(model)
    assert output.backbone_loss.item() == pytest.approx(backbone.item(), rel=1e-4)
    assert output.depth_decoder_loss.item() == pytest.approx(depth.item(), rel=1e-4)
    assert expected and any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("ratio", [1 / 16, 0.25, 0.5])
def test_every_depth_ratio_draws_each_frame_equally_often(base, rows, ratio):
    clips, generator = read(rows, base[1]), torch.Generator().manual_seed(0)
    drawn = torch.stack([pack_row(clips, [0, 1, 2], ratio, generator)["depth_frames"] for _ in range(2000)]).float()
    frames = pack_row(clips, [0, 1, 2], 1.0)["is_frame"]
    share = round(ratio * 47) / 47
    assert (drawn.sum(1) == round(ratio * 47)).all()
    assert drawn.mean(0)[~frames].max() == 0
    assert (drawn.mean(0)[frames] - share).abs().max() < 5 * (share * (1 - share) / 2000) ** 0.5


@pytest.mark.parametrize("training", [True, False], ids=["clip by clip", "sdpa with a packed mask"])
def test_packed_rows_padded_rows_and_single_clips_have_one_loss(base, training):
    model, processor = base
    rows = make_rows((9, 21, 14, 30, 5))
    clips = read(rows, processor)
    batches = [batch_clips(clips, range(5)), collate([pack_row(clips, [4, 1, 0], 1.0), pack_row(clips, [3, 2], 1.0)])]
    use_attention(model, training)
    with torch.no_grad():
        losses = [compute_loss(model, batch) for batch in batches]
        alone = [compute_loss(model, batch_clips(clips, [i])) for i in range(5)]
    use_attention(model, False)
    frames = [len(row["codes"]) + 1 for row in rows]
    for name in ("backbone_loss", "depth_decoder_loss"):
        mean = np.average([getattr(output, name).item() for output in alone], weights=frames)
        for output in losses:
            assert getattr(output, name).item() == pytest.approx(mean, rel=1e-4)


def test_codebook_weights_of_one_change_nothing_and_others_do(base, rows):
    model, processor = base
    batch = batch_clips(read(rows, processor), range(3))
    with torch.no_grad():
        plain, ones, first = (compute_loss(model, batch, w).loss.item() for w in ((), (3,) * 8, (1, *[0] * 7)))
        backbone = compute_loss(model, batch).backbone_loss.item()
    assert ones == pytest.approx(plain, rel=1e-5)
    assert first == pytest.approx(8 * backbone, rel=1e-5)
    with pytest.raises(TrainingError, match="8 numbers"):
        compute_loss(model, batch, (1, 2))


def test_a_text_weight_adds_the_loss_on_text(base, rows):
    model, processor = base
    batch = collate([pack_row(read(rows, processor), [0, 1, 2], 1.0)])
    with torch.no_grad():
        without, half, whole = (compute_loss(model, batch, (), w).loss.item() for w in (0.0, 0.5, 1.0))
    assert whole > without and half - without == pytest.approx((whole - without) / 2, rel=1e-3)


def test_text_counts_by_its_tokens_in_whichever_batch_of_a_step_it_is(base, tmp_path):
    rows = make_rows((5, 60))
    rows[0]["text"], rows[1]["text"] = "Jeg vet ikke hva det er, men vi går hjem i dag.", "Nei."
    losses = []
    for recipe in (Recipe(1, batch_size=2), Recipe(1, gradient_accumulation=2)):
        torch.manual_seed(0)
        model = add_adapter(load_base("models/csm-mini", "cpu")[0], 4, 8, 0.0)
        recipe = replace(recipe, max_tokens=80, text_weight=10.0, depth_ratio=1.0)
        history = train_model(model, base[1], rows, rows, tmp_path / f"{recipe.gradient_accumulation}", recipe)
        losses.append([row.get("loss", row.get("eval_loss")) for row in history])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=2e-3)
    with torch.no_grad():  # before the step, held out and trained on are the same clips
        clips = read(rows, base[1])
        whole = compute_loss(model.unload(), batch_clips(clips, [0, 1]), (), 10.0).loss.item()
    assert losses[0][:2] == pytest.approx([whole, whole], rel=2e-3)


def test_rows_hold_every_clip_once_an_epoch_and_never_more_than_max_tokens(base):
    clips = read(make_rows(tuple(np.random.default_rng(1).integers(5, 60, 200))), base[1], 256)
    epochs = [pack_epoch(clips.lengths, clips.usable, 256, np.random.default_rng([0, e])) for e in range(2)]
    for rows in epochs:
        assert sorted(i for row in rows for i in row) == list(range(200))
        assert max(clips.lengths[row].sum() for row in rows) <= 256
        assert clips.lengths.sum() / (256 * len(rows)) > 0.9
    assert epochs[0] != epochs[1]
    assert plan_rows(clips, 256, 90, 0) == plan_rows(clips, 256, 90, 0) != plan_rows(clips, 256, 90, 1)


def draw_lengths(count, seed):
    """Positions of clips of 1 to 15 s at 12.5 frames/s, with some four text tokens per second of speech."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(1, 15, count) if seed % 2 else np.clip(rng.lognormal(1.5, 0.5, count), 1, 15)
    frames = np.round(seconds * 12.5).astype(int) + 1
    return frames + np.round(seconds * rng.normal(4, 0.3, count)).astype(int) + 5, frames


@pytest.mark.parametrize("max_tokens", [640, 1024, 16384])
@pytest.mark.parametrize("rows", [10, 14, 40, 200])
def test_rows_are_all_nearly_full_and_a_frame_weighs_alike_in_each(max_tokens, rows):
    for seed in range(20 if rows * max_tokens < 10**6 else 2):
        lengths, frames = draw_lengths(100_000 if rows * max_tokens > 10**6 else 15_000, seed)
        lengths = lengths[: np.searchsorted(lengths.cumsum(), rows * max_tokens * 0.97)]
        packed = pack_epoch(lengths, np.arange(len(lengths)), max_tokens, np.random.default_rng(seed))
        filled = np.array([lengths[row].sum() for row in packed])
        assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
        assert 0.8 * max_tokens <= filled.min() and filled.max() <= max_tokens
        heard = [frames[row].sum() for row in packed]
        assert max(heard) / min(heard) <= 1.2 and -(-filled.sum() // max_tokens) <= len(packed) <= 1.15 * rows


@pytest.mark.parametrize("max_tokens", [640, 1024, 16384])
def test_few_rows_differ_by_one_clip_at_most(max_tokens):
    for count in range(1, 24):
        lengths = draw_lengths(count, count)[0]
        packed = pack_epoch(lengths, np.arange(count), max_tokens, np.random.default_rng(0))
        filled = [lengths[row].sum() for row in packed]
        assert max(filled) - min(filled) <= lengths.max() * (len(filled) > 1)
        assert len(filled) >= -(-lengths.sum() // max_tokens)


def test_a_million_clips_are_packed_in_seconds():
    lengths, start = draw_lengths(10**6, 0)[0], time.monotonic()
    assert len(pack_epoch(lengths, np.arange(10**6), 1024, np.random.default_rng(0))) > 50_000
    assert time.monotonic() - start < 20


def test_a_clip_longer_than_the_models_context_is_set_aside_however_long_a_row_is(base, tmp_path):
    rows = make_rows((9, 2100, 14))
    clips = read_clips(rows, base[1], 4096, 25.0, 2048)
    assert clips.usable.tolist() == [0, 2] and "the model's context is 2048" in clips.set_aside[0]["reason"]
    with pytest.raises(TrainingError, match="context is 2048 positions.*: cut the clips"):
        read_clips(rows[1:2], base[1], 4096, 25.0, 2048)
    model = add_adapter(load_base("models/csm-mini", "cpu")[0], 4, 8, 0.0)
    train_model(model, base[1], rows, rows[:1], tmp_path, Recipe(1, max_tokens=4096))
    assert len(read_json(tmp_path / "set_aside.json")) == 1


def test_a_clip_longer_than_a_row_is_listed_and_the_others_go_on(base, rows):
    clips = read(rows, base[1], 40)
    assert len(clips.usable) + len(clips.set_aside) == 3 and "a row holds 40" in clips.set_aside[0]["reason"]
    with pytest.raises(TrainingError, match="raise max_tokens"):
        read(rows, base[1], 10)


def test_the_end_of_speech_is_always_labelled(base, rows):
    model, processor = base
    batch = batch_clips(read(rows, processor), range(3), depth_ratio=0.0)
    labels = build_inputs(model, batch)["labels"]
    for row in range(len(rows)):
        assert labels[row, :, 0][labels[row, :, 0] != -100][-1] == 0
    assert (labels[..., 0] != -100).sum() == sum(len(row["codes"]) + 1 for row in rows)


@pytest.mark.parametrize(("lengths", "ratio"), [((7,), 1.0), ((9,) * 8, 0.0)], ids=["every frame", "one of each"])
def test_as_many_depth_frames_as_codebooks_do_not_stop_the_training(base, lengths, ratio):
    model, processor = base
    batch = batch_clips(read(make_rows(lengths), processor), range(len(lengths)), ratio)
    assert int(batch["depth_frames"].sum()) == 7
    assert torch.isfinite(compute_loss(model, batch).loss)


def test_stored_codes_give_the_loss_of_the_stock_path(base):
    """The same clip through the processor with audio, encoded inside the forward, as transformers' own recipe has it."""
    model, processor = base
    wav = (0.1 * np.sin(np.arange(24_000) * 0.05)).astype(np.float32)
    codes = model.codec_model.encode(torch.from_numpy(wav)[None, None]).audio_codes[0].T.numpy().astype(np.uint16)
    lengths = {"kernel_sizes": [960], "strides": [960], "dilations": [1], "use_causal_conv": True}
    stock = processor(
        text="<|begin_of_text|>[0]Hei du.<|end_of_text|><|AUDIO|><|audio_eos|>", audio=wav, output_labels=True,
        return_tensors="pt", sampling_rate=24_000, encoded_length_kwargs=lengths,
    )
    with torch.no_grad():
        theirs = model(**stock)
        ours = compute_loss(model, batch_clips(read([{"text": "Hei du.", "speaker_id": "0", "codes": codes}], processor), [0]))
    assert ours.backbone_loss.item() == pytest.approx(theirs.backbone_loss.item(), rel=1e-4)
    assert ours.depth_decoder_loss.item() == pytest.approx(theirs.depth_decoder_loss.item(), rel=1e-4)


def test_training_lowers_the_loss_and_moves_only_the_adapter(rows, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = add_adapter(model, 4, 8, 0.0, mlp=True)
    history = train_model(model, processor, rows, rows, tmp_path, Recipe(6, lr=5e-3, depth_ratio=0.5))
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert losses[-1] < losses[0] and history[-1]["step"] == 6
    after = model.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logged = read_log(tmp_path)
    assert {"backbone_loss", "depth_loss", "grad_norm", "learning_rate"} <= logged[1].keys()


def test_gradient_checkpointing_changes_no_gradient(rows):
    gradients = []
    for gradient_checkpointing in (False, True):
        model, processor = adapted("lora")
        prepare_model(model, Recipe(1, gradient_checkpointing=gradient_checkpointing)).train()
        compute_loss(model, batch_clips(read(rows, processor), range(3))).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        restore_model(model)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_leaves_no_hook():
    model = adapted("lora")[0]

    def count():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = count()
    prepare_model(model, Recipe(1, gradient_checkpointing=True))
    restore_model(model)
    assert count() == before


def test_every_step_has_a_learning_rate_that_warms_up_to_its_peak(base, rows, tmp_path):
    model = add_adapter(load_base("models/csm-mini", "cpu")[0], 4, 8, 0.0)
    history = train_model(model, base[1], rows, rows, tmp_path, Recipe(20, lr=1e-3, log_every=1, schedule="linear"))
    rates = [row["learning_rate"] for row in history if "loss" in row]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (1 - i / 19) for i in range(1, 19))])


@pytest.mark.parametrize(("capability", "fast"), [(7, False), (8, True), (9, True)], ids=["T4", "A100", "H100"])
def test_a_gpu_that_imitates_bfloat16_does_not_count_as_fast_in_it(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    assert has_fast_bfloat16("cuda") == has_fast_bfloat16("cuda:1") == fast


def test_one_gpu_is_used_where_several_are_seen_and_nothing_launched_more(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = trainer.build_arguments(tmp_path, Recipe(1), "cuda")
    assert arguments.n_gpu == 1 and arguments.parallel_mode.value == "not_parallel"
    assert arguments.ddp_find_unused_parameters is False


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_clips(rows, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0.*Jeg vet ikke"):
        train_model(model, processor, rows, rows, tmp_path, Recipe(2))


@pytest.mark.parametrize("seed", range(3))
def test_a_training_that_explodes_or_dies_stops_and_names_the_last_good_checkpoint(tmp_path, seed):
    model, processor = load_base("models/csm-mini", "cpu")
    torch.manual_seed(seed)
    model = add_adapter(model, 4, 8, 0.0, mlp=True)
    texts = ["Hei du.", "Kom hit nå!"]
    codes = encode(load_codec("models/csm-mini"), [speak_text(text, "en", VOICES[0]) for text in texts])
    rows = [{"text": t, "speaker_id": VOICES[0].speaker_id, "codes": c} for t, c in zip(texts, codes, strict=True)]
    recipe = Recipe(40, save_every=1)
    object.__setattr__(recipe, "lr", 1000.0)  # no recipe takes it; what explodes by other means has to be caught too
    with pytest.raises(TrainingError, match=r"step \d+.*checkpoint-\d"):
        train_model(model, processor, rows, rows, tmp_path, recipe)
    assert list_checkpoints(tmp_path)


def test_a_checkpoint_without_its_marker_is_ignored_and_only_the_newest_are_kept(tmp_path):
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}", {"step": step})
    (tmp_path / "checkpoint-12").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 10]
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_a_checkpoint_carries_the_held_out_loss_of_its_own_step_or_none(base, rows, tmp_path):
    model, processor = add_adapter(load_base("models/csm-mini", "cpu")[0], 4, 8, 0.0), base[1]
    history = train_model(model, processor, rows, rows, tmp_path, Recipe(2, eval_every=2, save_every=1))
    losses = [read_json(folder / "complete.json").get("eval_loss") for _, folder in list_checkpoints(tmp_path)]
    assert losses == [None, history[-1]["eval_loss"]]


def test_a_training_that_was_done_is_not_done_again_and_has_the_same_history(base, rows, tmp_path):
    recipe, histories = Recipe(3, log_every=1), []
    for _ in range(2):
        torch.manual_seed(0)
        model = add_adapter(load_base("models/csm-mini", "cpu")[0], 4, 8, 0.0)
        histories.append(train_model(model, base[1], rows, rows, tmp_path, recipe))
        weights = {name: value.clone() for name, value in model.state_dict().items() if "lora_B" in name}
    assert histories[0] == histories[1] and all(value.abs().max() > 0 for value in weights.values())


def test_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(rows, tmp_path, monkeypatch):
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0)

    def save(model, folder, real=checkpoints.save_weights):
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device")
        real(model, folder)

    monkeypatch.setattr(trainer, "save_weights", save)
    with pytest.raises(TrainingError, match="step 4 can not be written.*checkpoint-2"):
        train_model(model, processor, rows, rows, tmp_path, Recipe(6, save_every=2))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


KILLED = """
import sys, torch
sys.path[:0] = {tests!r}
from test_train import make_rows
from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import load_base
from csm_nb.recipe import Recipe
from csm_nb.train.trainer import train_model
torch.manual_seed(0)
model, processor = load_base("models/csm-mini", "cpu")
model = add_adapter(model, 4, 8, 0.1)
rows = make_rows((9, 21, 14, 30, 12, 17))
train_model(model, processor, rows, rows[:2], sys.argv[1], Recipe(24, max_tokens=96, depth_ratio=0.5, save_every=4, log_every=1))
"""


def test_a_killed_training_goes_on_with_the_numbers_of_one_that_was_not(tmp_path):
    command = [sys.executable, "-c", KILLED.format(tests=[str(ROOT / "tests"), os.path.dirname(__file__)])]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(tmp_path / "killed")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "goes on from checkpoint-" in again.stdout
    keys = ("step", "loss", "eval_loss", "grad_norm")
    losses = [[[row.get(key) for key in keys] for row in read_log(tmp_path / name) if "train_loss" not in row]
              for name in ("whole", "killed")]
    assert losses[0] == losses[1] and losses[0][-1][0] == 24


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


WORKER = """
import json, sys, torch
sys.path[:0] = {tests!r}
from test_train import make_rows
from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import load_base
from csm_nb.recipe import Recipe
from csm_nb.train.trainer import train_model
torch.set_num_threads(1)
rows = make_rows((9, 21, 14, 30, 12, 17))
for weight in (0.0, 10.0):
    torch.manual_seed(0)
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0)
    recipe = Recipe(4, max_tokens=96, batch_size=int(sys.argv[2]), depth_ratio=1.0, log_every=1, text_weight=weight)
    train_model(model, processor, rows, make_rows((60, 50, 55)), sys.argv[1] + f"/{{weight:.0f}}", recipe)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory):
    """The folders of the same trainings by one process (rows two by two) and by two, at text_weight 0 and 10."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=[str(ROOT / "tests"), os.path.dirname(__file__)]))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable, script, folder / "one", "2"], [*launch, script, folder / "two", "1"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.parametrize("text_weight", ["0", "10"])
def test_two_processes_have_the_loss_of_one(one_and_two_processes, text_weight):
    losses = [[row["loss"] for row in read_log(folder / text_weight) if "loss" in row] for folder in one_and_two_processes]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("text_weight", ["0", "10"])
def test_held_out_rows_count_once_however_many_processes_there_are(one_and_two_processes, text_weight):
    one, two = ([row for row in read_log(folder / text_weight) if "eval_loss" in row] for folder in one_and_two_processes)
    for key in ("eval_loss", "eval_backbone_loss", "eval_depth_loss"):  # of three rows, one process has one twice
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-6)


def test_a_recipe_takes_what_concerns_it_from_a_runs_parameters():
    recipe = read_recipe({"recipe": {"steps": 7, "lr": 1e-3, "max_tokens": 99}, "seed": 5, "clips": 3})
    assert (recipe.steps, recipe.lr, recipe.max_tokens, recipe.seed) == (7, 1e-3, 99, 5)


def test_no_clips_is_an_error_that_says_so(base):
    with pytest.raises(TrainingError, match="no clip"):
        read([], base[1])


def test_no_sentence_is_both_trained_on_and_held_out():
    sentences = make_sentences("no", 90, split="train") + make_sentences("no", 10, split="validation")
    rows = [{"text": sentences[i % 100], "speaker_id": "0"} for i in range(200)]
    kept, held_out, how = split_rows(rows)
    assert len(kept) + len(held_out) == 200 and "too few" in how
    assert not {r["text"] for r in kept} & {r["text"] for r in held_out}


def test_with_many_speakers_some_are_held_out_and_their_sentences_with_them():
    rows = [{"text": f"{i % 150}", "speaker_id": str(i % 20)} for i in range(300)]
    kept, held_out, how = split_rows(rows)
    assert not {r["speaker_id"] for r in kept} & {r["speaker_id"] for r in held_out}
    assert not {r["text"] for r in kept} & {r["text"] for r in held_out}
    assert "2 held-out speakers of 20" in how


def test_too_few_sentences_to_hold_one_out_is_an_error():
    with pytest.raises(TrainingError, match="held out"):
        split_rows([{"text": "Hei.", "speaker_id": "0"}] * 5)
