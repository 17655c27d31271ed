"""What a judge heard in a clip is kept by judge and clip: another judge listens, another verdict does not."""

import numpy as np
import pytest
import torch

from csm_nb.csm.load import load_base
from csm_nb.judge import intervals, judges
from csm_nb.keep import Keep
from csm_nb.speak import generate
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.train import select

TEXTS = ["Hva heter du?", "Boka er rød.", "Jeg bor i Oslo."]


@pytest.fixture(scope="module")
def models():
    return judges.load_lid("models/lid-mini", "cpu"), judges.load_asr("models/asr-mini", "cpu", "no")


@pytest.fixture(scope="module")
def wavs():
    return [speak_text(text, "no", VOICES[0]) for text in TEXTS]


@pytest.fixture
def counts(monkeypatch):
    """How many utterances were spoken, and how many clips each judge heard."""
    found = {"say": 0, "_identify": 0, "_write_down": 0}

    def count(module, name, place):
        plain = getattr(module, name)

        def counted(*given):
            found[name] += len(given[place])
            return plain(*given)

        monkeypatch.setattr(module, name, counted)

    count(generate, "say", 1)
    count(judges, "_identify", 1)
    count(judges, "_write_down", 1)
    return found


def test_a_clip_is_heard_once_by_each_judge_and_gets_the_same_answer(models, wavs, counts, tmp_path):
    lid, asr = models
    clips = [*wavs, np.zeros(9, np.float32)]
    plain = judges.identify_languages(lid, clips), judges.transcribe(asr, clips)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1]):
        keep = Keep(tmp_path)
        asked = [clips[i] for i in order]
        scores, texts = judges.identify_languages(lid, asked, keep=keep), judges.transcribe(asr, asked, keep=keep)
        assert texts == [plain[1][i] for i in order] and scores[-1].keys() == plain[0][order[-1]].keys()
        assert [max(score, key=score.get) for score in scores] == [max(plain[0][i], key=plain[0][i].get) for i in order]
    assert counts["_identify"] == counts["_write_down"] == 8  # four without keeping, four with
    assert keep.describe() == "2 clips for a judge: 0 heard, 2 found"
    judges.transcribe(asr, [wavs[0] * 0.5], keep=Keep(tmp_path))
    assert counts["_write_down"] == 9


def test_a_second_judging_with_another_rule_speaks_and_listens_to_nothing_and_another_judge_listens_only(
        models, counts, tmp_path, monkeypatch):
    (lid, asr), (model, processor) = models, load_base("models/csm-mini", "cpu")

    def judge():
        return select.judge_model(model, processor, TEXTS, "no", lid, asr, "0", keep=Keep(tmp_path))

    first = judge()
    assert counts == {"say": 3, "_identify": 3, "_write_down": 3}
    monkeypatch.setattr(intervals, "CLEAR", 0.5)
    monkeypatch.setattr(select, "character_error_rates", lambda texts, *more: np.ones(len(texts)))
    assert judge().CER.tolist() == [1, 1, 1] and len(first) == 3
    assert counts == {"say": 3, "_identify": 3, "_write_down": 3}
    parameter = next(asr.model.parameters())
    with torch.no_grad():
        parameter += 1e-3
    judge()
    assert counts == {"say": 3, "_identify": 3, "_write_down": 6}
    with torch.no_grad():
        parameter -= 1e-3
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.5
    judge()
    assert counts["say"] == 6


def test_labels_language_told_and_code_make_another_judge(models, monkeypatch):
    lid, asr = models
    before = judges.describe_judge(lid), judges.describe_judge(asr)
    assert before == (judges.describe_judge(lid), judges.describe_judge(asr)) and before[0] != before[1]
    monkeypatch.setitem(lid.model.config.id2label, 0, "another")
    assert judges.describe_judge(lid) != before[0]
    if getattr(asr, "generation_config", None) is not None:
        monkeypatch.setattr(asr.generation_config, "language", "<|sv|>", raising=False)
        assert judges.describe_judge(asr) != before[1]
