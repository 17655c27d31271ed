"""The codec check: clips through the codec, measured beside controls, and a verdict by criteria stated before."""

import io
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import soundfile

from csm_nb import sounds
from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.codec import decode, encode
from csm_nb.corpora import check_clips, load_corpus, read_manifest
from csm_nb.judge import bootstrap_interval, share_interval
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.params import resolve_path
from csm_nb.prosody import MEASURES, METHODS, ProsodyError, compare_clip, find_pitch_range, flatten_f0, track_f0
from csm_nb.stod import smooth_voicing
from csm_nb.synth import HELD_OUT_VOICES, make_corpus
from csm_nb.texts import make_sentences

SHORT = 0.5  # s; shorter clips are taken only where there are not enough others
FIGURES = ["figure", "low", "high", "measured", "found"]
SUMMARY = ["condition", "measure", "statistic", *FIGURES]
SHARES = ("accent_right", "right_language")  # of a clip 1 or 0: their mean is a share
MIN_CLIPS = 10  # measured clips below which no verdict is given


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


@dataclass(frozen=True)
class CodedClip:
    """A clip and what came of it: `versions` maps "8 codebooks", or a control's name, to its samples.

    `pitch_range` (Hz) and `median_f0` (Hz) are the speaker's, over the clips that were coded together.
    """

    row: dict
    original: np.ndarray
    versions: dict
    pitch_range: tuple[float, float]
    median_f0: float

    @property
    def title(self) -> str:
        """What a figure calls the clip."""
        return name_clip(self.row)


def name_clip(row: dict) -> str:
    """Return what tables and figures call a clip: its text, or where that is empty its file, and the speaker."""
    name = f"“{row['text']}”" if row.get("text") else str(row["audio_path"]).rsplit("/", 1)[-1]
    return f"{name}, speaker {row.get('speaker_id', '?')}"


def name_condition(codebooks: int) -> str:
    """Return what tables and figures call a number of codebooks: "1 codebook", "8 codebooks"."""
    return f"{codebooks} codebook{'s' if codebooks > 1 else ''}"


# Clips


def list_languages(audio: str, language: str) -> list[str]:
    """Return the languages there are clips of: all where speech is synthetic, a manifest's own, or just `language`."""
    if not audio:
        return list(LANGUAGES)
    path = resolve_path(audio)
    path = path / "manifest.jsonl" if (path / "manifest.jsonl").is_file() else path
    found = {row["language"] for row in read_manifest(path)} if path.is_file() else {language}
    return [code for code in LANGUAGES if code in found]


def find_clips(audio: str, language: str, count: int, seed: int, out_dir) -> tuple[list[dict], list[dict], str]:
    """Return (rows, rows set aside with their "reason", what they are) for a random sample of `count` usable clips.

    `audio` is a manifest or a folder; clips of half a second and more come first, and a file counts once. Without it
    espeak-ng speaks held-out sentences with held-out voices into `out_dir`. Clips need no text. Up to twice `count` are
    looked at. Raises CorpusError if there is no usable clip.
    """
    if not audio:
        texts = make_sentences(language, count, seed, "test")
        rows = read_manifest(make_corpus(texts, language, resolve_path(out_dir) / f"clips_{language}", HELD_OUT_VOICES))
        source = ("synthetic speech by espeak-ng, no recordings: it shows nothing of how people say the language, though a stop "
                  "holds back training until there is a verdict on recordings")
    else:
        rows = list({row["audio_path"]: row for row in load_corpus(resolve_path(audio), language)}.values())
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        rows.sort(key=lambda row: (row.get("duration") or SHORT) < SHORT)
        source = f"{len(rows)} clips of {get_language(language).name} in {audio}"
    good, set_aside = check_clips(rows[: 2 * count], need_text=False)
    good = good[:count]
    return good, set_aside, source if not audio or len(good) == len(rows) else f"{len(good)} of the {source}"


def code_clips(rows, codec, codebooks, controls: bool = True) -> list[CodedClip]:
    """Return each clip at each number of codebooks, and with `controls` unchanged, as poor Vorbis, and on one tone.

    A clip with windows of stød also has its voicing smoothed.

    Raises AudioError for a clip that cannot be read (check_clips sets such ones aside) and ValueError for more
    codebooks than the codec has.
    """
    wavs = [read_audio(row["audio_path"]) for row in rows]
    codes = encode(codec, wavs, max(codebooks))
    versions = [{} for _ in rows]
    for count in sorted(codebooks):
        for wav, out, version in zip(wavs, decode(codec, [code[:, :count] for code in codes]), versions, strict=True):
            version[name_condition(count)] = out[: len(wav)]
    speakers = [row.get("speaker_id", "") for row in rows]
    voices = {
        name: _describe_voice([wav for wav, speaker in zip(wavs, speakers, strict=True) if speaker == name])
        for name in set(speakers)
    }
    coded = []
    for row, wav, version, speaker in zip(rows, wavs, versions, speakers, strict=True):
        pitch_range, median = voices[speaker]
        if controls:
            version |= {"identity": wav, "Vorbis": _pass_vorbis(wav), "flat F0": _try_change(flatten_f0, wav, pitch_range)}
            if row.get("windows"):
                version["smooth voicing"] = _try_change(smooth_voicing, wav, pitch_range)
        coded.append(CodedClip(row, wav, version, pitch_range, median))
    return coded


def _describe_voice(wavs):
    """(F0 range, median F0) of one speaker's clips in Hz; the median is NaN where nothing is voiced."""
    pitch_range = find_pitch_range(wavs)
    f0 = [np.nan]
    for wav in wavs:
        try:
            f0.extend(track_f0(wav, pitch_range=pitch_range).f0)
        except ProsodyError:
            continue
    return pitch_range, float(np.nanmedian(f0)) if np.isfinite(f0).any() else float("nan")


def _pass_vorbis(wav):
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, SAMPLE_RATE, format="OGG", subtype="VORBIS", compression_level=1.0)
    buffer.seek(0)
    return soundfile.read(buffer, dtype="float32")[0]


def _try_change(change, wav, pitch_range):
    try:
        return change(wav, pitch_range=pitch_range)
    except ProsodyError:
        return wav  # too short to be measured at all; compare_clip says so


def list_sounds(clip: CodedClip, codebooks) -> list[tuple[str, np.ndarray]]:
    """Return [(label, wav), ...] of a clip to look at or play: the original, then each number of codebooks."""
    conditions = [name_condition(count) for count in sorted(codebooks)]
    return [("original", clip.original), *((name, clip.versions[name]) for name in conditions)]


# Measures


def measure_clips(clips, method: str = "praat") -> pd.DataFrame:
    """Return one row a coded clip and condition: clip, audio_path, condition, the MEASURES, `reason` of a NaN.

    `method` is the F0 tracker, one of prosody.METHODS: a finding that another one shares is not the tracker's.
    Raises ProsodyError for another name.
    """
    if method not in METHODS:
        raise ProsodyError(f"f0_method is {method!r}; allowed are {', '.join(METHODS)}")
    return pd.DataFrame([
        {"clip": clip.title, "audio_path": clip.row["audio_path"], "condition": condition}
        | compare_clip(clip.original, version, pitch_range=clip.pitch_range, method=method)
        for clip in clips for condition, version in clip.versions.items()
    ])  # fmt: skip


def list_unmeasured(measures: pd.DataFrame) -> pd.DataFrame:
    """Return which clips count in no figure, or not in all: clip, the conditions it is so in ("all"), and the reason."""
    part, every = measures[measures.reason != ""], measures.condition.nunique()
    grouped = part.groupby(["clip", "reason"], sort=False).condition.unique()
    grouped = grouped.map(lambda names: "all" if len(names) == every else ", ".join(names)).reset_index()
    return grouped[["clip", "condition", "reason"]]


def summarise(measures: pd.DataFrame, names=MEASURES, statistic: str = "median") -> pd.DataFrame:
    """Return one row per condition and measure, with the columns SUMMARY.

    `figure` is the `statistic` over clips ("median" or "mean"; "share" for the SHARES, whatever is asked for), low and high
    its 95 % interval (bootstrap; of a share by Wilson), `measured` the clips that it is over, `found` all there were.
    """
    rows = []
    for condition, part in measures.groupby("condition", sort=False):
        for measure in names:
            values = part[measure].to_numpy(float)
            values = values[np.isfinite(values)]
            if measure in SHARES:
                name, compute, (low, high) = "share", np.mean, share_interval(values.sum(), len(values))
            else:
                name, compute = statistic, getattr(np, statistic)
                low, high = bootstrap_interval(values, compute)
            figure = float(compute(values)) if len(values) else np.nan
            rows.append((condition, measure, name, figure, low, high, len(values), len(part)))
    return pd.DataFrame(rows, columns=SUMMARY)


def tabulate(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary as one reads it: a row per condition, a column per measure, "figure (low to high)".

    Column `measured` is the number of clips behind the figures of a row; a figure over fewer says so itself.
    """
    most = summary.groupby("condition").measured.max()
    text = [format_figure(row.figure, row.low, row.high)
            + (f", {row.measured} measured" if 0 < row.measured < most[row.condition] else "") for row in summary.itertuples()]
    wide = summary.assign(text=text).pivot(index="condition", columns="measure", values="text")
    wide = wide.loc[summary.condition.unique(), summary.measure.unique()].rename(columns=LABELS | sounds.LABELS)
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
    """Return a row per set of clips and control: what it should do, what it does, and so whether it behaves.

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
    decisive = table[~aside] if verdict == "go" else table[table.verdict.str.startswith(verdict)]
    why = "; ".join(
        f"{row.trait} ({row.on}): {row.measure} {format_figure(row.figure, row.low, row.high)}, wanted {row.criterion}"
        + (f" ({row.verdict.split(': ', 1)[1]})" if ": " in row.verdict else "")
        for row in decisive.itertuples()
    )
    left = [f"{row.trait} ({row.on}): {row.verdict.split(': ', 1)[1]}" for row in table[aside].itertuples()]
    left = f" Not counted: {'; '.join(dict.fromkeys(left))}." if left else ""
    return f"{get_language(language).name} through {name_condition(codebooks)}: {verdict}. {why}.{left} On {source}."


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
