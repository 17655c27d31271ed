"""The loss has the right scale, sees each clip alone, and learns to stop."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from csm_nb.csm import add_adapter, load_base
from csm_nb.texts import make_sentences
from csm_nb.train import (
    TrainingError,
    build_examples,
    build_inputs,
    collate,
    compute_loss,
    describe_history,
    split_rows,
    train_adapter,
)


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    texts = ["Hei du.", "Jeg vet ikke hva det er.", "Kom hit nå!"]
    return [{"text": text, "speaker_id": "0", "codes": rng.integers(1, 512, (frames, 8), dtype=np.uint16)}
            for text, frames in zip(texts, (9, 21, 14), strict=True)]


def test_depth_loss_is_a_mean_over_codes_and_not_a_sum(base, rows):
    model, processor = base
    batch = collate(build_examples(rows, processor))
    with torch.no_grad():
        output = compute_loss(model, batch)
    labels = batch["codes"][batch["depth_frames"]][:, 1:]
    expected = cross_entropy(output.depth_decoder_logits.flatten(0, 1).float(), labels.flatten())
    assert output.depth_decoder_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_loss_does_not_depend_on_the_size_of_the_batch(base, rows):
    model, processor = base
    examples = build_examples(rows, processor)
    with torch.no_grad():
        once, twice = compute_loss(model, collate(examples)).loss, compute_loss(model, collate(examples * 2)).loss
    assert once.item() == pytest.approx(twice.item(), rel=1e-5)


def test_padding_and_neighbours_change_nothing(base, rows):
    model, processor = base
    examples = build_examples(rows, processor)
    with torch.no_grad():
        together = compute_loss(model, collate(examples))
        alone = [compute_loss(model, collate([example])) for example in examples]
    frames = [len(example["codes"]) for example in examples]
    for name in ("backbone_loss", "depth_decoder_loss"):
        mean = np.average([getattr(output, name).item() for output in alone], weights=frames)
        assert getattr(together, name).item() == pytest.approx(mean, rel=1e-4)


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
        ours = compute_loss(model, collate(build_examples([{"text": "Hei du.", "speaker_id": "0", "codes": codes}], processor)))
    assert ours.backbone_loss.item() == pytest.approx(theirs.backbone_loss.item(), rel=1e-4)
    assert ours.depth_decoder_loss.item() == pytest.approx(theirs.depth_decoder_loss.item(), rel=1e-4)


def test_the_end_of_speech_is_always_labelled(base, rows):
    model, processor = base
    batch = collate(build_examples(rows, processor), depth_ratio=0.0)
    labels = build_inputs(model, batch)["labels"]
    for row in range(len(rows)):
        last = labels[row][labels[row, :, 0] != -100][-1]
        assert last.tolist() == [0] * 8
    assert batch["depth_frames"].sum() == len(rows)


@pytest.mark.parametrize(("lengths", "ratio"), [((7,), 1.0), ((9,) * 8, 0.0)], ids=["every frame", "only the ends"])
def test_as_many_depth_frames_as_codebooks_do_not_stop_the_training(base, lengths, ratio):
    model, processor = base
    rows = [{"text": "Hei du.", "speaker_id": "0", "codes": np.full((frames, 8), 5, np.uint16)} for frames in lengths]
    batch = collate(build_examples(rows, processor), ratio)
    assert abs(int(batch["depth_frames"].sum()) - 8) == 1
    assert torch.isfinite(compute_loss(model, batch).loss)


def test_depth_frames_are_drawn_anew_in_training_and_fixed_with_a_generator(base, rows):
    examples = build_examples(rows, base[1])
    draws = [collate(examples, 0.5)["depth_frames"] for _ in range(8)]
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])
    fixed = [collate(examples, 0.5, torch.Generator().manual_seed(3))["depth_frames"] for _ in range(2)]
    assert torch.equal(*fixed)


def test_training_lowers_the_loss_and_moves_only_the_adapter(rows, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = add_adapter(model, 4, 8, 0.0, mlp=True)
    history = train_adapter(model, processor, rows, rows, tmp_path, steps=6, lr=5e-3, batch_size=3, depth_ratio=0.5)
    summary = describe_history(history)
    assert summary["verdict"] == "learned" and summary["steps"] == 6
    after = model.unload().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_no_number_stops_with_the_step(rows, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0"):
        train_adapter(model, processor, rows, rows, tmp_path, steps=2)


def test_no_clips_is_an_error_that_says_so(base):
    with pytest.raises(TrainingError, match="no clip"):
        build_examples([], base[1])


def test_no_sentence_is_both_trained_on_and_held_out():
    sentences = make_sentences("no", 90, split="train") + make_sentences("no", 10, split="held_out")
    rows = [{"text": sentences[i % 100]} for i in range(200)]
    train, held_out = split_rows(rows)
    assert len(train) + len(held_out) == 200
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}


def test_too_few_sentences_to_hold_one_out_is_an_error():
    with pytest.raises(TrainingError, match="held out"):
        split_rows([{"text": "Hei."}] * 5)
