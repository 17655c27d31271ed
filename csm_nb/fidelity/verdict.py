"""The verdict on a codec: criteria, controls that must fail, and what decided."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from csm_nb.fidelity import intelligibility
from csm_nb.fidelity.clips import MIN_CLIPS, name_condition
from csm_nb.judge.intervals import bootstrap_interval, share_interval
from csm_nb.languages import get_language
from csm_nb.prosody.f0 import MEASURES

FIGURES = ["figure", "low", "high", "measured", "found"]
SUMMARY = ["condition", "measure", *FIGURES]
SHARES = ("accent_right", "right_language")  # of a clip 1 or 0: their mean is a share


@dataclass(frozen=True)
class Criterion:
    """What a measure must reach for a trait of the language to be carried: `sign` is ">=" or "<="."""

    trait: str
    measure: str
    label: str
    sign: str
    limit: float

    def holds(self, value: float) -> bool:
        """Return whether a figure meets the criterion; NaN does not."""
        return bool(value >= self.limit if self.sign == ">=" else value <= self.limit)

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


# The project's starting gates. Measured on 40 real clips each of Danish, Swedish and Norwegian: Vorbis at its lowest
# quality stays at 12 cents and 1 % voicing errors or below, flattened F0 correlates by less than .04.
CRITERIA = (
    Criterion("melody", "f0_correlation", "F0 correlation", ">=", 0.95),
    Criterion("melody", "f0_rmse_cents", "F0 error (cents)", "<=", 35),
    Criterion("melody", "gpe_percent", "gross pitch errors (%)", "<=", 5),
    Criterion("voicing", "vde_percent", "voicing errors (%)", "<=", 8),
)
LABELS = {c.measure: c.label for c in CRITERIA} | {
    "mel_distance_db": "mel distance (dB)", "hnr_change_db": "change of HNR (dB)", "peak_shift_ms": "peaks shifted (ms)",
    "valley_shift_ms": "valleys shifted (ms)", "turns_kept_percent": "turns kept (%)",
    "h2_h1_error_st": "H2 - H1 error (semitones)", "accent_right": "accents told apart (share)",
    "stod_retention": "stød retention", "stod_rise": "rise without stød (spreads)",
}  # fmt: skip
# Controls, and what a sound check does with them: "passes" and "fails" by its criteria; "lowers" the first criterion's
# measure, its interval below that of Vorbis.
CONTROLS = {"identity": "passes", "Vorbis": "passes", "flat F0": "fails"}


@dataclass(frozen=True)
class Evidence:
    """One set of clips that says something about a trait: what they are, what was measured (summarise), and the criteria.

    `controls` maps the conditions that are controls to what a sound check does with them. `note` says how many there were
    to look for, and why none was found where that is so.
    """

    name: str
    summary: pd.DataFrame
    criteria: tuple = CRITERIA
    controls: dict = field(default_factory=lambda: dict(CONTROLS))
    note: str = ""


def summarise(measures: pd.DataFrame, names=MEASURES, statistic: str = "median") -> pd.DataFrame:
    """Return one row per condition and measure, with the columns SUMMARY.

    `figure` is the `statistic` over clips ("median" or "mean"; of the SHARES always the mean), low and high its 95 %
    interval (bootstrap; of a share by Wilson), `measured` the clips that it is over, `found` all there were.
    """
    rows = []
    for condition, part in measures.groupby("condition", sort=False):
        for measure in names:
            values = part[measure].to_numpy(float)
            values = values[np.isfinite(values)]
            if measure in SHARES:
                compute, (low, high) = np.mean, share_interval(values.sum(), len(values))
            else:
                compute = getattr(np, statistic)
                low, high = bootstrap_interval(values, compute)
            figure = float(compute(values)) if len(values) else np.nan
            rows.append((condition, measure, figure, low, high, len(values), len(part)))
    return pd.DataFrame(rows, columns=SUMMARY)


def tabulate(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary as one reads it: one row per condition, one column per measure, "figure (low to high)".

    Column `measured` is the number of clips behind the figures of a row; a figure over fewer says so itself.
    """
    most = summary.groupby("condition").measured.max()
    text = [format_figure(row.figure, row.low, row.high)
            + (f", {row.measured} measured" if 0 < row.measured < most[row.condition] else "") for row in summary.itertuples()]
    wide = summary.assign(text=text).pivot(index="condition", columns="measure", values="text")
    wide = wide.loc[summary.condition.unique(), summary.measure.unique()].rename(columns=LABELS | intelligibility.LABELS)
    return wide.assign(measured=most)


def format_figure(figure: float, low: float, high: float) -> str:
    """Return "0.95 (0.93 to 0.97)", to three digits; "not measured" for NaN."""
    if not np.isfinite(figure):
        return "not measured"
    digits = 2 if max(abs(figure), abs(high)) < 2 else 1
    if not np.isfinite(low):
        return f"{figure:.{digits}f}"
    return f"{figure:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# Verdict


def check_controls(evidence) -> pd.DataFrame:
    """Return one row per set of clips and control: what it should do, what it does, and so whether it behaves.

    A check that fails an unchanged clip or passes a flattened melody measures something else: then there is no verdict. A
    criterion that a control has no measured clip of says nothing of it, and a set without any measured clip has no row.
    """
    columns, rows = ["clips", "control", "should", "does", "fails on", "behaves"], []
    for part in evidence:
        if not part.summary.measured.sum():
            continue
        first = part.criteria[0].measure
        seen = part.summary[part.summary.measured > 0]
        figures = {name: group.set_index("measure") for name, group in seen.groupby("condition")}
        for name, expected in part.controls.items():
            group = figures.get(name, seen.iloc[:0].set_index("measure"))
            known = [c for c in part.criteria if c.measure in group.index]
            broken = [c.label for c in known if not c.holds(group.figure[c.measure])]
            found = "fails" if broken else "passes"
            if expected == "lowers" and first in group.index and first in figures.get("Vorbis", group.iloc[:0]).index:
                found = "lowers" if group.high[first] < figures["Vorbis"].low[first] else "does not lower"
            elif expected == "lowers" or not known:
                found = "not measured"
            rows.append((part.name, name, expected, found, ", ".join(broken), found == expected))
    return pd.DataFrame(rows, columns=columns)


def judge_codec(evidence, codebooks: int, min_clips: int = MIN_CLIPS):
    """Return (table, verdict) for a number of codebooks: a row per criterion; "go", "stop" or "unclear" for the codec.

    A row is go when the whole interval meets the criterion, stop when none of it does, else unclear; unclear as well if a
    control of its evidence misbehaves or was not measured, whatever the codec scored. A row of fewer than `min_clips`
    measured clips decides nothing: it is "not counted" where other clips measure the same, else unclear, since a trait that
    nothing measures is not known to be kept. The codec is go when every row that counts is, stop when one is.
    """
    controls, rows = check_controls(evidence), []
    for part in evidence:
        figures = part.summary[part.summary.condition == name_condition(codebooks)].set_index("measure")
        unchanged = part.summary[part.summary.condition == "identity"].set_index("measure").measured
        misbehaving = controls[(controls.clips == part.name) & ~controls.behaves.astype(bool)].control.tolist()
        for criterion in part.criteria:
            known = criterion.measure in figures.index
            figure, low, high, measured, found = figures.loc[criterion.measure, FIGURES] if known else [np.nan] * 3 + [0, 0]
            holds = [criterion.holds(edge) for edge in (low, high)]
            verdict = "go" if all(holds) else "unclear" if any(holds) else "stop"
            if measured < min_clips:
                counted = f"{int(measured)} of {min_clips} clips" if measured else "not measured"
                lost = unchanged.get(criterion.measure, 0) >= min_clips  # there was enough before the codec
                verdict = f"{'unclear' if lost else 'few'}: {counted}" + (f" ({part.note})" if part.note else "")
            elif misbehaving:
                verdict = f"unclear: control {', '.join(misbehaving)} misbehaves"
            rows.append((criterion.trait, part.name, criterion.label, str(criterion), figure, low, high, int(measured),
                         int(found), verdict))
    columns = ["trait", "on", "measure", "criterion", *FIGURES, "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    few = table.verdict.str.startswith("few: ")
    elsewhere = table.measure.isin(table.measure[~few])
    said = table.verdict.str.removeprefix("few: ")
    table["verdict"] = table.verdict.mask(few & elsewhere, "not counted: " + said).mask(few & ~elsewhere, "unclear: " + said)
    verdicts = set(table.verdict[~few | ~elsewhere])
    return table, "stop" if "stop" in verdicts else "go" if verdicts == {"go"} else "unclear"


def describe_verdict(table, verdict: str, language: str, codebooks: int, source: str) -> str:
    """Return the verdict in words: for which language, codec setting and clips, what decided it, and what did not count."""
    aside = table.verdict.str.startswith("not counted")
    left = [f"{row.trait} ({row.on}): {row.verdict.split(': ', 1)[1]}" for row in table[aside].itertuples()]
    left = f" Not counted: {'; '.join(dict.fromkeys(left))}." if left else ""
    why = describe_reason(table, verdict)
    return f"{get_language(language).name} through {name_condition(codebooks)}: {verdict}. {why}.{left} On {source}."


def describe_reason(table, verdict: str) -> str:
    """Return the criteria that decided a verdict, each with its figure and what was wanted."""
    counted = table[~table.verdict.str.startswith("not counted")]
    decisive = counted if verdict == "go" else counted[counted.verdict.str.startswith(verdict)]
    return "; ".join(
        f"{row.trait} ({row.on}): {row.measure} {format_figure(row.figure, row.low, row.high)}, wanted {row.criterion}"
        + (f" ({row.verdict.split(': ', 1)[1]})" if ": " in row.verdict else "")
        for row in decisive.itertuples()
    )


def list_metrics(table, measures, controls, set_aside, codebooks: int) -> dict:
    """Return what metrics.json keeps of a check: each gated figure, the counts, the verdict table and the controls.

    A measure that several sets of clips have is named after the first that counts; all are in the table.
    """
    labels = {label: measure for measure, label in LABELS.items()}
    order = table.sort_values("verdict", key=lambda verdict: verdict.str.startswith("not counted"), kind="stable")
    return {labels[row.measure]: row.figure for row in order[::-1].itertuples()} | {
        "clips": measures.audio_path.nunique(), "codebooks": codebooks, "set_aside": len(set_aside),
        "table": table.to_dict("records"), "controls": controls.to_dict("records"),
    }  # fmt: skip
