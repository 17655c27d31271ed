"""Batched generation says what one sentence at a time says, ends, and is reproducible."""

import numpy as np
import pytest

from csm_nb.csm import load_base
from csm_nb.speak import generate_codes, speak

TEXTS = ["The cat is here.", "My brother buys a big red house.", "Where are you?"]


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


def test_greedy_codes_are_those_of_transformers_generate(base):
    model, processor = base
    inputs = processor(f"<|begin_of_text|>[0]{TEXTS[0]}<|end_of_text|>", return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=15, do_sample=False, depth_decoder_do_sample=False)[0].numpy()
    ours, _ = generate_codes(model, processor, TEXTS[:1], ["0"], 0.0, 1, None)[0]
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
