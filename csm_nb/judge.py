"""Judges: which language is heard, what is understood, and how sure a figure over clips is."""

import re
import unicodedata

import jiwer
import numpy as np
import pandas as pd
import torch
from transformers import pipeline
from transformers.utils import logging

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.codec import pick_device
from csm_nb.hub import fetch_model
from csm_nb.languages import LANGUAGES, get_language

SHORTEST = 0.1  # s; nothing is asked about less
_LABELS = {label: code for code, language in LANGUAGES.items() for label in (code, *language.mms_lid)}


def load_lid(model, device: str = "auto"):
    """Return a language-ID pipeline of a folder or hub id (audio classification), in float32."""
    return _load("audio-classification", model, device, "lid_model")


def load_asr(model, device: str = "auto", language: str = "en"):
    """Return a speech-recognition pipeline (CTC or Whisper); "by-language" takes the language table's model.

    A Whisper is told the language, so that it writes down what it hears instead of guessing which language it is.
    """
    entry = get_language(language)
    asr = _load("automatic-speech-recognition", entry.asr if model == "by-language" else model, device, "asr_model")
    if asr.model.config.model_type == "whisper":
        asr.model.generation_config.language = entry.whisper
        asr.model.generation_config.task = "transcribe"
    return asr


def _load(task, model, device, use):
    logging.disable_progress_bar()  # a bar that stays at 0 % in every executed notebook
    return pipeline(task, model=str(fetch_model(model, use)), device=pick_device(device), dtype=torch.float32)


def _to_inputs(judge, wavs):
    """Indices of clips with something to hear, and those clips as the pipeline takes them."""
    rate = judge.feature_extractor.sampling_rate
    heard = [i for i, wav in enumerate(wavs) if len(wav) >= SHORTEST * SAMPLE_RATE and np.isfinite(wav).all() and np.any(wav)]
    return heard, [{"raw": resample(wavs[i], SAMPLE_RATE, rate), "sampling_rate": rate} for i in heard]


def identify_languages(lid, wavs, batch_size: int = 8) -> list[dict]:
    """Return {our language code: probability} a clip (24 kHz), everything else summed under "other".

    Labels of facebook/mms-lid-126 are mapped by the language table, Bokmål and Nynorsk summed into no. A clip under
    0.1 s, silent or not finite gets {"none": 1.0}.
    """
    answers = [{"none": 1.0} for _ in wavs]
    heard, inputs = _to_inputs(lid, wavs)
    for i, scores in zip(heard, lid(inputs, top_k=None, batch_size=batch_size) if inputs else [], strict=True):
        answer = {}
        for score in scores:
            code = _LABELS.get(score["label"], "other")
            answer[code] = answer.get(code, 0.0) + score["score"]
        answers[i] = answer
    return answers


def transcribe(asr, wavs, batch_size: int = 8) -> list[str]:
    """Return what the recogniser writes for each clip (24 kHz); "" for a clip with nothing to hear."""
    texts = [""] * len(wavs)
    heard, inputs = _to_inputs(asr, wavs)
    for i, answer in zip(heard, asr(inputs, batch_size=batch_size) if inputs else [], strict=True):
        texts[i] = answer["text"].strip()
    return texts


def normalise_text(text: str) -> str:
    """Return lowercase words only, composed Unicode, single spaces: what two texts are compared by."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s']|_", " ", text)).strip()


def character_error_rates(references, hypotheses) -> np.ndarray:
    """Return the character error rate of each pair after normalise_text; above 1 where more was heard than was said.

    Raises ValueError for a reference without letters.
    """
    rates = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected = normalise_text(reference)
        if not expected:
            raise ValueError(f"the reference {reference!r} has no letters; a character error rate is not defined")
        rates.append(jiwer.cer(expected, normalise_text(hypothesis)))
    return np.array(rates, dtype=float)


def confusion_matrix(true, predicted, labels) -> pd.DataFrame:
    """Return counts: a row for each of `labels` that was read, a column for each of them and each other that was heard."""
    columns = [*labels, *sorted(set(predicted) - set(labels))]
    table = pd.crosstab(pd.Series(list(true), name="read"), pd.Series(list(predicted), name="heard"))
    return table.reindex(index=list(labels), columns=columns, fill_value=0)


def bootstrap_interval(values, statistic=np.mean, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over clips (Efron 1979); NaN are left out.

    One value is its own interval, none gives (nan, nan).
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values[0]),) * 2 if len(values) else (float("nan"),) * 2
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    figures = np.apply_along_axis(statistic, 1, values[picks])
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
