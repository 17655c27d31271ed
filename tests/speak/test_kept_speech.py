"""What a model said is kept by what it was made of: other weights, voice, seed or code speak anew, and nothing else does."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft.tuners.lora import LoraLayer

from csm_nb import paths
from csm_nb.csm.adapters import add_adapter, load_adapter, remove_adapters
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter
from csm_nb.keep import Keep
from csm_nb.speak import generate
from csm_nb.speak.voice import describe_speech, hash_model

TEXTS = ["The cat is here.", "Where are you?", "Good morning."]


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


@pytest.fixture
def spoken(monkeypatch):
    """The texts that were generated, one list per batch."""
    batches, texts, make_utterance, say = [], [], generate.make_utterance, generate.say

    def note(decoders, inner, processor, text, *more):
        texts.append(text)
        return make_utterance(decoders, inner, processor, text, *more)

    def count(*asked):
        batches.append(texts.copy())
        texts.clear()
        return say(*asked)

    monkeypatch.setattr(generate, "make_utterance", note)
    monkeypatch.setattr(generate, "say", count)
    return batches


def ask(base, data, texts=TEXTS, **more):
    return generate.speak(*base, texts, keep=Keep(data), **more)


def is_same(said, other):
    return all(np.array_equal(a.codes, b.codes) and np.array_equal(a.wav, b.wav) and a.ended == b.ended and a.text == b.text
               and a.codes.dtype == b.codes.dtype for a, b in zip(said, other, strict=True))


def test_what_was_said_is_found_again_to_the_last_bit_and_only_what_is_missing_is_spoken(base, spoken, tmp_path):
    first = ask(base, tmp_path, TEXTS[:2])
    again = ask(base, tmp_path, TEXTS[::-1])
    assert spoken == [["Where are you?", "The cat is here."], ["Good morning."]]
    assert is_same(again[::-1][:2], first) and is_same(again, generate.speak(*base, TEXTS[::-1]))


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.7}, {"top_k": 29}, {"top_p": 0.9}, {"speaker_ids": "1"},
                                   {"context": [("Hi.", np.ones((3, 8), np.uint16), "0")]}],
                         ids=lambda other: next(iter(other)))
def test_another_seed_voice_or_setting_speaks_anew(base, spoken, tmp_path, other):
    ask(base, tmp_path)
    ask(base, tmp_path, **other)
    ask(base, tmp_path, **other)
    assert len(spoken) == 2


def make_adapter(seed=0):
    model, _ = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0, text_embeddings=True, seed=seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    return model


def test_an_adapter_edited_in_one_tensor_and_a_base_edited_in_one_speak_anew(base, spoken, tmp_path):
    model = make_adapter()
    for edited in (None, "lora_B", "modules_to_save", "lm_head"):
        with torch.no_grad():
            for name, value in model.named_parameters():
                if edited and edited in name:
                    value.view(-1)[0] += 0.01
                    break
        ask((model, base[1]), tmp_path)
    assert len(spoken) == 4
    ask((model, base[1]), tmp_path)
    assert len(spoken) == 4


def test_an_adapter_is_the_same_under_every_name_trained_or_loaded_and_beside_others(tmp_path):
    plain = hash_model(load_base("models/csm-mini", "cpu")[0])
    trained = [make_adapter(seed) for seed in (0, 1)]
    hashes = [hash_model(model) for model in trained]
    with trained[0].disable_adapter():
        assert hash_model(trained[0]) == plain
    folders = [save_adapter(model, tmp_path / f"lora_{number}") for number, model in enumerate(trained)]
    worn = load_adapter(load_base("models/csm-mini", "cpu")[0], folders[0], name="adapter_no")
    assert hash_model(worn) == hashes[0]
    worn = load_adapter(worn, folders[1], name="adapter_sv")
    assert hash_model(worn) == hashes[1] and len({plain, *hashes}) == 3
    worn.set_adapter("adapter_no")
    assert hash_model(worn) == hashes[0]
    for module in worn.modules():
        if isinstance(module, LoraLayer):
            module.scaling["adapter_no"] *= 2
    assert hash_model(worn) != hashes[0] and hash_model(remove_adapters(worn)) == plain


@pytest.mark.parametrize(("file", "old", "new", "moves"), [
    ("speak/generate.py", "ON_TOP = 0.15, 1.0", "ON_TOP = 0.15, 2.0", True),
    ("csm/load.py", "CONTEXT = 2048", "CONTEXT = 1024", True),
    ("speak/generate.py", '"""Generation: ', '"""Generating: ', False), ("codec/mimi.py", '"cuda": 60', '"cuda": 61', False),
    ("judge/intervals.py", "CLEAR_LOW = 0.9", "CLEAR_LOW = 0.8", False), ("keep.py", "LOOK = 0.2", "LOOK = 0.3", False),
])  # fmt: skip
def test_the_code_that_speaks_counts_and_no_other(base, tmp_path, monkeypatch, file, old, new, moves):
    package = shutil.copytree(ROOT / "csm_nb", tmp_path / "csm_nb", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "PACKAGE", package)
    before = describe_speech(base[0], {})
    text = (package / file).read_text(encoding="utf-8")
    assert old in text
    (package / file).write_text(text.replace(old, new), encoding="utf-8")
    assert (describe_speech(base[0], {}) != before) is moves
