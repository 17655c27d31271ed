"""Judges answer in the workbook's own language codes, and a figure comes with an interval that means something."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCTC,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from csm_nb.clean import SIGNS, clean_text
from csm_nb.judge import judges
from csm_nb.judge.errors import average_cer, confusion_matrix
from csm_nb.judge.intervals import (
    bootstrap_interval,
    count_needed,
    count_needed_mean,
    decide_share,
    share_interval,
    write_needed,
    write_share,
)
from csm_nb.judge.judges import (
    count_letters,
    count_tokens,
    find_hallucinations,
    identify_languages,
    load_asr,
    load_lid,
    read_label,
    transcribe,
)
from csm_nb.languages import LANGUAGES
from csm_nb.paths import ROOT
from csm_nb.prosody.marks import align_text
from csm_nb.synth.espeak import speak_text
from csm_nb.text.normalise import character_error_rates, normalise_text

SILENCE, BLIP, BROKEN = np.zeros(24_000, np.float32), np.ones(100, np.float32), np.full(24_000, np.nan, np.float32)


class LabelledJudge:
    """Stands in for a pipeline whose labels are those of facebook/mms-lid-126."""

    def __init__(self, **scores):
        self.scores, self.feature_extractor = scores, type("Extractor", (), {"sampling_rate": 16_000})

    def __call__(self, inputs, **_):
        return [[{"label": label, "score": score} for label, score in self.scores.items()] for _ in inputs]


@pytest.mark.parametrize(("folder", "model"), [("asr-mini", AutoModelForCTC), ("lid-mini", AutoModelForAudioClassification)])
def test_the_shipped_judges_load_as_a_hub_id_would(folder, model):
    assert model.from_pretrained(ROOT / "models" / folder).num_parameters() > 0


def test_both_written_forms_of_norwegian_are_norwegian_and_strangers_are_other():
    judge = LabelledJudge(nob=0.3, nno=0.25, swe=0.4, jpn=0.05)
    (answer,) = identify_languages(judge, [speak_text("Hei på deg.", "no")])
    assert max(answer, key=answer.get) == "no"
    assert answer == pytest.approx({"no": 0.55, "sv": 0.4, "other": 0.05})


@pytest.mark.parametrize(("label", "code"), [
    *((label, "no") for label in ("no", "nb", "nn", "nor", "nno", "nob", "norwegian", "Norwegian", "no-NO", "nb_NO", "<|no|>",
                                  "no: Norwegian", "Norwegian Bokmål", "Nynorsk", "nob_Latn", "__label__nn")),
    *((name, code) for code, entry in LANGUAGES.items() for name in (code, entry.name, entry.iso3, entry.azure, f"<|{code}|>")),
    ("ger", "de"), ("fre", "fr"), ("dut", "nl"), ("LABEL_0", "other"), ("jpn", "other"), ("noise", "other"), ("", "other"),
])  # fmt: skip
def test_a_language_is_known_by_each_of_its_names(label, code):
    assert read_label(label) == code


def test_a_language_id_whose_labels_name_no_language_is_refused(monkeypatch):
    config = type("Config", (), {"id2label": {0: "LABEL_0", 1: "LABEL_1"}})
    lid = type("Judge", (), {"model": type("Model", (), {"config": config})})
    monkeypatch.setattr(judges, "_load", lambda *_: lid)
    with pytest.raises(ValueError, match="LABEL_0, LABEL_1.*id2label"):
        load_lid("some/lid")


def test_a_clip_with_nothing_to_hear_gets_no_answer_and_the_others_keep_their_place():
    lid, asr = load_lid("models/lid-mini", "cpu"), load_asr("models/asr-mini", "cpu")
    clips = [SILENCE, speak_text("Barnet spiser et eple.", "no"), BLIP, BROKEN, np.zeros(0, np.float32)]
    answers = identify_languages(lid, clips)
    assert [answer.get("none") for answer in answers] == [1.0, None, 1.0, 1.0, 1.0]
    assert sum(answers[1].values()) == pytest.approx(1, abs=1e-3)
    texts = transcribe(asr, clips)
    assert [bool(text) for text in texts] == [False, True, False, False, False]


def test_a_clip_is_judged_the_same_alone_and_in_a_batch():
    lid, asr = load_lid("models/lid-mini", "cpu"), load_asr("models/asr-mini", "cpu")
    clips = [speak_text(text, "sv") for text in ("Barnet ser en sjö.", "Hur mår du i dag, min vän?", "Nej.")]
    assert transcribe(asr, clips) == [transcribe(asr, [clip])[0] for clip in clips]
    for together, clip in zip(identify_languages(lid, clips), clips, strict=True):
        assert together == pytest.approx(identify_languages(lid, [clip])[0], abs=1e-3)


@pytest.fixture(scope="module")
def whispers(tmp_path_factory):
    """Return folders of Whispers with random weights, which babble to their end: as published, fine-tuned, English-only."""
    places = {}
    for kind in ("published", "fine-tuned", "english"):
        tokenizer = WhisperTokenizer(vocab={letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
        names = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", "en", "da", "transcribe", "notimestamps")]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
        end, start, *languages, task, plain = tokenizer.convert_tokens_to_ids(names)
        ids = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
        config = WhisperConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
                               encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                               decoder_ffn_dim=16, **ids)
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config)
        model.generation_config = GenerationConfig(max_length=448, suppress_tokens=[end, start, *languages, task, plain], **ids)
        if kind != "fine-tuned":  # an old config has none of these
            model.generation_config.update(
                lang_to_id=dict(zip(names[2:4], languages, strict=True)), task_to_id={"transcribe": task},
                no_timestamps_token_id=plain, is_multilingual=kind == "published", allow_custom_entries=True)
        places[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(places[kind])
        WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(places[kind])
    return places


def make_noise(*seconds):
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, int(24_000 * each)).astype(np.float32) for each in seconds]


def test_whisper_writes_no_more_than_a_clip_has_time_for(whispers):
    clips = make_noise(5, 0.4, 2)
    texts = transcribe(load_asr(whispers["published"], "cpu", "da"), clips)
    assert [0 < len(text) <= count_tokens(len(wav) / 24_000) for text, wav in zip(texts, clips, strict=True)] == [True] * 3
    assert max(map(len, texts)) < 100  # of 448


def test_whisper_hears_a_clip_above_30_s(whispers):
    (text,) = transcribe(load_asr(whispers["published"], "cpu", "da"), make_noise(40))
    assert text


@pytest.mark.parametrize(("kind", "language", "said"), [
    ("published", "da", ""), ("published", "pl", "does not know Polish"), ("fine-tuned", "da", ""),
    ("english", "da", "English-only"), ("english", "en", ""),
])  # fmt: skip
def test_a_whisper_that_can_not_be_told_the_language_says_so_and_goes_on(whispers, kind, language, said, capsys):
    asr = load_asr(whispers[kind], "cpu", language)
    out = capsys.readouterr().out
    assert said in out if said else "Whisper" not in out and "know" not in out
    told = getattr(asr.generation_config, "language", None)
    assert told == (LANGUAGES[language].whisper if not said and kind != "english" else None)
    assert transcribe(asr, make_noise(0.4))[0]


def test_a_recogniser_with_a_language_model_transcribes_and_aligns():
    asr, wav = load_asr("models/asr-mini", "cpu", "no"), speak_text("Barnet spiser et eple.", "no")
    times = align_text(asr, wav, "barnet")
    asr.type = "ctc_with_lm"  # as the pipeline is where pyctcdecode is installed
    asr.decoder = type("Decoder", (), {"decode_beams": lambda self, logits, **_: [[f"{logits.ndim} axes"]]})()
    assert transcribe(asr, [wav, wav]) == ["2 axes"] * 2
    assert align_text(asr, wav, "barnet") == times


def test_error_rates_do_not_count_case_and_punctuation_but_letters():
    rates = character_error_rates(["Blåbær, rødgrød!", "abcd", "ab"], ["blåbær rødgrød", "abed", "abxxxx"], "no")
    assert rates.tolist() == [0.0, 0.25, 2.0]


@pytest.mark.parametrize(("language", "said", "written"), [
    ("no", "Klokka er sju.", "Klokka er 7."), ("no", "Tjuesju eller sju og tyve", "27 eller 27"),
    ("da", "halvtreds kroner", "50 kroner"), ("sv", "Fem procent av tjugo", "5 % av 20"),
    ("de", "siebenundzwanzig Äpfel", "27 Äpfel"), ("fr", "quatre-vingts jours", "80 jours"),
    ("en", "nineteen eighty-four", "1984"), ("es", "veintidós", "22"), ("it", "tre", "3"), ("nl", "drieëntwintig", "23"),
    ("pl", "dwadzieścia", "20"),
])  # fmt: skip
def test_a_number_in_digits_is_no_error_against_its_words(language, said, written):
    assert character_error_rates([said], [written], language).tolist() == [0]


def test_another_number_is_an_error():
    assert character_error_rates(["sju hus"], ["8 hus"], "no")[0] > 0.3


def test_texts_are_compared_in_the_signs_that_they_are_trained_in():
    for sign in map(chr, SIGNS):
        assert normalise_text(f"one{sign}two") == normalise_text(clean_text(f"one{sign}two")), sign


@pytest.mark.parametrize(("text", "kept"), [
    ("a\u030a", "å"), ("L’homme", "l'homme"), ("‘s avonds, foto’s", "'s avonds foto's"), ("«‘Hello’»", "hello"),
    ("rock 'n' roll", "rock 'n' roll"), ("ɔ\u0303 m\u0304", "ɔ\u0303 m\u0304"), ("Kranken\u00adhaus", "krankenhaus"),
    ("Łódź, ẞ", "łódź ß"), ("snake_case", "snake case"),
])  # fmt: skip
def test_letters_accents_and_apostrophes_are_kept(text, kept):
    assert normalise_text(text) == normalise_text(text, "no") == kept


def test_a_reference_without_letters_is_an_error():
    with pytest.raises(ValueError, match="no letters"):
        character_error_rates(["..."], ["a"], "no")


def test_one_hallucination_does_not_outweigh_the_other_clips():
    figures = average_cer([0.1, 0.2, 0.3, 57.0, np.nan])
    assert figures["CER"] == pytest.approx(0.4) and figures["CER median"] == pytest.approx(0.25)
    assert figures["CER over 50 %"] == 0.25 and figures["CER high"] <= 1
    assert np.isnan(list(average_cer([]).values())).all()


def test_a_hallucination_is_more_than_there_was_time_to_say():
    clips = [np.zeros(int(24_000 * seconds)) for seconds in (0.4, 0.4, 2.0)]
    made_up = "Danske tekster af Nicolai Winther"
    assert find_hallucinations(["otte", made_up, made_up], clips).tolist() == [False, True, False]
    assert count_letters(2) == 55 and count_tokens(2) == 36  # a token of Whisper's is 1.7 letters and more


def test_a_share_has_wilson_s_interval():
    assert share_interval(16, 16) == pytest.approx((0.8064, 1), abs=1e-4)
    assert share_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert np.isnan(share_interval(0, 0)).all()
    assert write_share(38, 40) == "38 of 40, 95 % (83 to 99 %)"


@pytest.mark.parametrize(("right", "count", "decided"), [
    (37, 40, "clear"), (36, 40, "unclear"), (33, 40, "unclear"), (32, 40, "below"), (14, 16, "unclear"), (16, 16, "clear"),
    (15, 15, "unclear"), (0, 0, "unclear"), (0, 40, "below"), (900, 1000, "clear"),
])  # fmt: skip
def test_the_interval_decides_and_not_the_share(right, count, decided):
    assert decide_share(right, count) == decided


def test_forty_sentences_decide_as_often_as_the_rule_promises():
    def how_often(share, decided):
        return sum(binom.pmf(right, 40, share) for right in range(41) if decide_share(right, 40) == decided)

    assert how_often(0.95, "clear") == pytest.approx(0.86, abs=0.01)
    assert how_often(0.75, "below") == pytest.approx(0.82, abs=0.01)
    assert how_often(0.95, "below") < 0.01 and how_often(0.75, "clear") < 0.01


@pytest.mark.parametrize(("right", "count"), [(14, 16), (36, 40), (9, 10), (2, 2), (33, 40), (16, 16), (3, 40)])
def test_as_many_sentences_as_are_named_would_decide_and_fewer_would_not(right, count):
    needed = count_needed(right, count)
    assert needed >= count
    for more in (20, 100):  # at whole multiples the share is exactly the one that was seen
        assert decide_share(right * more, count * more) == "unclear" or count * more >= needed
    more = int(np.ceil(needed / count))
    assert decide_share(right * more, count * more) != "unclear"
    assert [count_needed(*share) for share in ((14, 16), (36, 40), (16, 16))] == [554, 62, 16]


def test_no_number_of_sentences_decides_a_share_at_the_bound():
    assert count_needed(8999, 10_000) is None and "at the bound" in write_needed(None)
    assert count_needed_mean(0.1, -0.1, 0.3, 25, 0.0) == 100
    assert count_needed_mean(0.0, -0.1, 0.1, 25, 0.0) is None


def test_a_confusion_matrix_counts_every_clip_once():
    table = confusion_matrix(["no", "no", "sv", "da"], ["no", "sv", "sv", "fi"], ["no", "sv", "da"])
    assert table.loc["no"].tolist() == [1, 1, 0, 0]
    assert table.loc["da", "fi"] == 1 and table.to_numpy().sum() == 4


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(1.0, 1.0, 40), draws=300, seed=i) for i in range(200)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_an_interval_of_one_or_no_value_does_not_pretend():
    assert np.isnan(bootstrap_interval([0.3, np.nan])).all() and np.isnan(bootstrap_interval([])).all()
