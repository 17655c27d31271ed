"""The clips of the codec check: found, coded at every number of codebooks, and measured."""

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import soundfile

from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.clips.check import check_clips
from csm_nb.codec.mimi import decode, encode
from csm_nb.corpora.sources import load_corpus
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.manifest import read_manifest
from csm_nb.paths import resolve_path
from csm_nb.prosody.f0 import METHODS, ProsodyError, compare_clip, find_pitch_range, flatten_f0, track_f0
from csm_nb.prosody.stod import smooth_voicing
from csm_nb.synth.corpus import HELD_OUT_VOICES, make_corpus
from csm_nb.text.sentences import make_sentences

SHORT = 0.5  # s; shorter clips are taken only where there are not enough others
MIN_CLIPS = 10  # measured clips below which no verdict is given


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
        """Return what a figure calls the clip."""
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
        source = ("synthetic speech by espeak-ng, no recordings: it shows nothing of how people say the language, and a stop "
                  "on it forbids no training")
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
            version |= {"identity": wav, "Vorbis": pass_vorbis(wav), "flat F0": _try_change(flatten_f0, wav, pitch_range)}
            if row.get("windows"):
                version["smooth voicing"] = _try_change(smooth_voicing, wav, pitch_range)
        coded.append(CodedClip(row, wav, version, pitch_range, median))
    return coded


def _describe_voice(wavs):
    """Return (F0 range, median F0) of one speaker's clips in Hz; the median is NaN where nothing is voiced."""
    pitch_range = find_pitch_range(wavs)
    f0 = [np.nan]
    for wav in wavs:
        try:
            f0.extend(track_f0(wav, pitch_range=pitch_range).f0)
        except ProsodyError:
            continue
    return pitch_range, float(np.nanmedian(f0)) if np.isfinite(f0).any() else float("nan")


def pass_vorbis(wav) -> np.ndarray:
    """Return a clip (24 kHz) after Vorbis at its lowest quality: a control that a sound check lets pass."""
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
    """Return one row per coded clip and condition: clip, audio_path, condition, the MEASURES, `reason` of a NaN.

    `method` is the F0 tracker, one of f0.METHODS: a finding that another one shares is not the tracker's.
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
