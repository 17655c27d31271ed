"""Tonal accent: where an F0 contour turns and how high its peaks are, and what a decoded copy leaves of that."""

import numpy as np
from scipy import ndimage, signal

PROMINENCE = 1.5  # semitones by which a turn stands out; as much is heard as a difference (Rietveld and Gussenhoven 1985)
SMOOTHING = 0.015  # s; standard deviation of the Gaussian, lighter than the 70 ms triangle of ProsodyPro (Xu 2013)
BRIDGE = 0.05  # s; voiced frames this near are one stretch: no voice leaps 6 semitones within it (Xu and Sun 2002)
MATCH_WINDOW = 0.1  # s within which a turn is the same turn; a frame of Mimi is 80 ms
MEASURES = ("peak_shift_ms", "valley_shift_ms", "turns_kept_percent", "h2_h1_error_st")


def smooth_contour(track, reference: float | None = None) -> np.ndarray:
    """Return the F0 of a track (f0.F0Track) as one smooth line, (frames,), in semitones about `reference` Hz.

    Without a reference about its own median. Octave leaps within a voiced stretch are folded back to where most of it lies,
    unvoiced gaps are bridged by straight lines. NaN before the first voiced frame and after the last.
    """
    contour = np.full(len(track.f0), np.nan)
    voiced = np.flatnonzero(np.isfinite(track.f0))
    if len(voiced) == 0:
        return contour
    f0, times = track.f0[voiced], track.times[voiced]
    semitones = 12 * np.log2(f0 / (np.median(f0) if reference is None else reference))
    stretches = np.split(semitones, np.flatnonzero(np.diff(times) > BRIDGE) + 1)
    line = np.arange(voiced[0], voiced[-1] + 1)
    joined = np.interp(line, voiced, np.concatenate([_fold_octaves(stretch) for stretch in stretches]))
    step = track.times[1] - track.times[0] if len(track.times) > 1 else SMOOTHING
    contour[line] = ndimage.gaussian_filter1d(joined, SMOOTHING / step, mode="nearest")
    return contour


def _fold_octaves(semitones):
    folded = np.unwrap(semitones, period=12)
    return folded - np.sort(np.round(folded - semitones))[len(folded) // 2]


def find_turns(track, reference: float | None = None, prominence: float = PROMINENCE) -> list[tuple[float, float, str]]:
    """Return where F0 turns, in order: (time in s, semitones as in smooth_contour, "peak" or "valley").

    A turn stands out by `prominence` semitones. Where the voice starts or stops high or low is one as well: a voiceless
    consonant hides the rise to the first peak of accent 2, and East Norwegian words end on a high.
    """
    contour = smooth_contour(track, reference)
    line = np.flatnonzero(np.isfinite(contour))
    turns = []
    for kind, sign in (("peak", 1), ("valley", -1)) if len(line) else ():
        heights = sign * contour[line]
        spots, _ = signal.find_peaks(np.pad(heights, 1, constant_values=heights.min()), prominence=prominence)
        turns += [(float(track.times[i]), float(contour[i]), kind) for i in line[spots - 1]]
    return sorted(turns)


def compare_accent(before, after) -> dict:
    """Return what a copy keeps of a clip's melody, from the tracks of both (f0.F0Track): the MEASURES.

    peak_shift_ms, valley_shift_ms: median distance in time of the turns found in both, each matched once, nearest first, no
    further than 100 ms; half the prominence will do in the copy, so that a turn just large enough is not lost to a hair.
    turns_kept_percent: how many of the original's are matched; in another clip of the same speaker 40 to 50 % are.
    h2_h1_error_st: by how many semitones the step from a peak to the next is off, mean over the original's. In a word with
    accent 2 it is H2 - H1, from word accent to focus or phrase accent (Bruce 1977). A peak that is gone from the copy has
    the height of its contour there, so that a flat copy is wrong by the whole step.
    NaN where the original has no turns or no two peaks, where nothing matches, or where the copy has no voice.
    """
    turns, found = find_turns(before), find_turns(after, prominence=PROMINENCE / 2)
    measures = dict.fromkeys(MEASURES, np.nan)
    matched = 0
    for kind in ("peak", "valley"):
        shifts = _match_times(*([time for time, _, k in part if k == kind] for part in (turns, found)))
        matched += len(shifts)
        if shifts:
            measures[f"{kind}_shift_ms"] = 1000 * float(np.median(shifts))
    if turns:
        measures["turns_kept_percent"] = 100 * matched / len(turns)
    peaks = np.array([(time, height) for time, height, kind in turns if kind == "peak"])
    if len(peaks) > 1 and np.isfinite(after.f0).any():
        steps = np.diff(_read_heights(after, found, peaks[:, 0])) - np.diff(peaks[:, 1])
        measures["h2_h1_error_st"] = float(np.mean(np.abs(steps)))
    return measures


def _match_times(before, after) -> list[float]:
    distance = np.abs(np.subtract.outer(before, after))
    shifts = []
    while distance.size and distance.min() <= MATCH_WINDOW:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        shifts.append(float(distance[i, j]))
        distance[i], distance[:, j] = np.inf, np.inf
    return shifts


def _read_heights(track, turns, times):
    contour = smooth_contour(track)
    line = np.isfinite(contour)
    heights = np.interp(times, track.times[line], contour[line])
    for i, time in enumerate(times):
        near = [(abs(t - time), height) for t, height, kind in turns if kind == "peak" and abs(t - time) <= MATCH_WINDOW]
        heights[i] = min(near)[1] if near else heights[i]
    return heights
