"""The self-check passes on models that are right, and each check fails when its property is broken."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from csm_nb import train
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
