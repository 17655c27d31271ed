"""The self-check passes on models that are right, and each check fails when its property is broken."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.models.csm import modeling_csm

from csm_nb import attention, train
from csm_nb.batches import pack_row, read_clips
from csm_nb.csm import add_adapter, load_base, train_fully
from csm_nb.languages import LANGUAGES
from csm_nb.prove import WAYS_OUT, ProofError, prove_model

TEXTS = ["Jeg så på øya.", "Vær så snill!"]


@pytest.fixture
def base():
    return load_base("models/csm-mini", "cpu")


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: add_adapter(model, 4, 8, 0.1), train_fully],
                         ids=["base", "lora", "full"])
def test_a_model_that_is_right_passes_and_is_left_as_it_was(base, prepare):
    model, processor = prepare(base[0]), base[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    model.train()
    table = prove_model(model, processor, TEXTS)
    assert table.holds.all() and set(table.index) <= WAYS_OUT.keys()
    assert (len(table) == len(WAYS_OUT)) == any(p.requires_grad for p in model.parameters())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_probes_of_every_language_survive_the_tokenizer(base):
    for language in LANGUAGES.values():
        found = prove_model(*base, language.probes).found["text survives the tokenizer"]
        assert found == f"{len(language.probes)} of {len(language.probes)}"


def test_tables_that_are_two_are_refused_with_what_to_do(base):
    table = base[0].depth_decoder.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)
    with pytest.raises(ProofError, match="codebook tables are one.*load with csm.load_base"):
        prove_model(*base)


def test_a_depth_loss_divided_by_frames_instead_of_codes_is_refused(base, monkeypatch):
    forward = type(base[0]).forward  # what the Trainer's count of frames makes of transformers' own loss

    def scaled(self, *args, **kwargs):
        labels = kwargs["labels"]
        return forward(self, *args, **kwargs, num_items_in_batch=(labels[..., 0] != -100).sum())

    monkeypatch.setattr(type(base[0]), "forward", scaled)
    with pytest.raises(ProofError, match=r"depth loss is a mean \(found: .*: 7.00 times\)"):
        prove_model(*base)


def test_an_end_of_speech_that_is_not_labelled_is_refused(base, monkeypatch):
    build = train.build_inputs

    def without_end(model, batch):
        inputs = build(model, batch)
        inputs["labels"][0, batch["is_frame"][0].nonzero()[-1, 0]] = -100
        return inputs

    monkeypatch.setattr(train, "build_inputs", without_end)
    with pytest.raises(ProofError, match=r"end of speech is labelled \(found: in 1 of 2"):
        prove_model(*base)


def test_an_adapter_by_bare_names_is_refused_because_it_sits_on_the_codec(base):
    model = get_peft_model(base[0], LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ProofError, match=r"not trained: codec \(found: .*codec_model"):
        prove_model(model, base[1])


def test_a_frozen_decoder_is_refused(base):
    model = train_fully(base[0])
    model.depth_decoder.requires_grad_(False)
    with pytest.raises(ProofError, match="gradients reach the depth decoder.*frozen") as refused:
        prove_model(model, base[1])
    assert "gradients reach the backbone" not in str(refused.value)


def test_a_tokenizer_that_loses_letters_is_refused_with_the_text(base):
    with pytest.raises(ProofError, match=r"text survives the tokenizer \(found: 'Привет' came back as"):
        prove_model(*base, ["Hei.", "Привет"])


def attend_to_the_whole_row(module, query, key, value, mask, scaling, position_ids=None, **kwargs):
    return attention.attend_by_clip(module, query, key, value, mask, scaling)  # no positions: where clips begin is not told


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: add_adapter(model, 4, 8, 0.1)], ids=["base", "lora"])
def test_clips_that_see_each_other_in_a_packed_row_are_refused(base, prepare, monkeypatch):
    model = prepare(base[0])
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, attend_to_the_whole_row)
    with pytest.raises(ProofError, match="clips do not see each other.*position_ids that restart") as refused:
        prove_model(model, base[1])
    assert str(refused.value).count("found:") == 1


def test_clips_are_apart_under_the_mask_of_a_gpu_too(base, monkeypatch):
    monkeypatch.setattr("csm_nb.prove.use_attention", lambda model, training: None)  # sdpa, as it was loaded
    assert prove_model(*base).loc["clips do not see each other"].found.startswith("logits of the next clip move by 0,")
    monkeypatch.setattr(modeling_csm, "create_causal_mask", lambda **kwargs: None)  # causal over the whole row
    with pytest.raises(ProofError, match="clips do not see each other"):
        prove_model(*base)


def test_positions_that_run_on_are_refused(base, monkeypatch):
    def run_on(clips, indices, *args):
        row = pack_row(clips, indices, *args)
        return row | {"position_ids": torch.arange(len(row["position_ids"]))}

    monkeypatch.setattr("csm_nb.prove.pack_row", run_on)
    with pytest.raises(ProofError, match=r"positions restart in each clip \(found: the second clip begins at [1-9]"):
        prove_model(*base)


def test_a_clip_beyond_the_context_that_is_not_set_aside_is_refused(base, monkeypatch):
    monkeypatch.setattr(train, "read_clips", lambda *args: read_clips(*args[:4]))
    with pytest.raises(ProofError, match=r"no clip is beyond the context \(found: a clip of 2048 frames"):
        prove_model(*base)
