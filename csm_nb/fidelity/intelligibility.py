"""What the codec leaves of the sounds themselves: recogniser, language ID, and two measures of quality where installed."""

import importlib.util

import numpy as np
import pandas as pd

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.judge.errors import average_cer
from csm_nb.judge.intervals import write_share
from csm_nb.judge.judges import find_hallucinations, identify_languages, transcribe
from csm_nb.text.normalise import character_error_rates, normalise_text

MEASURES = ("cer_percent", "right_language", "stoi", "pesq")
LABELS = {"cer_percent": "CER (%)", "right_language": "LID accuracy (share)", "stoi": "STOI", "pesq": "PESQ-WB"}
PACKAGES = {"stoi": "pystoi", "pesq": "pesq"}
SHORTEST = 0.6  # s; STOI needs 30 frames that are not silent, PESQ a quarter of a second
QUALITY_RATE = 16_000  # Hz; PESQ's wide band, and STOI looks no higher than 5 kHz


def list_missing() -> str:
    """Return in words which of the optional packages are not installed, and how to install them; "" if none."""
    missing = [name for name in PACKAGES.values() if importlib.util.find_spec(name) is None]
    return f"not measured: {', '.join(missing)} not installed (make setup EXTRAS=quality)" if missing else ""


def measure_sounds(clips, asr, lid, language: str, conditions) -> pd.DataFrame:
    """Return one row per coded clip (clips.CodedClip) and condition, the original first, with the MEASURES.

    cer_percent: what `asr` writes against the text (NaN without text), 100 at most; on the original it is the recogniser's
    own error, and what comes on top is the codec's. hallucinated: whether it writes more than the clip has time for
    (judges.find_hallucinations). right_language: 1 where `lid` hears `language`, else 0. stoi (Taal et al. 2011)
    and pesq (ITU-T P.862.2) compare with the original; NaN where their packages are not installed or a clip is too short.
    """
    rows = []
    for condition in ("original", *conditions):
        wavs = [clip.original if condition == "original" else clip.versions[condition] for clip in clips]
        written, heard = transcribe(asr, wavs), identify_languages(lid, wavs)
        made_up = find_hallucinations(written, wavs)
        for clip, wav, text, scores, invented in zip(clips, wavs, written, heard, made_up, strict=True):
            expected = str(clip.row.get("text") or "")
            known = bool(normalise_text(expected, language))
            cer = 100 * min(1, character_error_rates([expected], [text], language)[0]) if known else np.nan
            rows.append({
                "clip": clip.title, "audio_path": clip.row["audio_path"], "condition": condition,
                "cer_percent": float(cer), "hallucinated": bool(invented),
                "right_language": float(max(scores, key=scores.get) == language), **measure_quality(clip.original, wav),
            })
    return pd.DataFrame(rows)


def tabulate_errors(heard: pd.DataFrame) -> pd.DataFrame:
    """Return how measure_sounds' recogniser erred, one row per condition: mean CER with its 95 % interval, median, shares.

    Over the clips with a text, whose number is in the shares; hallucinations are looked for in every clip.
    """
    rows = []
    for condition, part in heard.groupby("condition", sort=False):
        rates = part.cer_percent.dropna().to_numpy() / 100
        figures = {name: f"{100 * value:.1f}" if np.isfinite(value) else "not measured"
                   for name, value in average_cer(rates).items()}
        rows.append({
            "condition": condition, "mean CER (%)": figures["CER"] + (
                f" ({figures['CER low']} to {figures['CER high']})" if len(rates) else ""),
            "median CER (%)": figures["CER median"], "over 50 %": write_share(int((rates > 0.5).sum()), len(rates)),
            "hallucinations": write_share(int(part.hallucinated.sum()), len(part)),
        })
    return pd.DataFrame(rows).set_index("condition")


def describe_ceiling(summary: pd.DataFrame) -> dict:
    """Return {condition: {measure: mean}} of summarised sounds, as metrics.json keeps it: what speech can reach at best."""
    return {name: dict(zip(part.measure, part["figure"].astype(float), strict=True))
            for name, part in summary.groupby("condition", sort=False)}


def measure_quality(original, decoded) -> dict:
    """Return {"stoi", "pesq"} of a decoded clip (24 kHz) against its original; NaN where they can not be had."""
    quality = {"stoi": np.nan, "pesq": np.nan}
    length = min(len(original), len(decoded))
    if length < SHORTEST * SAMPLE_RATE or not np.any(original) or not np.any(decoded):
        return quality
    before, after = (resample(np.asarray(wav)[:length], SAMPLE_RATE, QUALITY_RATE) for wav in (original, decoded))
    if importlib.util.find_spec("pystoi"):
        from pystoi import stoi
        quality["stoi"] = float(stoi(before, after, QUALITY_RATE))
    if importlib.util.find_spec("pesq"):
        from pesq import PesqError, pesq
        try:
            quality["pesq"] = float(pesq(QUALITY_RATE, before, after, "wb"))
        except PesqError:  # it finds no speech in the clip
            pass
    return quality
