"""Batched generation says what one sentence at a time says, ends, and is reproducible."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from csm_nb.csm.adapters import load_adapter, start_training
from csm_nb.csm.load import load_base
from csm_nb.csm.record import set_record
from csm_nb.csm.save import save_adapter
from csm_nb.speak.batch import Sampler
from csm_nb.speak.generate import SpeechError, cap_seconds, speak
from csm_nb.text.sentences import make_sentences

TEXTS = ["The cat is here.", "My brother buys a big red house.", "Where are you?"]


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


def test_greedy_codes_are_those_of_transformers_generate(base):
    model, processor = base
    inputs = processor(f"<|begin_of_text|>[0]{TEXTS[0]}<|end_of_text|>", return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=15, do_sample=False, depth_decoder_do_sample=False)[0].numpy()
    ours = speak(model, processor, TEXTS[:1], temperature=0)[0].codes
    shared = min(len(ours), len(theirs))
    assert shared > 3
    assert np.array_equal(ours[:shared], theirs[:shared])


def test_a_batch_says_what_single_sentences_say(base):
    model, processor = base
    together = speak(model, processor, TEXTS, temperature=0.0)
    for text, speech in zip(TEXTS, together, strict=True):
        alone = speak(model, processor, [text], temperature=0.0)[0]
        assert np.array_equal(alone.codes, speech.codes)
        assert alone.ended == speech.ended


def test_an_utterance_says_the_same_alone_in_four_and_in_32_in_any_order(base):
    texts = make_sentences("no", 32, 0, "validation")
    together = dict(zip(texts, speak(*base, texts), strict=True))
    backwards = dict(zip(texts[::-1], speak(*base, texts[::-1], batch_size=4), strict=True))
    alone = {text: speak(*base, [text])[0] for text in texts[:8]}
    for said in (backwards, alone):
        for text, speech in said.items():
            assert np.array_equal(speech.codes, together[text].codes) and np.array_equal(speech.wav, together[text].wav)
            assert speech.ended == together[text].ended
    twice = speak(*base, [*texts[:2], texts[0]], ["0", "1", "0"])
    assert np.array_equal(twice[0].codes, twice[2].codes) and not np.array_equal(twice[1].codes, together[texts[1]].codes)


def draw(logits, drawn, top_k, top_p=1.0):
    """Codes drawn beside a row that may draw from more, and another that draws otherwise."""
    settings = torch.tensor([0.7, top_k, top_p])[:, None].repeat(1, len(logits) + 2)
    settings[:, -2:] = torch.tensor([[1.0, 0.3], [5, 2], [1, 0.5]])
    beside = torch.zeros(2, logits.shape[1])
    return Sampler(*settings, logits.shape[1]).draw(torch.cat([logits, beside]), torch.cat([drawn, drawn[:2]]))[:-2]


def test_codes_are_drawn_as_often_as_they_are_likely_and_only_the_likeliest():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5]).repeat(20_000, 1)
    drawn = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits, drawn, 3), minlength=5) / 20_000
    expected = torch.zeros(5)
    expected[[1, 2, 4]] = (torch.tensor([2.0, 1.0, 1.5]) / 0.7).softmax(-1)
    assert torch.allclose(counts, expected, atol=0.01) and counts[[0, 3]].sum() == 0
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits[:2], edges, 3).tolist() == [1, 4] and draw(logits[:2], edges, 5).tolist() == [0, 4]
    nucleus = torch.bincount(draw(logits, drawn, 5, 0.75), minlength=5) / 20_000  # 1: .54, 4: .26, 2: .13, 0 and 3: .07
    assert torch.allclose(nucleus[[1, 4]], (torch.tensor([2.0, 1.5]) / 0.7).softmax(-1), atol=0.01) and nucleus.sum() == 1


def test_the_same_seed_says_the_same_and_another_does_not(base):
    first, again, other = (speak(*base, TEXTS, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a.codes, b.codes) for a, b in zip(first, other, strict=True))


def test_speech_is_as_long_as_its_codes_and_never_passes_its_cap(base):
    model, _ = base
    samples = model.codec_model.config.frame_size
    for speech in speak(*base, TEXTS):
        assert speech.wav.dtype == np.float32
        assert len(speech.wav) == len(speech.codes) * samples
        assert len(speech.codes) <= 25 * (0.15 * len(speech.text) + 1)


def test_a_model_that_never_ends_is_stopped_at_its_cap_and_counted(base, monkeypatch):
    model, processor = base
    monkeypatch.setattr(model.config, "codebook_eos_token_id", -1)
    for text, speech in zip(TEXTS, speak(model, processor, TEXTS), strict=True):
        assert not speech.ended
        assert len(speech.codes) == int(25 * (0.15 * len(text) + 1))


@pytest.mark.parametrize("nothing", ["", "  ", "…", "?!", "–", "Привет"])
def test_a_text_with_nothing_to_say_is_refused_before_anything_is_spoken(base, nothing):
    with pytest.raises(SpeechError, match="nothing to say"):
        speak(*base, [TEXTS[0], nothing])


def test_a_text_that_does_not_fit_the_context_is_refused_with_the_limit(base, monkeypatch):
    model, _ = base
    most = 425  # letters of this model: a position each, 5 around them, and 25 frames for each .15 s and 1 s more
    with pytest.raises(SpeechError, match=r"up to 2053 positions \(431 of text, 1622 frames: 65 s\)"):
        speak(*base, ["a" * (most + 1)])
    with pytest.raises(SpeechError, match="the model has 2048: split it at its sentences"):
        speak(*base, ["1" * 50])  # by what will be said
    monkeypatch.setattr("csm_nb.speak.generate.say", lambda decoders, waiting, slots: [
        replace(one, codes=[[0] * 8], finish="end") for one in waiting])
    assert len(speak(*base, ["a" * most])) == 1


@pytest.mark.parametrize(("text", "words"), [
    ("2026", "dwa tysiące dwadzieścia sześć"), ("77", "siebenundsiebzig"), ("NRKs", "enn err kås"), ("5 %", "fem prosent"),
    ("999999", "novecentonovantanovemilanovecentonovantanove"), ("WC", "double-v c"), ("½", "en halv"), ("C++", "c plus plus"),
])
def test_the_cap_is_by_what_will_be_said(text, words):
    assert cap_seconds(text) >= cap_seconds(words) and cap_seconds(words) == 0.15 * len(words) + 1


def test_nothing_asked_is_nothing_said(base):
    assert speak(*base, []) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("text", [True, False])
def test_base_and_adapter_speak_in_every_dtype_with_a_text_table_and_without(dtype, text, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu", dtype)
    assert speak(model, processor, TEXTS[:1])[0].ended
    model = start_training(model, "lora", None, 4, 8, 0.0, text_embeddings=text)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02)
    assert speak(model, processor, TEXTS[:1])[0].ended  # as SpeakSamples does in the middle of a training
    loaded = load_adapter(load_base("models/csm-mini", "cpu", dtype)[0], save_adapter(model, tmp_path / "lora_en"))
    assert speak(loaded, processor, TEXTS[:1])[0].ended


def test_a_text_is_read_out_where_the_record_says_that_it_was_trained_so(base):
    model, processor = base
    plain = speak(model, processor, ["Take 5 kg.", "Take five kilograms."], temperature=0)
    try:
        set_record(model, read_out=True, language="en")
        said = speak(model, processor, ["Take 5 kg."], temperature=0)[0]
    finally:
        set_record(model, read_out=False)
    assert said.text == "Take 5 kg." and np.array_equal(said.codes, plain[1].codes)
    assert not np.array_equal(said.codes, plain[0].codes)
