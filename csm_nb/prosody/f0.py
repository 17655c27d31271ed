"""Prosody: F0, voicing and harmonicity of a clip, and what is left of them and of its melody in a decoded copy."""

from dataclasses import dataclass

import librosa
import numpy as np
import parselmouth
import torch
from parselmouth.praat import call
from torchaudio.functional import melscale_fbanks

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.prosody import turns

METHODS = ("praat", "pyin", "torchcrepe")
TIME_STEP = 0.005  # s between frames of F0 and HNR
WIDEST_RANGE = (60.0, 600.0)  # Hz; the first pass, wide enough for every adult and most children
LEAST_FRAMES = 10  # voiced frames (50 ms) below which nothing is said about F0
LEAST_MOVEMENT = 30.0  # cents; standard deviation of an F0 below which its correlation is that of tracker noise
OTHER_RATE = 16_000  # Hz at which pyin and torchcrepe listen
CREPE_VOICING = 0.21  # periodicity; torchcrepe's own, and on 24 real clips 6 % of frames from Praat's voicing
GROSS_ERROR = 0.2  # relative; the GPE20 of Rabiner et al. 1976
MEASURES = ("f0_correlation", "f0_rmse_cents", "gpe_percent", "vde_percent", "mel_distance_db", "hnr_change_db",
            *turns.MEASURES)  # fmt: skip


class ProsodyError(ValueError):
    """A clip that Praat cannot analyse; the message says why."""


@dataclass(frozen=True)
class F0Track:
    """F0 of a clip every TIME_STEP: times (s), f0 (Hz) and hnr (dB), NaN where unvoiced; the range searched (Hz)."""

    times: np.ndarray
    f0: np.ndarray
    hnr: np.ndarray
    floor: float
    ceiling: float

    @property
    def voiced(self) -> np.ndarray:
        """Return which frames are voiced (bool)."""
        return np.isfinite(self.f0)


def track_f0(wav, sample_rate: int = SAMPLE_RATE, pitch_range=None, method: str = "praat") -> F0Track:
    """Return F0 and harmonics-to-noise ratio of a clip by Praat's autocorrelation (Boersma 1993, sections 2 and 4).

    F0 is searched within `pitch_range`, (floor, ceiling) in Hz. Without one it is found from the clip itself; give the
    speaker's (`find_pitch_range`) where there are more clips. `method`, one of METHODS, lets another tracker say where there
    is voice and at what F0, to see whether a finding is the tracker's: pyin (Mauch and Dixon 2014) or torchcrepe (Kim et al.
    2018; a package to install). Times and HNR are Praat's with each; HNR is NaN where Praat hears no voice.
    Raises ProsodyError for a clip that is too short for the floor (three periods) or holds NaN, and for an unknown method.
    """
    if method not in METHODS:
        raise ProsodyError(f"unknown method {method!r}; allowed are {', '.join(METHODS)}")
    wav = np.asarray(wav, dtype=np.float64)
    floor, ceiling = pitch_range or find_pitch_range([wav], sample_rate)
    pitch = _run_praat(wav, sample_rate, floor, ceiling)
    times, f0 = pitch.xs(), pitch.selected_array["frequency"]
    strength = np.clip(pitch.selected_array["strength"], 1e-6, 1 - 1e-6)
    f0, hnr = (np.where(f0 > 0, values, np.nan) for values in (f0, 10 * np.log10(strength / (1 - strength))))
    if method != "praat":
        run = _run_pyin if method == "pyin" else _run_torchcrepe
        f0 = run(resample(wav, sample_rate, OTHER_RATE), floor, ceiling, times)
        hnr = np.where(np.isfinite(f0), hnr, np.nan)
    return F0Track(times, f0, hnr, floor, ceiling)


def _run_praat(wav, sample_rate, floor, ceiling, step=TIME_STEP):
    if not np.isfinite(wav).all():
        raise ProsodyError(f"{np.count_nonzero(~np.isfinite(wav))} samples are NaN or infinite")
    if len(wav) / sample_rate < 3 / floor + 2 * TIME_STEP:
        raise ProsodyError(f"too short: {len(wav) / sample_rate:.3f} s, at {floor:.0f} Hz F0 needs {3 / floor:.3f} s")
    return parselmouth.Sound(wav, sample_rate).to_pitch_ac(step, pitch_floor=floor, pitch_ceiling=ceiling)


def _run_pyin(wav, floor, ceiling, times):
    step, size = int(TIME_STEP * OTHER_RATE), int(3 / floor * OTHER_RATE)  # three periods, as Praat
    f0, _, _ = librosa.pyin(wav.astype(float), fmin=floor, fmax=ceiling, sr=OTHER_RATE, frame_length=size, hop_length=step)
    return np.interp(times, TIME_STEP * np.arange(len(f0)), f0)


def _run_torchcrepe(wav, floor, ceiling, times):
    try:
        import torchcrepe
    except ImportError as error:
        raise ProsodyError(f"method 'torchcrepe' needs a package: uv pip install torchcrepe ({error})") from error

    def decode(probabilities):
        # the package adds noise to F0; this is the mean of the bins about the best one (Kim et al. 2018, equation 1)
        bins = torchcrepe.decode.viterbi(probabilities)[0]
        near = (bins[:, None] + torch.arange(-4, 5)[:, None]).clamp(0, torchcrepe.PITCH_BINS - 1)
        weights = probabilities.gather(1, near).clamp(min=0)
        cents = (weights * (torchcrepe.CENTS_PER_BIN * near + 1997.38)).sum(1) / weights.sum(1)
        return bins, 10 * 2 ** (cents / 1200)

    # the larger model takes ten times as long as the clip on one core and finds the same F0
    f0, periodicity = torchcrepe.predict(
        torch.from_numpy(wav)[None], OTHER_RATE, int(TIME_STEP * OTHER_RATE), floor, ceiling, "tiny", decode,
        return_periodicity=True, batch_size=512,
    )  # fmt: skip
    f0 = torchcrepe.threshold.At(CREPE_VOICING)(f0, torchcrepe.filter.median(periodicity, 3))[0].numpy()
    return np.interp(times, TIME_STEP * np.arange(len(f0)), f0.astype(float))


def find_pitch_range(wavs, sample_rate: int = SAMPLE_RATE) -> tuple[float, float]:
    """Return (floor, ceiling) in Hz for a speaker: 0.75 and 1.5 times the quartiles of F0 over `wavs` in a wide search.

    The second pass with this range makes far fewer octave errors (De Looze and Hirst 2008; Hirst 2011, section 3.1.3).
    The wide range itself comes back where there is too little voice to tell.
    """
    step, tracks = 2 * TIME_STEP, [np.zeros(0)]  # enough for quartiles, in half the time
    for wav in wavs:
        try:
            pitch = _run_praat(np.asarray(wav, dtype=np.float64), sample_rate, *WIDEST_RANGE, step)
        except ProsodyError:
            continue
        tracks.append(pitch.selected_array["frequency"])
    f0 = np.concatenate(tracks)
    f0 = f0[f0 > 0]
    if len(f0) * step < LEAST_FRAMES * TIME_STEP:
        return WIDEST_RANGE
    low, high = np.percentile(f0, [25, 75]).tolist()
    return max(WIDEST_RANGE[0], 0.75 * low), min(WIDEST_RANGE[1], 1.5 * high)


def to_semitones(f0, reference: float | None = None) -> np.ndarray:
    """Return F0 (Hz) in semitones about `reference` Hz; without one, about its own median. NaN stays NaN."""
    f0 = np.asarray(f0, dtype=float)
    if reference is None:
        reference = np.nanmedian(f0) if np.isfinite(f0).any() else np.nan
    return 12 * np.log2(f0 / reference)


def measure_mel_distance(original, decoded, sample_rate: int = SAMPLE_RATE) -> float:
    """Return the distance of two clips' mel spectra in dB: root mean square over 80 bands, mean over frames of 10 ms.

    Bands more than 60 dB below the original's loudest count as silent, in both.
    """
    size, hop = sample_rate // 25, sample_rate // 100
    both = torch.from_numpy(np.stack([original, decoded]).astype(np.float32))
    if both.shape[1] < size:
        both = torch.nn.functional.pad(both, (0, size - both.shape[1]))
    power = torch.stft(both, size, hop, window=torch.hann_window(size), return_complex=True).abs().square()
    mel = power.transpose(1, 2) @ melscale_fbanks(size // 2 + 1, 50.0, sample_rate / 2, 80, sample_rate)
    level = 10 * torch.log10(mel.clamp(min=max(float(mel[0].max()) * 1e-6, 1e-12)))
    return float((level[0] - level[1]).square().mean(-1).sqrt().mean())


def compare_clip(original, decoded, sample_rate: int = SAMPLE_RATE, pitch_range=None, method: str = "praat") -> dict:
    """Return what a decoded copy keeps of a clip: the MEASURES, and `reason` (why one of them is NaN; else "").

    f0_correlation and f0_rmse_cents: log F0 on frames voiced in both. gpe_percent: those of them more than 20 % off.
    vde_percent: frames voiced in one of the two only, of all frames (Nakatani et al. 2008). mel_distance_db: see
    measure_mel_distance. hnr_change_db: median HNR, decoded minus original, on frames voiced in both. The turns of the melody:
    see turns.compare_accent; a clip that has none has no such measures, and that is no reason. `method` tracks F0 in both.
    Correlation needs an original that moves: of a level tone it would be that of the tracker's noise.
    """
    length = min(len(original), len(decoded))
    original, decoded = np.asarray(original)[:length], np.asarray(decoded)[:length]
    measures = dict.fromkeys(MEASURES, np.nan)
    try:
        if not np.isfinite(decoded).all():
            raise ProsodyError("the decoded clip holds NaN")
        before = track_f0(original, sample_rate, pitch_range, method)
        after = track_f0(decoded, sample_rate, (before.floor, before.ceiling), method)
    except ProsodyError as error:
        return measures | {"reason": str(error)}
    measures["mel_distance_db"] = measure_mel_distance(original, decoded, sample_rate)
    if before.voiced.sum() < LEAST_FRAMES:
        return measures | {"reason": f"hardly voiced: {before.voiced.sum()} frames"}
    measures["vde_percent"] = 100 * float(np.mean(before.voiced != after.voiced))
    measures |= turns.compare_accent(before, after)
    both = before.voiced & after.voiced
    if both.sum() < LEAST_FRAMES:
        return measures | {"reason": f"voice lost: {both.sum()} frames voiced in both"}
    x, y = 1200 * np.log2(before.f0[both]), 1200 * np.log2(after.f0[both])
    measures["f0_rmse_cents"] = float(np.sqrt(np.mean((x - y) ** 2)))
    measures["gpe_percent"] = 100 * float(np.mean(np.abs(after.f0[both] / before.f0[both] - 1) > GROSS_ERROR))
    heard = np.isfinite(before.hnr) & np.isfinite(after.hnr)
    measures["hnr_change_db"] = float(np.median(after.hnr[heard]) - np.median(before.hnr[heard])) if heard.any() else np.nan
    if np.std(x) < LEAST_MOVEMENT:
        return measures | {"reason": f"level F0: it moves by only {np.std(x):.0f} cents"}
    measures["f0_correlation"] = float(np.corrcoef(x, y)[0, 1]) if np.std(y) > 0 else 0.0
    return measures | {"reason": ""}


def flatten_f0(wav, sample_rate: int = SAMPLE_RATE, pitch_range=None) -> np.ndarray:
    """Return a clip said on one tone, its median F0, all else kept (Praat's PSOLA): a control that a check must fail.

    A clip without voice comes back as it was. Raises ProsodyError where the clip is too short.
    """
    track = track_f0(wav, sample_rate, pitch_range)
    if not track.voiced.any():
        return np.asarray(wav, dtype=np.float32)
    sound = parselmouth.Sound(np.asarray(wav, dtype=np.float64), sample_rate)
    try:
        manipulation = call(sound, "To Manipulation", 0.01, track.floor, track.ceiling)
        tier = call(manipulation, "Extract pitch tier")
        call(tier, "Formula", str(float(np.nanmedian(track.f0))))
        call([tier, manipulation], "Replace pitch tier")
        flat = call(manipulation, "Get resynthesis (overlap-add)").values[0].astype(np.float32)
    except parselmouth.PraatError as error:
        raise ProsodyError(f"Praat cannot resynthesise it: {str(error).splitlines()[0]}") from error
    return np.pad(flat, (0, max(0, len(wav) - len(flat))))[: len(wav)]
