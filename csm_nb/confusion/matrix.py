"""Who was heard as what: the judges on all that was read, counted."""

import numpy as np
import pandas as pd

from csm_nb.confusion.prompts import HELD_OUT
from csm_nb.judge.errors import average_cer, confusion_matrix
from csm_nb.judge.intervals import share_interval
from csm_nb.judge.judges import find_hallucinations, identify_languages, transcribe
from csm_nb.recipe import TRAINED
from csm_nb.text.normalise import character_error_rates


def judge_speech(rows: pd.DataFrame, lid, asr: dict, keep=None) -> pd.DataFrame:
    """Add what the judges heard: heard (language), confidence of the language that was read, transcript, cer, hallucinated.

    `asr` maps a language to its recogniser; cer may be above 1, and is counted as 1 at most wherever it is averaged. With
    `keep` (keep.Keep) no clip is heard that was before.
    """
    rows = rows.reset_index(drop=True)
    scores = identify_languages(lid, list(rows.wav), keep=keep)
    rows = rows.assign(heard=[max(s, key=s.get) for s in scores],
                       confidence=[s.get(code, 0.0) for s, code in zip(scores, rows.language, strict=True)],
                       transcript="", cer=np.nan, hallucinated=False)
    for code, part in rows.groupby("language"):
        texts = transcribe(asr[code], list(part.wav), keep=keep)
        rows.loc[part.index, "transcript"] = texts
        rows.loc[part.index, "cer"] = character_error_rates(part.text, texts, code)
        rows.loc[part.index, "hallucinated"] = find_hallucinations(texts, list(part.wav))
    return rows


def share_right(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one row per model, language read and kind of sentence: LID accuracy, CER, runaways, sentences.

    LID accuracy (heard right) has Wilson's 95 % interval, the mean CER a bootstrap one, both over sentences. A sentence's
    CER counts as 1 at most (errors.average_cer). The column `on` says which sentences: probes, or held-out ones.
    """
    kinds = rows.get("on", pd.Series(HELD_OUT, index=rows.index))
    made_up = rows.get("hallucinated", pd.Series(False, index=rows.index))
    table = []
    for (name, code, kind), part in rows.assign(on=kinds, hallucinated=made_up).groupby(["model", "language", "on"], sort=False):
        right = int((part.heard == code).sum())
        low, high = share_interval(right, len(part))
        table.append({
            "model": name, "read": code, "on": kind, "heard right": right / len(part), "low": low, "high": high,
            "heard most": part.heard.mode()[0], **average_cer(part.cer), "hallucinations": int(part.hallucinated.sum()),
            "runaways": int((~part.ended.astype(bool)).sum()), "sentences": len(part),
        })
    return pd.DataFrame(table).round(3)


def _is_own(rows):
    """Return which rows are of an adapter, or a fully trained model, that reads its own language."""
    return np.logical_or.reduce([rows.model == f"{method}_" + rows.language for method in TRAINED])


def list_confusions(reference: pd.DataFrame, spoken: pd.DataFrame, languages) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, counts) of the probes of `languages`, read against heard: reference, base, each by its own adapter."""
    sets = (("reference", reference), ("base", spoken[spoken.model == "base"]), ("own adapter", spoken[_is_own(spoken)]))
    probes = [(name, rows[rows.probe & rows.language.isin(languages)]) for name, rows in sets]
    return [(f"{name}, probes", confusion_matrix(rows.language, rows.heard, languages)) for name, rows in probes if len(rows)]


def count_heard(reference: pd.DataFrame, spoken: pd.DataFrame, language: str) -> pd.DataFrame:
    """Return counts of what was heard in the held-out sentences of `language`: one row per model, reference and base first."""
    rows = pd.concat([reference, spoken])
    rows = rows[(rows.language == language) & (rows.on == HELD_OUT)]
    return pd.crosstab(rows.model, rows.heard).reindex(list(dict.fromkeys(rows.model))).rename_axis("read by")


def pair_with_reference(rows: pd.DataFrame, reference: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Return clips [(label, wav), ...] to compare, two per row: the reference audio of its sentence, then what the model said.

    The label says what the ASR wrote and how far that is from the text.
    """
    originals = reference.drop_duplicates(["language", "text"]).set_index(["language", "text"])
    clips = []
    for row in rows.itertuples():
        original = originals.loc[(row.language, row.text)]
        for name, clip in ((f"reference, {row.language}", original), (row.model, row)):
            clips.append((f"{name}, {clip.cer:.0%} wrong:\n“{clip.transcript}”", clip.wav))
    return clips
