"""Voice quality of a clip on the grid of its F0: low-band intensity, cepstral peak prominence, irregular periods."""

from dataclasses import dataclass

import numpy as np
import parselmouth
from parselmouth.praat import call
from scipy import fft, ndimage, signal

from csm_nb.audio import SAMPLE_RATE
from csm_nb.prosody.f0 import TIME_STEP, F0Track, ProsodyError

LOW_BAND = (40.0, 700.0)  # Hz; where most of the intensity goes that stød loses (Fischer-Jørgensen 1989)
LOW_WINDOW = 0.03  # s; a Hann window that evens out periods down to 67 Hz
SILENCE = -80.0  # dB re full scale; the low band is never said to be quieter
CEPSTRUM_WINDOW = 0.04  # s; 51.2 ms in Hillenbrand et al. 1994, long for what happens within a syllable
CEPSTRUM_BAND = 5000.0  # Hz, as in Praat's CPPS; higher up lossy formats cut holes that are no harmonics
CEPSTRUM_SMOOTHING = (5, 3)  # frames and points, 25 and 0.15 ms; 20 and 1 ms in Hillenbrand and Houde 1996
REGRESSION_START = 0.001  # s of quefrency, below which lies the vocal tract (Hillenbrand et al. 1994)
PULSE_VOICING = 0.2  # Praat's voicing threshold for pulses; its .45 for F0 gives up just where periods turn irregular


@dataclass(frozen=True)
class VoiceTrack:
    """Voice quality at `times` (s): low_db (dB re full scale), cpp (dB), irregularity (share of a period)."""

    times: np.ndarray
    low_db: np.ndarray
    cpp: np.ndarray
    irregularity: np.ndarray


def track_voice(wav, track: F0Track, sample_rate: int = SAMPLE_RATE, pitch_range=None) -> VoiceTrack:
    """Return what a creaky, breathy or stød voice changes, at the times of `track`, the F0 of the same clip.

    See measure_low_band, measure_cpp and measure_irregularity. The latter two look for periods within `pitch_range` (Hz),
    without one within the track's; give the speaker's own where the track's is wider, as pulses that alternate are even
    to whoever may take two periods for one. Raises ProsodyError for samples that are NaN or infinite.
    """
    wav, pitch_range = np.asarray(wav, dtype=np.float64), pitch_range or (track.floor, track.ceiling)
    if not np.isfinite(wav).all():
        raise ProsodyError(f"{np.count_nonzero(~np.isfinite(wav))} samples are NaN or infinite")
    return VoiceTrack(
        track.times,
        measure_low_band(wav, track.times, sample_rate),
        measure_cpp(wav, track.times, pitch_range, sample_rate),
        measure_irregularity(wav, track.times, pitch_range, sample_rate),
    )


def measure_low_band(wav, times, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return the intensity of 40 to 700 Hz around each of `times` (s), in dB re full scale (root mean square 1), >= -80.

    The filter runs forwards and backwards and the window is symmetric: a dip is where it was made.
    """
    low = signal.sosfiltfilt(signal.butter(2, LOW_BAND, "bandpass", fs=sample_rate, output="sos"), wav)
    window = signal.windows.hann(round(LOW_WINDOW * sample_rate) | 1)
    power = signal.oaconvolve(low**2, window / window.sum(), mode="same")
    at = np.clip(np.round(np.asarray(times) * sample_rate).astype(int), 0, len(wav) - 1)
    return 10 * np.log10(np.maximum(power[at], 10 ** (SILENCE / 10)))


def measure_cpp(wav, times, pitch_range, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return the cepstral peak prominence around each of `times` (s, evenly spaced) in dB: how far harmonics stand out.

    The highest point of the cepstrum, in dB, among the periods of `pitch_range` (Hz), above the line fitted to the cepstrum
    from 1 ms on (Hillenbrand, Cleveland and Erickson 1994), the cepstrum smoothed in time and quefrency (Hillenbrand and
    Houde 1996): the CPPS, in windows short enough for a syllable. Noise has some 7 dB, being the highest of many values,
    recorded voices 12 to 20, a vowel without any noise 25 and more. NaN in digital silence.
    """
    size = round(CEPSTRUM_WINDOW * sample_rate)
    padded = np.pad(np.asarray(wav, dtype=np.float32), size)
    starts = np.round(np.asarray(times) * sample_rate).astype(int) + size - size // 2
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[starts]
    bins = round(min(CEPSTRUM_BAND, sample_rate / 2) * size / sample_rate)
    spectrum = np.abs(fft.rfft(frames * signal.windows.hamming(size).astype(np.float32)))[:, :bins]
    loudest = spectrum.max(axis=1, keepdims=True)
    level = 20 * np.log10(np.maximum(spectrum / np.where(loudest > 0, loudest, 1), 1e-6))
    # 4 x bins is twice what the band needs: between points that far apart a peak would lose up to 4 dB
    cepstrum = np.abs(fft.irfft(level - level.mean(axis=1, keepdims=True), 4 * bins))[:, : 2 * bins]
    cepstrum = 20 * np.log10(np.maximum(ndimage.uniform_filter(cepstrum, CEPSTRUM_SMOOTHING), 1e-6))
    quefrency = np.arange(2 * bins) * size / (4 * bins * sample_rate)
    fitted = quefrency >= REGRESSION_START
    centred = quefrency - quefrency[fitted].mean()
    slope = cepstrum[:, fitted] @ centred[fitted] / np.sum(centred[fitted] ** 2)
    line = cepstrum[:, fitted].mean(axis=1, keepdims=True) + slope[:, None] * centred
    searched = (quefrency >= 1 / pitch_range[1]) & (quefrency <= 1 / pitch_range[0])
    peak = np.where(searched, cepstrum, -np.inf).argmax(axis=1)[:, None]
    prominence = np.take_along_axis(cepstrum - line, peak, axis=1)[:, 0]
    return np.where(loudest[:, 0] > 0, prominence, np.nan).astype(float)


def measure_irregularity(wav, times, pitch_range, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return |T(i) - T(i-1)| over their mean for the two periods that meet nearest to each of `times` (s).

    Some 0.007 in a modal voice, 0.05 to 0.1 in a glide of 7 semitones within 50 ms, up to 0.3 where it creaks; beyond that,
    or where two periods together repeat within `pitch_range` (Hz), Praat takes them for one or none. Periods lie between
    Praat's pulses, found by comparing the waveform of neighbouring ones (Boersma 2009: less moved by noise than peaks are),
    voiced or hardly so: noise counts as irregular, so read it where low_db says that there is a voice. NaN further than the
    longest period from three pulses in a row, which lie within two longest periods.
    """
    floor, ceiling = pitch_range
    sound = parselmouth.Sound(np.asarray(wav, dtype=np.float64), sample_rate)
    # half Praat's 15 candidates per frame: only noise has so many, and they are what takes time
    pitch = sound.to_pitch_ac(2 * TIME_STEP, floor, 8, pitch_ceiling=ceiling, voicing_threshold=PULSE_VOICING)
    process = call([sound, pitch], "To PointProcess (cc)")
    if call(process, "Get number of points") < 3:
        return np.full(len(times), np.nan)
    pulses = call(process, "To Matrix").values[0]
    periods = np.diff(pulses)
    pairs = periods[1:] + periods[:-1]
    irregularity = np.where(pairs <= 2 / floor, 2 * np.abs(np.diff(periods)) / pairs, np.nan)
    middle = pulses[1:-1]
    nearest = np.searchsorted((middle[1:] + middle[:-1]) / 2, times)
    return np.where(np.abs(middle[nearest] - times) <= 1 / floor, irregularity[nearest], np.nan)
