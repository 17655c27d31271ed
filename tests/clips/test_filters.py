"""What a recogniser and DNSMOS say of a clip decides only where it is asked to, and is kept with the clip."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from csm_nb import paths
from csm_nb.audio import resample, write_audio
from csm_nb.clips import check
from csm_nb.clips.filters import choose_clips, compare_texts, label_clips, rate_clips
from csm_nb.judge.confidence import measure_confidence
from csm_nb.judge.judges import load_asr, transcribe
from csm_nb.manifest import CorpusError
from csm_nb.synth.espeak import speak_text
from csm_nb.text.sentences import make_sentences

TEXTS = make_sentences("da", 6, 3)


@pytest.fixture(scope="module")
def asr():
    return load_asr("models/asr-mini", "cpu", "da")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [{"text": text, "audio_path": str(write_audio(folder / f"{number}.wav", speak_text(text, "da"))),
             "speaker_id": str(number % 2), "language": "da"} for number, text in enumerate(TEXTS)]


def refuse(language):
    raise AssertionError("a recogniser was loaded that nobody asked for")


def test_without_parameters_clips_are_checked_and_nothing_else(rows):
    assert choose_clips(rows, {}, refuse) == check.check_clips(rows)
    assert choose_clips(rows, {"max_cer": 0.0, "min_dnsmos": 0.0, "keep_repeats": True}, refuse) == check.check_clips(rows)


def test_other_words_than_the_text_are_set_aside_with_what_was_heard(rows, asr):
    wrong = rows[0] | {"text": rows[1]["text"]}
    good, bad = compare_texts([wrong, *rows[1:]], asr, "da", 0.5)
    assert [row["text"] for row in good] == TEXTS[1:] and all(row["cer"] <= 0.5 for row in good)
    assert bad[0]["kind"] == "other words" and "at most 50% is allowed" in bad[0]["reason"]
    assert repr(transcribe(asr, [speak_text(TEXTS[0], "da")])[0])[:40] in bad[0]["reason"]


def test_a_clip_without_a_text_gets_what_was_heard_where_the_recogniser_is_sure(rows, asr, tmp_path):
    bare = [rows[0] | {"text": ""}, rows[1], rows[2] | {"text": "..."}, rows[3] | {"text": "", "audio_path": "none.wav"}]
    labelled, bad = label_clips(bare, asr, 0.5)
    heard = transcribe(asr, [speak_text(TEXTS[0], "da"), speak_text(TEXTS[2], "da")])
    assert bad == [] and [row["text"] for row in labelled] == [heard[0], TEXTS[1], heard[1], ""]
    assert [row.get("pseudo", 0) >= 0.5 for row in labelled] == [True, False, True, False]
    labelled, bad = label_clips(bare, asr, 0.999)
    assert [row["kind"] for row in bad] == ["no text"] * 2 and "at least 0.999 is asked for" in bad[0]["reason"]
    assert [row["text"] for row in labelled] == [TEXTS[1], ""]


def test_labelled_clips_are_counted_and_not_compared_with_themselves(rows, asr):
    settings = {"pseudo_labels": 0.5, "max_cer": 0.6, "read_out": True, "keep_repeats": False}
    bare = [rows[0] | {"text": ""}, *rows[1:], rows[0] | {"text": "Ca. 500 kr. koster det slet ikke."}]
    good, bad = choose_clips(bare, settings, lambda code: asr)
    assert "pseudo" in good[0] and "cer" not in good[0] and [row["kind"] for row in bad] == ["same audio"]
    assert bad[0]["text"].startswith("Cirka fem hundrede kroner") and bad[0]["written"].startswith("Ca. 500 kr.")
    assert check.count_clips(good, bad) == {"set_aside_same_audio": 1, "pseudo_labelled": 1}
    card = check.describe_provenance(good, bad, settings)
    assert card["set aside"] == "1 same audio" and card["pseudo-labelled"] == f"{1 / len(good):.1%} of the clips"
    assert card["processing"] == "max_cer 0.6, read_out"
    assert set(check.describe_provenance(good, [], {})) == {"hours", "set aside", "pseudo-labelled"}


def test_what_could_not_be_done_to_codes_alone_is_not_said_to_be_done():
    row, settings = {"duration": 2.0, "remarks": {}}, {"margin": 0.2, "max_cer": 0.5, "read_out": True}
    codes = row | {"codes_row": 0}
    assert check.describe_provenance([codes], [], settings)["processing"] == "read_out"
    assert check.describe_provenance([codes, row], [], settings)["processing"] == (
        "margin 0.2 s, max_cer 0.5, not of 1 clips that are codes alone, read_out")
    assert check.describe_sound([codes])["loudness, LUFS"] == "not known of codes alone"


def test_where_nothing_is_left_it_says_what_was_asked_for(rows, asr):
    with pytest.raises(CorpusError, match="of 6 clips none is left: heard as .* at most 0% is allowed .* ask for less"):
        choose_clips([row | {"text": "Noget helt andet end det."} for row in rows], {"max_cer": 0.001}, lambda code: asr)


def test_each_language_is_heard_by_its_own_recogniser(rows, asr):
    bare = [row | {"text": "" if number < 4 else row["text"], "language": ("da", "sv")[number % 2]}
            for number, row in enumerate(rows)]
    asked = []
    good, bad = choose_clips(bare, {"pseudo_labels": 0.01, "max_cer": 1.0}, lambda code: asked.append(code) or asr)
    assert asked == ["da", "sv", "da", "sv"] and bad == []
    assert {row["language"]: sum("pseudo" in one for one in good if one["language"] == row["language"]) for row in good} == {
        "da": 2, "sv": 2}


def test_confidence_falls_with_noise(asr):
    rng = np.random.default_rng(0)
    clean = [speak_text(text, "da") for text in TEXTS]
    noisy = [(wav + rng.normal(0, 0.08, len(wav))).astype(np.float32) for wav in clean]
    sure, unsure = (measure_confidence(asr, wavs, transcribe(asr, wavs)) for wavs in (clean, noisy))
    assert 0 < unsure.mean() < sure.mean() < 1 and measure_confidence(asr, clean[:1], [""]) == [0]


def test_confidence_of_a_whisper_is_the_mean_probability_of_its_tokens():
    tokenizer = WhisperTokenizer(vocab={letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    names = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", "en", "da", "transcribe", "notimestamps")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    ids = tokenizer.convert_tokens_to_ids(names)
    config = WhisperConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=ids[0],
                           decoder_start_token_id=ids[1], eos_token_id=ids[0], bos_token_id=ids[0])
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    asr = SimpleNamespace(model=model, tokenizer=tokenizer, feature_extractor=WhisperFeatureExtractor(), type="seq2seq_whisper",
                          generation_config=GenerationConfig(language="danish", task="transcribe", lang_to_id={"<|da|>": ids[3]},
                                                             task_to_id={"transcribe": ids[4]}, no_timestamps_token_id=ids[5],
                                                             decoder_start_token_id=ids[1]))
    wav, text = speak_text("Ja.", "da"), "ja tak"
    features = asr.feature_extractor(resample(wav, 24_000, 16_000), sampling_rate=16_000, return_tensors="pt")
    sure, = measure_confidence(asr, [wav], [text])
    prompt = [ids[1], ids[3], ids[4], ids[5]]
    letters = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(**features, decoder_input_ids=torch.tensor([prompt + letters])).logits[0].softmax(-1)
    expected = np.mean([float(logits[len(prompt) - 1 + place, letter]) for place, letter in enumerate(letters)])
    assert sure == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("speechmos", "onnxruntime"))), reason="no speechmos or onnxruntime")
def test_dnsmos_parts_clean_from_noisy_clips(rows, tmp_path):
    rng = np.random.default_rng(0)
    noisy = speak_text(TEXTS[0], "da")
    noisy = rows[0] | {"audio_path": str(write_audio(tmp_path / "n.wav", noisy + rng.normal(0, 0.08, len(noisy))))}
    good, bad = rate_clips([rows[0], noisy], 2.0)
    assert good[0]["dnsmos"] > 2 and bad[0]["audio_path"] == noisy["audio_path"] and bad[0]["kind"] == "low quality"
    assert "at least 2 is asked for" in bad[0]["reason"]


def test_what_is_done_to_clips_happens_in_one_go(rows, asr, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    long = rows[0] | {"audio_path": str(write_audio(tmp_path / "l.wav", np.pad(speak_text(TEXTS[0], "da"), 48_000)))}
    settings = {"margin": 0.2, "loudness": -23.0}
    good, bad = choose_clips([long, rows[1]], settings, refuse)
    assert bad == [] and good[0]["levelled"]["cut"] > 3 and all("data/clips" in row["audio_path"] for row in good)
    sound = check.describe_sound(good)
    assert sound["loudness, LUFS"].startswith("-23.0 (-23.") and sound["band-limited"] == "none"
    assert json.dumps(good)


def test_the_card_of_a_corpus_says_its_letters_pace_and_band(rows):
    good = [row | {"duration": 2.0} for row in rows]
    good[0] = good[0] | {"text": "Çà va.", "remarks": {"band-limited": "16000 Hz: nothing above 8 kHz"}}
    texts = check.describe_texts(good, "da")
    assert texts["letters beyond the alphabet"] == "Ç (1) à (1)" and float(texts["characters per second"].split()[0]) > 3
    assert int(texts["distinct characters"]) == len(set("".join(row["text"] for row in good)))
    assert check.describe_sound(good)["band-limited"] == f"{1 / 6:.0%} at 8 kHz"
