"""Synthetic speech: text to clips on disk, by espeak-ng."""

import ctypes
from dataclasses import dataclass

import numpy as np

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.languages import get_language
from csm_nb.phonemes import espeak_ng

# espeak-ng's C API (speak_lib.h, 1.52): only what is used here.
_UTF8, _BY_CHARACTER = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_END_OF_EVENTS, _PHONEME = 0, 7


class _Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("phoneme", ctypes.c_char * 8)]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
LEVEL = 0.08  # root mean square of every clip, so that loudness tells neither voice nor language
PAD_SECONDS = 0.06  # silence left at both ends


@dataclass(frozen=True)
class Voice:
    """One espeak-ng speaker, the same in each language: formant `variant`, `pitch` and `spread` 0-99, `rate` words per minute."""

    speaker_id: str
    variant: str
    pitch: int = 50
    spread: int = 60
    rate: int = 160


VOICES = (
    Voice("0", "m3", 40, 60, 155),
    Voice("1", "f2", 55, 60, 160),
    Voice("2", "m7", 55, 70, 165),
    Voice("3", "f4", 45, 70, 155),
)


@_CALLBACK
def _collect(samples, count, events):
    if samples and count > 0:
        _chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
    while events[0].type != _END_OF_EVENTS:
        if events[0].type == _PHONEME:
            _phonemes.append((events[0].sample, events[0].phoneme.decode(errors="ignore")))
        events = ctypes.pointer(events[1])
    return 0


_chunks: list[np.ndarray] = []
_phonemes: list[tuple[int, str]] = []


def speak_text(text: str, language: str, voice: Voice = VOICES[0]) -> np.ndarray:
    """Return speech of `text` by espeak-ng: float32 mono at 24 kHz, levelled, silence at the ends cut to 60 ms.

    Several hundred times faster than real time. The same arguments give the same samples, whatever was said before. Raises
    ValueError for an empty text, an unknown language or a variant that espeak-ng does not have.
    """
    return speak_phonemes(text, language, voice)[0]


def speak_phonemes(text: str, language: str, voice: Voice = VOICES[0]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return speak_text's samples, and where each phoneme of it starts: [(seconds, IPA)], with "" for a pause."""
    return speak_with(espeak_ng.load_library(), text, language, voice)


def speak_with(loaded, text: str, language: str, voice: Voice):
    """Return what speak_phonemes does, by a library that is `loaded` (espeak_ng.load_library) once for many texts."""
    if not text.strip():
        raise ValueError("the text to speak is empty")
    library, sample_rate = loaded
    tag = get_language(language).espeak
    names = [f"{tag}+{voice.variant}", f"{tag.split('-')[0]}+{voice.variant}"]  # a variant of fr-fr is only found as fr
    variants = espeak_ng.find_data() / "voices/!v"  # espeak-ng takes an unknown one for none at all
    if not (variants / voice.variant).is_file() or all(library.espeak_SetVoiceByName(name.encode()) for name in names):
        raise ValueError(f"espeak-ng has no voice {names[0]!r}")
    for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.spread)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_SetSynthCallback(_collect)
    _chunks.clear(), _phonemes.clear()
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
    if not _chunks:
        raise ValueError(f"espeak-ng says nothing for {text!r} in {language}")
    wav = np.concatenate(_chunks).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wav) > 0.01 * np.abs(wav).max())
    if len(loud) == 0:
        raise ValueError(f"espeak-ng says nothing for {text!r} in {language}")
    pad = int(PAD_SECONDS * sample_rate)
    wav = np.pad(wav[loud[0] : loud[-1] + 1], pad)
    wav = resample(wav, sample_rate, SAMPLE_RATE)
    starts = [(float(sample - loud[0] + pad) / sample_rate, name.strip("ˈˌ")) for sample, name in _phonemes]
    return (wav * (LEVEL / np.sqrt(np.mean(wav**2)))).astype(np.float32), starts
