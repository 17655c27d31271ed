"""Audio: read and write files of any kind as mono float32, resample, and listen in a notebook at the true level."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
import soundfile
import torch
from IPython.display import HTML
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


def write_audio(path, wav, sample_rate: int = SAMPLE_RATE) -> Path:
    """Write mono samples and return the path; the suffix chooses the format (.wav is 16-bit PCM, .mp3, .ogg, .flac).

    Samples beyond -1 to 1 are clipped. Raises AudioError for an empty or NaN array and for a suffix without a format.
    """
    path, wav = Path(path), _check_wav(wav, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        soundfile.write(path, np.clip(wav, -1, 1), sample_rate)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"{path}: not writable as {path.suffix or 'a file without a suffix'} ({error})") from error
    return path


def resample(wav, from_rate: int, to_rate: int) -> np.ndarray:
    """Return float32 samples at `to_rate` Hz (windowed-sinc, torchaudio); unchanged where the rates are the same."""
    wav = np.asarray(wav, dtype=np.float32)
    if from_rate == to_rate:
        return wav
    return functional.resample(torch.from_numpy(wav.copy()), int(from_rate), int(to_rate)).numpy()


def player(wav, label: str = "", sample_rate: int = SAMPLE_RATE) -> HTML:
    """Return an audio player for a notebook, the sound inside as MP3 at its true level, so that levels can be compared.

    IPython.display.Audio scales every clip to its peak and embeds PCM, eleven times the size. What has no sound (an
    empty array, or NaN from a model that diverged) is shown as that. Samples beyond -1 to 1 are clipped; it says so.
    """
    return HTML(_player_html(label, wav, sample_rate))


def players(clips, columns: int = 2, sample_rate: int = SAMPLE_RATE) -> HTML:
    """Return players side by side, `columns` in a row, for clips [(label, wav), ...] at their true levels."""
    cells = "".join(_player_html(label, wav, sample_rate) for label, wav in clips)
    style = f"display:grid;grid-template-columns:repeat({columns},minmax(0,1fr));gap:10px 16px"
    return HTML(f'<div style="{style};max-width:{columns * 340}px">{cells}</div>')


def _player_html(label, wav, sample_rate):
    note = ""
    try:
        wav = _check_wav(wav, "no sound")
        peak = np.abs(wav).max()
        note = f" (clipped: peak {peak:.2f})" if peak > 1 else ""
        buffer = io.BytesIO()
        soundfile.write(buffer, np.clip(resample(wav, sample_rate, SAMPLE_RATE), -1, 1), SAMPLE_RATE, format="MP3")
        source = f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        sound = f'<audio controls preload="metadata" src="{source}" style="width:100%;height:36px"></audio>'
    except AudioError as error:
        sound = f'<div style="opacity:.7">{escape(str(error))}</div>'
    label = f'<div style="font-size:13px;margin-bottom:2px">{escape(str(label) + note)}</div>'
    return f"<div>{label}{sound}</div>"


def _check_wav(wav, name):
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or len(wav) == 0:
        raise AudioError(f"{name}: found samples of shape {wav.shape}; allowed is one row with at least one sample")
    if not np.isfinite(wav).all():
        raise AudioError(f"{name}: {np.count_nonzero(~np.isfinite(wav))} of {len(wav)} samples are NaN or infinite")
    return wav
