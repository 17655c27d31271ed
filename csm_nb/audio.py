"""Audio: read and write files of any kind as mono float32, resample, and listen in a notebook at the true level."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio import functional

SAMPLE_RATE = 24_000  # Hz; Mimi's and CSM's rate, and the rate of every array in this package unless it says otherwise


class AudioError(ValueError):
    """Audio that cannot be used: missing, unreadable, empty or not a number; the message names the file and why."""


def read_audio(path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return a file (wav, flac, ogg, opus, mp3; any rate, channels averaged) as float32 mono of shape (samples,).

    `sample_rate` in Hz is the rate to come back at. Raises AudioError for a file that is missing, unreadable or without
    samples, and for samples that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        wav, found_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path}: not readable as audio ({error}); allowed: wav, flac, ogg, opus, mp3") from error
    if len(wav) == 0:
        raise AudioError(f"{path}: holds no samples")
    if not np.isfinite(wav).all():
        raise AudioError(f"{path}: {np.count_nonzero(~np.isfinite(wav))} samples are NaN or infinite; export it again")
    return resample(wav.mean(axis=1), found_rate, sample_rate)


def write_audio(path, wav, sample_rate: int = SAMPLE_RATE, comment: str = "") -> Path:
    """Write mono samples and return the path; the suffix chooses the format (.wav is 16-bit PCM, .mp3, .ogg, .flac).

    `comment` goes into the file's metadata. Samples beyond -1 to 1 are clipped. Raises AudioError for an empty or NaN array and
    for a suffix without a format.
    """
    path, wav = Path(path), check_wav(wav, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with soundfile.SoundFile(path, "w", sample_rate, 1) as file:
            if comment:
                file.comment = comment
            file.write(np.clip(wav, -1, 1))
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"{path}: not writable as {path.suffix or 'a file without a suffix'} ({error})") from error
    return path


def resample(wav, from_rate: int, to_rate: int) -> np.ndarray:
    """Return float32 samples at `to_rate` Hz (windowed-sinc, torchaudio); unchanged where the rates are the same."""
    wav = np.asarray(wav, dtype=np.float32)
    if from_rate == to_rate:
        return wav
    return functional.resample(torch.from_numpy(wav.copy()), int(from_rate), int(to_rate)).numpy()


def check_wav(wav, name: str) -> np.ndarray:
    """Return samples as float32; raise AudioError, with the `name` of what holds them, unless one row of finite numbers."""
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or len(wav) == 0:
        raise AudioError(f"{name}: found samples of shape {wav.shape}; allowed is one row with at least one sample")
    if not np.isfinite(wav).all():
        raise AudioError(f"{name}: {np.count_nonzero(~np.isfinite(wav))} of {len(wav)} samples are NaN or infinite")
    return wav
