"""Judges answer in the workbook's own language codes, and a figure comes with an interval that means something."""

import numpy as np
import pytest
from transformers import AutoModelForAudioClassification, AutoModelForCTC

from csm_nb.judge import (
    bootstrap_interval,
    character_error_rates,
    confusion_matrix,
    identify_languages,
    load_asr,
    load_lid,
    normalise_text,
    transcribe,
)
from csm_nb.params import ROOT
from csm_nb.synth import speak_text

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


def test_error_rates_do_not_count_case_and_punctuation_but_letters():
    rates = character_error_rates(["Blåbær, rødgrød!", "abcd", "ab"], ["blåbær rødgrød", "abed", "abxxxx"])
    assert rates.tolist() == [0.0, 0.25, 2.0]


def test_a_letter_and_its_decomposed_form_are_the_same():
    assert normalise_text("a\u030a") == normalise_text("å")


def test_a_reference_without_letters_is_an_error():
    with pytest.raises(ValueError, match="no letters"):
        character_error_rates(["..."], ["a"])


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
    assert bootstrap_interval([0.3, np.nan]) == (0.3, 0.3)
    assert np.isnan(bootstrap_interval([])).all()
