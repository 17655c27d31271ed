"""The verdict of 04: is each language heard as itself, and not as its neighbours."""

import pandas as pd

from csm_nb.confusion.matrix import _is_own, share_right
from csm_nb.confusion.prompts import HELD_OUT
from csm_nb.judge.errors import average_cer
from csm_nb.judge.intervals import count_needed, decide_share, share_interval, write_needed, write_share
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.recipe import TRAINED


def judge_verdict(reference: pd.DataFrame, spoken: pd.DataFrame, language: str) -> tuple[str, dict]:
    """Return ("clear" | "bleeds into xx" | "unclear: why", metrics) for the adapter of `language` reading its own sentences.

    Only held-out sentences count. By intervals.decide_share: clear from an LID accuracy of 90 % with a lower bound of 80 % or
    more, bleeds when the upper bound is below 90 %, else unclear with how many sentences would decide. It is unclear as well
    when the judge itself is not clear on the reference audio by the same rule. What it bleeds into is the language heard
    most instead, all of them where several were heard equally often.
    """
    reference, spoken = (rows.drop_duplicates(["model", "language", "text"]) if "text" in rows else rows
                         for rows in (reference, spoken))
    table = pd.concat([share_right(reference), share_right(spoken)])
    own = spoken[_is_own(spoken) & (spoken.language == language)]
    ceiling = reference[reference.language == language]
    own, ceiling = (rows[rows.on == HELD_OUT] if "on" in rows else rows for rows in (own, ceiling))
    right, count = int((own.heard == language).sum()), len(own)
    judged, asked = int((ceiling.heard == language).sum()), len(ceiling)
    metrics = {"table": table.to_dict("records"), "on": HELD_OUT, "ceiling": judged / asked if asked else None}
    metrics |= dict(zip(("ceiling_low", "ceiling_high"), share_interval(judged, asked), strict=True)) if asked else {}
    if count == 0:
        named = spoken.model.isin([f"{method}_{language}" for method in TRAINED]).any()
        return f"unclear: {'no held-out sentence was read' if named else 'no adapter'}", metrics
    low, high = share_interval(right, count)
    cer = average_cer(own.cer)
    metrics |= {
        "heard_right": right / count, "low": low, "high": high, "sentences": count, "right": right,
        "cer": cer["CER"], "cer_low": cer["CER low"], "cer_high": cer["CER high"], "cer_median": cer["CER median"],
        "cer_over_half": cer["CER over 50 %"], "runaways": int((~own.ended.astype(bool)).sum()),
        "sentences_needed": count_needed(right, count),
    }
    if decide_share(judged, asked) != "clear":
        why = "" if decide_share(judged, asked) == "below" else f"; {write_needed(count_needed(judged, asked))}"
        return f"unclear: the judge hears {write_share(judged, asked)} of the reference{why}", metrics
    decided = decide_share(right, count)
    if decided == "clear":
        return "clear", metrics
    if decided == "unclear":
        return f"unclear: {write_share(right, count)} heard as {language}; {write_needed(metrics['sentences_needed'])}", metrics
    wrong = own.heard[own.heard.isin(set(LANGUAGES) - {language})].value_counts()
    heard = ", ".join(sorted(wrong.index[wrong == wrong.max()])) or "no language that is told apart here"
    return f"bleeds into {heard}", metrics


def describe_verdict(verdict: str, metrics: dict, language: str) -> str:
    """Return the verdict in words with what it rests on: shares with both bounds, for the adapter and for the reference."""
    parts = [f"{get_language(language).name}: {verdict}."]
    if "right" in metrics and not verdict.startswith("unclear"):
        parts.append(f"Of {metrics['sentences']} held-out sentences {100 * metrics['heard_right']:.0f} % are heard as "
                     f"{language}, 95 % interval {100 * metrics['low']:.0f} to {100 * metrics['high']:.0f} %.")
    if metrics["ceiling"] is not None:
        parts.append(f"Of the reference audio {100 * metrics['ceiling']:.0f} %, "
                     f"{100 * metrics['ceiling_low']:.0f} to {100 * metrics['ceiling_high']:.0f} %.")
    return " ".join(parts)
