"""Stød through the codec as paired retention: what is left, in the same window of the decoded clip, of what was there.

An absolute index of stød does not work on unaligned audio, and no single cue marks stød: speakers use an F0 dip, a dip of
intensity, irregular periods, or some of these (Fischer-Jørgensen 1989; Hansen 2016). So each cue is held against windows
without stød first, and only cues that a window really has are followed through the codec.
"""

import numpy as np
import pandas as pd
import parselmouth
from parselmouth.praat import call
from scipy.ndimage import gaussian_filter1d

from csm_nb.audio import SAMPLE_RATE
from csm_nb.prosody.f0 import TIME_STEP, ProsodyError, track_f0
from csm_nb.prosody.quality import measure_low_band, track_voice

# The cues, larger where there is more stød, and the least spread that windows without stød are taken to have: below it
# a difference is no cue (F0: twice it is the least step that listeners report; the others: Vorbis changes them by less).
CUES = {
    "f0_drop": ("F0 drop (semitones)", 1.0),
    "low_dip": ("low-band dip (dB)", 1.5),
    "hnr_dip": ("HNR dip (dB)", 3.0),
    "cpp_dip": ("CPP dip (dB)", 2.0),
    "irregularity": ("irregular periods", 0.03),
    "unvoiced": ("voice lost (share)", 0.05),
}
EXPRESSED = 2.0  # spreads above the windows without stød from which a cue counts as there
CREAK = 0.15  # s; as long as F0 may be missing within a voice that is smoothed
PHASES = (0.4, 0.8)  # of the rhyme: raised voice up to the first, stød between the two (Fischer-Jørgensen 1989)
VOICED = 0.5  # share of the first phase; a window that begins with less voice is not on a sonorant
LEAST_PLAIN = 5  # windows without stød below which nothing can be compared
MEASURES = ("stod_retention", "stod_rise")


def measure_windows(clips) -> pd.DataFrame:
    """Return the CUES of every window of coded clips (clips.CodedClip), in the original and in each version.

    One row per window and condition ("original" first): clip, audio_path, condition, start, end (s), stod (bool), the cues
    (NaN where one can not be measured), and `voiced`, the share of the first phase. Windows are `row["windows"]`,
    [[start, end, stød or not], ...] (marks.find_windows).
    """
    rows = []
    for clip in clips:
        for condition, wav in ({"original": clip.original} | clip.versions).items():
            try:
                track = track_f0(wav, pitch_range=_widen(clip.pitch_range))
                voice = track_voice(wav, track, pitch_range=clip.pitch_range)
            except ProsodyError:
                track = voice = None
            for start, end, stod in clip.row.get("windows", []):
                cues = dict.fromkeys([*CUES, "voiced"], np.nan) if track is None else measure_cues(track, voice, start, end)
                rows.append({"clip": clip.title, "audio_path": clip.row["audio_path"], "condition": condition,
                             "start": start, "end": end, "stod": bool(stod)} | cues)
    return pd.DataFrame(rows, columns=["clip", "audio_path", "condition", "start", "end", "stod", *CUES, "voiced"])


def _widen(pitch_range):
    """Return a range that reaches an octave below the speaker's: where the voice creaks, its period doubles."""
    return max(40.0, 0.5 * pitch_range[0]), pitch_range[1]


def measure_cues(track, voice, start: float, end: float) -> dict:
    """Return the CUES in one sonorant rhyme, `start` to `end` in s: its second phase against its first.

    F0 drop: 12 log2(F0 max of the first / F0 min of the second). Dips: median of the first phase less the lowest of the
    second; HNR and CPP count as 0 dB where there is no voice. Irregularity: third quartile of the second phase.
    """
    share = (track.times - start) / (end - start)
    first, second = (share >= 0) & (share < PHASES[0]), (share >= PHASES[0]) & (share < PHASES[1])
    cues = dict.fromkeys([*CUES, "voiced"], np.nan)
    if not first.any() or not second.any():
        return cues
    high, low = (track.f0[part][track.voiced[part]] for part in (first, second))
    if len(high) and len(low):
        cues["f0_drop"] = float(12 * np.log2(high.max() / low.min()))
    for name, values in (("low_dip", voice.low_db), ("hnr_dip", np.nan_to_num(track.hnr)), ("cpp_dip", np.nan_to_num(voice.cpp))):
        cues[name] = float(np.median(values[first]) - values[second].min())
    periods = voice.irregularity[second]
    if np.isfinite(periods).any():
        cues["irregularity"] = float(np.nanpercentile(periods, 75))
    cues["unvoiced"] = float(1 - track.voiced[second].mean())
    cues["voiced"] = float(track.voiced[first].mean())
    return cues


def measure_retention(windows: pd.DataFrame) -> pd.DataFrame:
    """Return what each version keeps of stød: one row per window and condition, with the MEASURES and `reason` of a NaN.

    Each cue counts from the median of the original's windows without stød, in units of their spread. stod_retention, of a
    window with stød: the mean over the cues it has (EXPRESSED spreads or more) of the share that is left, each within 0
    and 1, so that more of one cue never makes up for another. stod_rise, of a window without: the mean change of its
    cues in spreads; it shows a codec that makes every voice creak. `cues` names what the window has.
    """
    original = windows[windows.condition == "original"]
    plain = original[~original.stod & (original.voiced >= VOICED)][list(CUES)]
    key = ["audio_path", "start", "end"]
    before = original.set_index(key)
    usual = plain.median()
    spread = (1.4826 * (plain - usual).abs().median()).clip(lower=pd.Series({name: least for name, (_, least) in CUES.items()}))
    rows = []
    for after in windows[windows.condition != "original"].to_dict("records"):
        was = before.loc[tuple(after[name] for name in key)]
        result = {name: after[name] for name in ("clip", "audio_path", "condition", "start", "end", "stod")}
        result |= dict.fromkeys(MEASURES, np.nan) | {"cues": "", "reason": ""}
        now = pd.Series({name: after[name] for name in CUES})
        voiced, was = was.voiced, was[list(CUES)].astype(float)
        if not voiced >= VOICED:
            result["reason"] = "the original is not voiced where the window begins"
        elif len(plain) < LEAST_PLAIN:
            result["reason"] = f"windows without stød to compare with: {len(plain)}; {LEAST_PLAIN} are needed"
        elif after["stod"]:
            has = (was - usual) / spread >= EXPRESSED
            result["cues"] = ", ".join(CUES[name][0] for name in CUES if has[name])
            if has.any():
                left = ((now - usual) / (was - usual))[has].fillna(0).clip(0, 1)
                result["stod_retention"] = float(left.mean())
            else:
                result["reason"] = "no cue of stød stands out in the original"
        else:
            change = ((now - was) / spread).dropna()
            result["stod_rise"] = float(change.mean()) if len(change) else np.nan
            result["reason"] = "" if len(change) else "no cue can be measured"
        rows.append(result)
    columns = ["clip", "audio_path", "condition", "start", "end", "stod", "cues", *MEASURES, "reason"]
    return pd.DataFrame(rows, columns=columns)


def smooth_voicing(wav, sample_rate: int = SAMPLE_RATE, pitch_range=None) -> np.ndarray:
    """Return a clip with even periods and a smooth F0 wherever it is voiced: a control that must lose stød.

    A vocoder: Praat's LPC of the clip, driven by pulses along F0 smoothed over 50 ms. Gaps of up to 150 ms are bridged, and
    as much behind the last voice as is not 25 dB below the clip's loudest: creak is what a tracker hears no voice in. The
    clip's intensity stays, and what is unvoiced otherwise is its own. Raises ProsodyError where it is too short.
    """
    wav = np.asarray(wav, dtype=np.float64)
    track = track_f0(wav, sample_rate, pitch_range)
    voiced = np.flatnonzero(track.voiced)
    if len(voiced) < 3:
        return wav.astype(np.float32)
    bridged = np.zeros(len(track.times), dtype=bool)
    creak = round(CREAK / TIME_STEP)
    low = measure_low_band(wav, track.times, sample_rate)
    for run in np.split(voiced, np.flatnonzero(np.diff(voiced) > creak) + 1):
        bridged[run[0] : run[-1] + 1] = True
        bridged[run[-1] : run[-1] + creak] |= low[run[-1] : run[-1] + creak] > low.max() - 25
    f0 = np.exp(gaussian_filter1d(np.interp(track.times, track.times[voiced], np.log(track.f0[voiced])), 0.05 / TIME_STEP))
    sound = parselmouth.Sound(wav, sample_rate)
    tier = call("Create PitchTier", "smooth", 0, sound.duration)
    for time, frequency in zip(track.times[::4], f0[::4], strict=True):
        call(tier, "Add point", float(time), float(frequency))
    pulses = call(call(tier, "To PointProcess"), "To Sound (pulse train)", sample_rate, 1, 0.05, 30)
    filtered = call([call(sound, "To LPC (autocorrelation)", sample_rate // 1000 + 2, 0.025, TIME_STEP, 50), pulses],
                    "Filter", "no").values[0]
    filtered = np.pad(filtered, (0, max(0, len(wav) - len(filtered))))[: len(wav)]
    level, made = (np.sqrt(gaussian_filter1d(x**2, 0.012 * sample_rate) + 1e-12) for x in (wav, filtered))
    share = np.interp(np.arange(len(wav)) / sample_rate, track.times, bridged.astype(float))
    share = gaussian_filter1d(share, 0.005 * sample_rate)
    return (share * filtered * level / made + (1 - share) * wav).astype(np.float32)
