"""The recipe of the miniatures: a killed training goes on, the loss hears pitch, and every letter can be read."""

import json

import numpy as np
import pytest
import torch
from transformers import MimiModel

from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_base
from csm_nb.languages import LANGUAGES
from csm_nb.mini import __main__
from csm_nb.mini.base import RESERVED, SPECIAL, build_model, build_processor, reserve_rows
from csm_nb.mini.codec import (
    FRAME,
    SpectralLoss,
    build_codec_config,
    encode_hidden,
    fit_codebooks,
    initialise,
    list_phonemes,
    make_segments,
    random_voice,
)
from csm_nb.mini.loop import describe_training, fit
from csm_nb.paths import ROOT
from csm_nb.phonemes.ipa import to_ipa
from csm_nb.synth.corpus import HELD_OUT_VOICES
from csm_nb.synth.espeak import speak_text
from csm_nb.text.sentences import make_sentences


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    model = MimiModel(build_codec_config())
    initialise(model)
    return model.eval()


def fit_line(work, seconds, die_at=None):
    """Fits a line for so many seconds, and dies at a step if told to; returns the model and what fit returned."""
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(1, 1), []

    def loss(rng, done):
        seen.append(rng.random())
        if len(seen) == die_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 1)
        error = (model(x) - 3 * x).square().mean()
        return error, {"error": error.item()}

    def run():
        return fit({"model": model}, loss, seconds / 60, work, lr=0.05, log_every=2, save_every_seconds=0.0)

    return model, seen, run


def test_a_killed_training_goes_on_with_the_data_it_would_have_seen(tmp_path, capsys):
    _, seen, run = fit_line(tmp_path, 60, die_at=8)
    with pytest.raises(KeyboardInterrupt):
        run()
    used = torch.load(tmp_path / "checkpoint.pt")["progress"]["seconds"]
    model, seen_again, run = fit_line(tmp_path, used + 1)
    result = run()
    assert "goes on from step 7" in capsys.readouterr().out
    assert seen_again[0] == seen[-1]
    assert model.weight.item() == pytest.approx(3, abs=0.2)
    assert [row["step"] for row in result["losses"][:5]] == [2, 4, 6, 8, 10]


def test_a_finished_training_is_not_trained_again(tmp_path):
    _, _, run = fit_line(tmp_path, 0.2)
    first = run()
    _, seen, run = fit_line(tmp_path, 0.2)
    assert run() == first and not seen


def test_the_record_of_a_training_says_what_it_took(tmp_path):
    _, _, run = fit_line(tmp_path, 0.2)
    run()
    _, _, run = fit_line(tmp_path, 0.4)
    record = describe_training(run(), 3)
    assert record["minutes"] == [0.2 / 60, 0.4 / 60] and record["seed"] == 3
    assert record["steps"] > 0 and "threads of" in record["processor"]
    assert json.loads(json.dumps(record)) == record


def test_the_codec_s_loss_hears_pitch_that_mel_losses_miss():
    """The same spectral envelope at another pitch: the harmonic part of the loss must rise with the error."""
    distance, time = SpectralLoss(), torch.arange(24_000) / 24_000

    def tone(hertz):
        return 0.05 * sum(torch.sin(2 * np.pi * hertz * k * time) for k in range(1, 20))[None]

    exact, near, far = (distance(tone(f), tone(120.0))[1].item() for f in (120.0, 123.0, 135.0))
    assert exact == pytest.approx(0, abs=1e-4)
    assert 0.05 < near < far


def test_the_codec_s_loss_hears_the_phase_that_magnitudes_miss():
    """Noise with the spectrum of a tone's frame is as loud; only the wave itself tells the two apart."""
    distance, time = SpectralLoss(), torch.arange(24_000) / 24_000
    first, later = (0.1 * torch.sin(2 * np.pi * (200 * time + turn))[None] for turn in (0.0, 0.5))
    formants, harmonics, wave = (part.item() for part in distance(later, first))
    assert formants < 0.1 and harmonics < 0.1 and wave > 1.0
    assert distance(first, first)[2].item() == 0


def test_a_segment_s_phonemes_are_those_that_sound_in_its_frames():
    sentences = {code: make_sentences(code, 30) for code in ("en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl")}
    classes = list_phonemes(sentences)
    wavs, phonemes = make_segments(np.random.default_rng(0), sentences, 40, classes)
    assert wavs.shape[2] // FRAME == phonemes.shape[1]
    loud = wavs.reshape(40, -1, FRAME).square().mean(2).sqrt()
    silent = phonemes == classes[""]
    assert 0.05 < silent.float().mean() < 0.6
    assert loud[~silent].median() > 5 * loud[silent].median()
    vowels = torch.isin(phonemes, torch.tensor([classes[name] for name in ("a", "ɛ", "i", "ɔ")]))
    assert loud[vowels].median() > 1.2 * loud[~silent & ~vowels].median()


def test_a_fresh_codec_tells_clips_apart(codec):
    """From transformers' own initial weights all clips have the same latents, to within 1 %, and nothing is learned."""
    wavs = np.stack([speak_text(text, "no")[:19_200] for text in ("Barna ser et tog.", "Hvor er kjøpmannen?")])
    with torch.no_grad():
        first, second = encode_hidden(codec, torch.from_numpy(wavs)[:, None])
    assert (first - second).norm() > 0.05 * first.norm()


def test_codebooks_come_nearer_to_the_latents_one_after_the_other(codec):
    wavs = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (40, 1, 19_200)).astype(np.float32))
    fit_codebooks(codec, wavs, rounds=3)
    with torch.no_grad():
        quantizer, left = codec.quantizer.acoustic_residual_vector_quantizer, []
        latents = quantizer.input_proj(encode_hidden(codec, wavs))
        residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])
        for layer in quantizer.layers:
            residual = residual - layer.codebook.decode(layer.codebook.encode(residual))
            left.append(residual.norm().item())
    assert left[0] > left[1] > left[2], left  # 800 frames: three codebooks of 512 hold them all


def test_training_never_draws_a_held_out_voice():
    drawn = {random_voice(np.random.default_rng(i)).variant for i in range(300)}
    assert len(drawn) > 8 and drawn.isdisjoint(voice.variant for voice in HELD_OUT_VOICES)


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_letter_and_phoneme_of_a_language_has_a_token_of_its_own(code):
    tokenizer = build_processor().tokenizer
    texts = make_sentences(code, 200) + list(LANGUAGES[code].probes)
    for text in (*texts, *to_ipa(texts, code)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_tokens_to_ids(SPECIAL[4]) not in ids, text
        assert tokenizer.decode(ids) == text


def test_the_shipped_base_has_the_tokens_and_rows_that_the_recipe_appends():
    model, processor = load_base("models/csm-mini", "cpu")
    table, tokens = model.embed_text_tokens.weight.detach(), processor.tokenizer.get_vocab()
    assert tokens == build_processor().tokenizer.get_vocab() and len(tokens) == len(table) == model.config.text_vocab_size
    assert [tokens[name] for name in RESERVED] == [*range(len(table) - len(RESERVED), len(table))]
    model.embed_text_tokens = torch.nn.Embedding.from_pretrained(table[: -len(RESERVED)])
    reserve_rows(model)
    assert torch.equal(model.embed_text_tokens.weight.half(), table.half())


def test_the_saved_base_is_laid_out_as_a_published_one(codec, tmp_path):
    processor = build_processor()
    model = build_model(codec, processor, hidden_size=32, layers=1).eval()
    save_base(model, processor, tmp_path / "csm", torch.float16, torch.float16)
    assert {path.name for path in (ROOT / "models/csm-mini").iterdir()} - {"README.md", "training.json"} == {
        path.name for path in (tmp_path / "csm").iterdir()
    }


@pytest.mark.parametrize(("arguments", "says"), [
    (["base"], "run `python -m csm_nb.mini codec` first"), (["codec", "--minutes", "0"], "has to be above 0"),
    (["voice"], "invalid choice"),
])
def test_a_wrong_request_says_what_to_do(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main([*arguments, "--work", str(tmp_path), "--out", str(tmp_path / "models")])
    assert says in str(stopped.value) + capsys.readouterr().err
    assert not (tmp_path / "models").exists()
