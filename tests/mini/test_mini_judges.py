"""The two small judges: the shipped folders judge unheard speech, and their recipe is what it says."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.mini import judges, loop
from csm_nb.mini.evaluate import speak_held_out
from csm_nb.mini.judges import CODES, JUDGE_RATE
from csm_nb.paths import ROOT
from csm_nb.synth.corpus import HELD_OUT_VOICES
from csm_nb.synth.espeak import speak_text
from csm_nb.text.normalise import character_error_rates, normalise_text
from csm_nb.text.sentences import make_sentences, split_of

torch.set_num_threads(1)
ASR, LID = "automatic-speech-recognition", "audio-classification"


def hear(name: str, task: str, wavs):
    folder = ROOT / "models" / name
    judge = pipeline(task, str(folder))
    return [judge({"raw": resample(wav, SAMPLE_RATE, JUDGE_RATE), "sampling_rate": JUDGE_RATE}) for wav in wavs]


@pytest.fixture(scope="module")
def held_out():
    return {code: speak_held_out(code, HELD_OUT_VOICES, 4, seed=5) for code in CODES}


def test_asr_mini_reads_held_out_sentences_of_unheard_voices(held_out):
    pairs = [pair for clips in held_out.values() for pair in clips]
    heard = hear("asr-mini", ASR, [wav for _, wav in pairs])
    errors = [character_error_rates([text], [answer["text"]], code)[0] for (text, _), answer, code in
              zip(pairs, heard, np.repeat(list(held_out), 4), strict=True)]
    # a shuffled answer scores about 0.8; anything that listens is far below half of that
    assert np.mean(errors) < 0.4


def test_lid_mini_tells_ten_languages_apart(held_out):
    pairs = [(code, wav) for code, clips in held_out.items() for _, wav in clips]
    heard = hear("lid-mini", LID, [wav for _, wav in pairs])
    right = [answers[0]["label"] == code for (code, _), answers in zip(pairs, heard, strict=True)]
    assert np.mean(right) > 0.7  # chance is 0.1


def test_lid_mini_goes_by_the_sound_and_not_by_the_words():
    texts = make_sentences("da", 8, seed=5, split="test")
    heard = hear("lid-mini", LID, [speak_text(text, "en", HELD_OUT_VOICES[0]) for text in texts])
    assert sum(answers[0]["label"] == "en" for answers in heard) >= 6


def test_silence_at_the_start_does_not_change_the_language(held_out):
    wavs = [clips[0][1] for clips in held_out.values()]
    plain = hear("lid-mini", LID, wavs)
    late = hear("lid-mini", LID, [np.pad(wav, (SAMPLE_RATE // 4, 0)) for wav in wavs])
    assert sum(a[0]["label"] == b[0]["label"] for a, b in zip(plain, late, strict=True)) >= 9


def test_shipped_weights_load_in_full_precision_and_stay_small():
    for name, task, limit in (("asr-mini", ASR, 7.0), ("lid-mini", LID, 3.0)):
        weights = ROOT / "models" / name / "model.safetensors"
        assert weights.stat().st_size <= limit * 1e6
        assert pipeline(task, str(weights.parent)).model.dtype == torch.float32


def test_training_features_equal_the_extractor_s():
    rng = np.random.default_rng(0)
    for samples in (16000, 23456, 40001):
        wav = (rng.standard_normal(samples) * np.linspace(0.001, 0.1, samples)).astype(np.float32)
        want = judges.EXTRACTOR(wav, sampling_rate=JUDGE_RATE, return_tensors="pt")["input_features"][0]
        got = judges.extract_features(wav)
        assert abs(len(want) - len(got)) <= 1
        torch.testing.assert_close(got, want[: len(got)], atol=1e-3, rtol=1e-3)


def test_degraded_clips_keep_their_length_and_differ_by_draw_only():
    wav = speak_text("a quiet morning", "en")
    one, again, other = (judges.degrade(wav, np.random.default_rng(seed), silence=0.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert len(one) != len(other) or not np.allclose(one, other)
    for clip in (one, other):
        assert 0.9 < len(clip) / JUDGE_RATE / (len(wav) / SAMPLE_RATE) < 1.1
        assert np.isfinite(clip).all() and np.sqrt(np.mean(clip**2)) > 0.01


def test_training_hears_neither_held_out_voices_nor_held_out_sentences(monkeypatch):
    heard = {voice.variant for voice in HELD_OUT_VOICES}
    assert heard.isdisjoint(judges.VARIANTS)
    monkeypatch.setattr(judges, "SENTENCES", 50)
    for code, sentences in judges.load_sentences(0).items():
        assert {split_of(" ".join(words)) for words in sentences} == {"train"}, code


def test_every_character_of_the_sentences_has_a_token(tmp_path):
    tokenizer = judges.make_tokenizer(tmp_path)
    for code in CODES:
        letters = set("".join(normalise_text(text) for text in make_sentences(code, 300, seed=3))) - {" "}
        assert letters <= set(tokenizer.get_vocab()), (code, sorted(letters - set(tokenizer.get_vocab())))


@pytest.mark.parametrize("train", [judges.train_asr, judges.train_lid], ids=["asr", "lid"])
def test_killed_recipe_goes_on_and_saves_a_folder_that_loads(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judges, "SENTENCES", 30)
    settings = {"hidden": 16, "layers": 1, "work": tmp_path / "work"}
    if train is judges.train_lid:
        settings["start"] = None
    fit, calls = loop.fit, []

    def killed(modules, compute_loss, *args, **kwargs):
        def dies(rng, done):
            calls.append(done)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return compute_loss(rng, done)

        return fit(modules, dies, *args, **kwargs, save_every_seconds=0.0)

    monkeypatch.setattr(judges, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", minutes=5, **settings)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(judges, "fit", fit)
    used = torch.load(tmp_path / "work/checkpoint.pt")["progress"]["seconds"]
    out = train(tmp_path / "out", minutes=(used + 1) / 60, **settings)
    assert "goes on from step 5" in capsys.readouterr().out
    noise = np.random.default_rng(0).standard_normal(8000)
    judge = pipeline(ASR if train is judges.train_asr else LID, str(out))
    assert judge({"raw": noise, "sampling_rate": JUDGE_RATE})


def test_language_judge_without_a_recogniser_to_begin_with_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_asr"):
        judges.train_lid(tmp_path / "lid-mini", minutes=1, work=tmp_path / "work")
