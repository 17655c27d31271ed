"""The verdict of 05: does a model read phonemes better than spelling."""

import numpy as np
import pandas as pd

from csm_nb.confusion.prompts import FEWEST
from csm_nb.judge.intervals import bootstrap_interval
from csm_nb.judge.judges import transcribe
from csm_nb.text.normalise import character_error_rates


def judge_inputs(texts, speech: dict, asr, language: str, keep=None) -> pd.DataFrame:
    """Return the CER of the same sentences said from several inputs: rows with model (the input's name), text, transcript, cer.

    With `keep` (keep.Keep) no clip is heard that was before.
    """
    parts = []
    for name, said in speech.items():
        heard = transcribe(asr, [s.wav for s in said], keep=keep)
        parts.append(pd.DataFrame({
            "model": name, "language": language, "text": texts, "wav": [s.wav for s in said], "ended": [s.ended for s in said],
            "transcript": heard, "cer": character_error_rates(texts, heard, language),
        }))
    return pd.concat(parts, ignore_index=True)


def compare_inputs(rows: pd.DataFrame, spelled: list[dict], phonemic: list[dict]) -> tuple[str, dict]:
    """("phonemes" | "spelling" | "no difference shown (n = ..)", metrics): the paired CER difference, spelling minus phonemes.

    The interval is a 95 % bootstrap over sentences, of which each counts as 1 at most; a side wins when it leaves out zero.
    Fewer than 10 sentences are "unclear".
    """
    rows = rows.assign(cer=rows.cer.clip(upper=1))
    by_text = rows.pivot_table(index="text", columns="model", values="cer")
    difference = (by_text["spelling"] - by_text["phonemes"]).to_numpy()
    low, high = bootstrap_interval(difference)
    last = {name: [row["eval_loss"] for row in history if "eval_loss" in row][-1]
            for name, history in (("spelling", spelled), ("phonemes", phonemic))}
    metrics = {
        "cer_spelling": float(by_text["spelling"].mean()), "cer_phonemes": float(by_text["phonemes"].mean()),
        "cer_difference": float(np.mean(difference)), "low": float(low), "high": float(high), "sentences": len(by_text),
        "loss_spelling": last["spelling"], "loss_phonemes": last["phonemes"],
    }
    verdict = "phonemes" if low > 0 else "spelling" if high < 0 else f"no difference shown (n = {len(by_text)})"
    if len(by_text) < FEWEST:
        verdict = f"unclear: {len(by_text)} of {FEWEST} sentences"
    metrics["because"] = (
        f"CER {100 * metrics['cer_spelling']:.0f} % by spelling, {100 * metrics['cer_phonemes']:.0f} % by phonemes, a "
        f"difference of {100 * metrics['cer_difference']:.1f} points ({100 * low:.1f} to {100 * high:.1f})")
    return verdict, metrics
