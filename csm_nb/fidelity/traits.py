"""What a language lives on, beside its melody: clips that hold stød or tonal accent, and what the codec leaves of it."""

from pathlib import Path

import numpy as np
import pandas as pd

from csm_nb.clips.check import check_clips
from csm_nb.corpora.sources import load_corpus
from csm_nb.fidelity.clips import code_clips, measure_clips, name_clip
from csm_nb.fidelity.clips import list_unmeasured as list_unmeasured_clips
from csm_nb.fidelity.verdict import Criterion, Evidence, summarise, tabulate
from csm_nb.languages import get_language
from csm_nb.manifest import read_manifest
from csm_nb.paths import resolve_path
from csm_nb.prosody import klatt, marks, stod
from csm_nb.prosody.f0 import ProsodyError, to_semitones, track_f0

# The project's starting gates. Stød that was taken out by construction is retained by .14 at most, Vorbis at its lowest
# quality retains .90 to .95, and one spread is what windows without stød differ by among themselves.
STOD = (Criterion("stød", "stod_retention", "stød retention", ">=", 0.7),
        Criterion("stød", "stod_rise", "rise without stød (spreads)", "<=", 0.5))
ACCENT = (Criterion("pitch accent", "accent_right", "accents told apart (share)", ">=", 0.95),)
STOD_WORDS, STOD_RECORDINGS, ACCENT_WORDS = "KlattGrid words with stød", "recorded words with stød", "KlattGrid words with accent"
FEW_MARKED = 200  # recordings with known stød that are taken at most


def list_criteria(language: str) -> tuple[Criterion, ...]:
    """Return the criteria of the traits that a language has."""
    traits = get_language(language).traits
    return STOD * ("stod" in traits) + ACCENT * (language in klatt.CONTOURS)


def find_trait_clips(language: str, audio: str, marked: str, asr, seed: int, out_dir) -> tuple[dict, list[dict], dict]:
    """Return ({STOD_WORDS: rows, ...}, rows set aside with the `reason`, {STOD_RECORDINGS: what there was}) for a language.

    Ground truth by KlattGrid always: stød words for a language with stød, words with accent 1 and 2 where their contours
    are known (klatt.CONTOURS). With recordings (`audio`), also those whose stød is marked or labelled (marks.find_windows).
    """
    traits, found, set_aside, notes = get_language(language).traits, {}, [], {}
    if "stod" in traits:
        found[STOD_WORDS] = read_manifest(klatt.make_stod_corpus(Path(out_dir) / "klatt_stod"))
    if "stod" in traits and audio:
        rows = load_corpus(resolve_path(audio), language)
        names = marks.read_marks(resolve_path(marked)) if marked else {}
        named, _ = marks.match_marks(rows, names)
        known = [row for row in rows if row.get("stod") is not None or row.get("windows") or row["audio_path"] in named]
        drawn = [known[i] for i in np.random.default_rng(seed).permutation(len(known))[:FEW_MARKED]]
        good, bad = check_clips(drawn, need_text=False, need_one=False)
        found[STOD_RECORDINGS], unmarked = marks.find_windows(good, names, asr, among=rows)
        set_aside = bad + unmarked
        notes[STOD_RECORDINGS] = _describe_marked(rows, known, drawn, found[STOD_RECORDINGS], names, named)
    if "pitch_accent" in traits and language in klatt.CONTOURS:
        found[ACCENT_WORDS] = read_manifest(klatt.make_accent_corpus(language, Path(out_dir) / "klatt_accent"))
    return found, set_aside, notes


def _describe_marked(rows, known, drawn, found, names, named):
    """Describe how many recordings there are, say if they have stød, were drawn, and where in how many; marks that fit none."""
    said = [f"{len(rows)} clips, {len(known) or 'none'} labelled"]
    if len(drawn) < len(known):
        said.append(f"{len(drawn)} of them drawn")
    if known:
        said.append(f"the place found in {len(found) or 'none'}")
    if lost := sorted(set(names) - set(named.values())):
        said.append(f"{len(lost)} of {len(names)} marked files are not among the clips, such as {lost[0]!r}")
    return ", ".join(said)


def describe_traits(language: str, found: dict, notes: dict) -> str:
    """Return in words which clips tell of the traits of a language, or that there is nothing to tell."""
    lines = [f"{name}: {notes.get(name) or f'{len(rows)} words'}" for name, rows in found.items()]
    return "\n".join(lines) or f"{get_language(language).name} has neither stød nor tonal accent: nothing to measure here"


def code_traits(found: dict[str, list], codec, codebooks) -> dict[str, list]:
    """Return {name: coded clips} of find_trait_clips' rows, each at each number of codebooks and with its controls."""
    return {name: code_clips(rows, codec, codebooks) for name, rows in found.items()}


def weigh_traits(coded: dict[str, list], notes: dict | None = None) -> tuple[list[Evidence], pd.DataFrame]:
    """Return ([Evidence, ...], table of every window or word and condition) of code_traits' clips, for the verdict.

    A set without clips is evidence of which nothing was measured; `notes` say why (find_trait_clips).
    """
    evidence, tables = [], []
    for name, clips in coded.items():
        note = (notes or {}).get(name, "")
        if name != ACCENT_WORDS:
            table = stod.measure_retention(stod.measure_windows(clips))
            summary = summarise(table, stod.MEASURES)
            with_stod = table.groupby("condition").stod.sum()
            for measure, count in (("stod_retention", with_stod), ("stod_rise", table.groupby("condition").size() - with_stod)):
                rows = summary.measure == measure
                summary.loc[rows, "found"] = summary[rows].condition.map(count)
            controls = {"identity": "passes", "Vorbis": "passes", "smooth voicing": "lowers"}
            evidence.append(Evidence(name, summary, STOD, controls, note))
        else:
            table = measure_clips(clips).drop(columns="reason").merge(tell_accents(clips), on=["audio_path", "condition"])
            measures = ("accent_right", "peak_shift_ms", "valley_shift_ms", "turns_kept_percent", "h2_h1_error_st")
            controls = {"identity": "passes", "Vorbis": "passes", "flat F0": "fails"}
            evidence.append(Evidence(name, summarise(table, measures, "mean"), ACCENT, controls, note))
        tables.append(table)
    tables = [table for table in tables if len(table)]
    return evidence, pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def tabulate_evidence(evidence: list[Evidence]) -> pd.DataFrame:
    """Return the figures of each set of clips as one reads them: one row per condition, one column per measure."""
    tables = {part.name: tabulate(part.summary) for part in evidence if part.summary.measured.sum()}
    return pd.concat(tables, names=["clips of"]).fillna("") if tables else pd.DataFrame()


def list_unmeasured(table: pd.DataFrame, unmarked: list[dict]) -> pd.DataFrame:
    """Return which clips say nothing about a trait, in which condition, and why: clip, condition, reason."""
    rows = pd.DataFrame([{"clip": name_clip(row), "condition": "all", "reason": row["reason"]} for row in unmarked])
    return pd.concat([rows, list_unmeasured_clips(table)], ignore_index=True) if len(table) else rows


def pick_examples(coded: dict[str, list], table: pd.DataFrame) -> dict:
    """Return {name: a coded clip to look at}: the one with most cues of stød by weigh_traits' table, or one with accent 2."""
    if "cues" in table:
        cues = table.groupby("audio_path").cues.first().fillna("").str.count(",")
    return {
        name: max(clips, key=lambda clip: clip.row.get("accent", 0) if name == ACCENT_WORDS else cues[clip.row["audio_path"]])
        for name, clips in coded.items() if clips
    }


def tell_accents(clips) -> pd.DataFrame:
    """Return for each version of KlattGrid's accent words whether it is still its own accent: accent_right, 1 or 0.

    It is right when its F0, in semitones, lies nearer to its original's than to that of the other accent by the same
    voice at the same rate (`pair`), and wrong where F0 is lost. `reason` says of a word that it has no voice.
    """
    def track(wav, clip):
        try:
            return to_semitones(track_f0(wav, pitch_range=clip.pitch_range).f0)
        except ProsodyError:
            return np.full(1, np.nan)

    def distance(heard, line):
        length = min(len(heard), len(line))
        squares = (heard[:length] - line[:length]) ** 2
        return np.sqrt(np.nanmean(squares)) if np.isfinite(squares).any() else np.nan

    lines = {(clip.row["pair"], clip.row["accent"]): track(clip.original, clip) for clip in clips}
    rows = []
    for clip in clips:
        own, other = (lines[clip.row["pair"], accent] for accent in (clip.row["accent"], 3 - clip.row["accent"]))
        for condition, wav in clip.versions.items():
            heard = track(wav, clip)
            rows.append({"audio_path": clip.row["audio_path"], "condition": condition,
                         "accent_right": 1.0 if distance(heard, own) < distance(heard, other) else 0.0,
                         "reason": "" if np.isfinite(heard).any() else "no voice left"})
    return pd.DataFrame(rows)
