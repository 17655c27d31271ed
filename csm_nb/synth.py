"""Synthetic speech: text to clips on disk, with espeak-ng from the wheel that carries it (no download, no root)."""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

from csm_nb.audio import SAMPLE_RATE, resample, write_audio
from csm_nb.corpora import write_manifest
from csm_nb.languages import get_language

# espeak-ng's C API (speak_lib.h, 1.52): only what is used here.
_SYNCHRONOUS, _UTF8, _BY_CHARACTER = 2, 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_IPA_EVENTS, _END_OF_EVENTS, _PHONEME = 3, 0, 7


class _Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("phoneme", ctypes.c_char * 8)]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))

LEVEL = 0.08  # root mean square of every clip, so that loudness tells neither voice nor language
PAD_SECONDS = 0.06  # silence left at both ends


@dataclass(frozen=True)
class Voice:
    """One espeak-ng speaker, the same in every language: formant `variant`, `pitch` and `spread` 0-99, `rate` words a minute."""

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
# Never spoken in training by any miniature model: they stand in for "a speaker that nobody has heard".
HELD_OUT_VOICES = (Voice("4", "m1", 48, 65, 160), Voice("5", "f3", 50, 65, 160))


@functools.cache
def _load_espeak() -> tuple[ctypes.CDLL, int, list, list]:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), _IPA_EVENTS)
    if sample_rate <= 0:
        raise RuntimeError(f"espeak-ng did not start with the data in {espeakng_loader.get_data_path()}; run make setup")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # breathy voices draw noise
    chunks: list[np.ndarray] = []
    phonemes: list[tuple[int, str]] = []

    @_CALLBACK
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        while events[0].type != _END_OF_EVENTS:
            if events[0].type == _PHONEME:
                phonemes.append((events[0].sample, events[0].phoneme.decode(errors="ignore")))
            events = ctypes.pointer(events[1])
        return 0

    library.espeak_SetSynthCallback(collect)
    library.collect = collect  # keeps the callback alive as long as the library
    return library, sample_rate, chunks, phonemes


def speak_text(text: str, language: str, voice: Voice = VOICES[0]) -> np.ndarray:
    """Speech of `text` by espeak-ng: float32 mono at 24 kHz, levelled, silence at the ends cut to 60 ms.

    About a thousand times faster than real time. The same sequence of calls from the start of a process gives the same
    samples; a clip repeated within it differs a little, because espeak-ng's pitch flutter goes on from clip to clip.
    Raises ValueError for an empty text, an unknown language or a variant that espeak-ng does not have.
    """
    return speak_phonemes(text, language, voice)[0]


def speak_phonemes(text: str, language: str, voice: Voice = VOICES[0]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """`speak_text`, and where each phoneme of it starts: [(seconds, IPA)], with "" for a pause."""
    if not text.strip():
        raise ValueError("the text to speak is empty")
    library, sample_rate, chunks, phonemes = _load_espeak()
    tag = get_language(language).espeak
    names = [f"{tag}+{voice.variant}", f"{tag.split('-')[0]}+{voice.variant}"]  # a variant of fr-fr is only found as fr
    variants = Path(espeakng_loader.get_data_path()) / "voices/!v"  # espeak-ng takes an unknown one for none at all
    if not (variants / voice.variant).is_file() or all(library.espeak_SetVoiceByName(name.encode()) for name in names):
        raise ValueError(f"espeak-ng has no voice {names[0]!r}")
    for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.spread)):
        library.espeak_SetParameter(parameter, value, 0)
    chunks.clear(), phonemes.clear()
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
    if not chunks:
        raise ValueError(f"espeak-ng says nothing for {text!r} in {language}")
    wav = np.concatenate(chunks).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wav) > 0.01 * np.abs(wav).max())
    if len(loud) == 0:
        raise ValueError(f"espeak-ng says nothing for {text!r} in {language}")
    pad = int(PAD_SECONDS * sample_rate)
    wav = np.pad(wav[loud[0] : loud[-1] + 1], pad)
    wav = resample(wav, sample_rate, SAMPLE_RATE)
    starts = [(float(sample - loud[0] + pad) / sample_rate, name.strip("ˈˌ")) for sample, name in phonemes]
    return (wav * (LEVEL / np.sqrt(np.mean(wav**2)))).astype(np.float32), starts


def make_corpus(texts, language: str, out_dir, voices=VOICES, spoken_as: str | None = None) -> Path:
    """Speaks `texts` in turn with `voices` into `out_dir` and returns the path of its manifest.jsonl.

    `spoken_as` lets the voice of another language read the text (English with a Norwegian accent: texts in English,
    language "en", spoken_as "no"). The manifest names the engine, so that synthetic speech is never taken for real.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    with ThreadPoolExecutor(2) as writers:
        for number, text in enumerate(texts):
            voice = voices[number % len(voices)]
            wav = speak_text(text, spoken_as or language, voice)
            path = out_dir / f"{number:05d}.wav"
            writers.submit(write_audio, path, wav)
            rows.append({
                "text": text, "audio_path": str(path), "speaker_id": voice.speaker_id, "language": language,
                "duration": round(len(wav) / SAMPLE_RATE, 3), "source": "espeak-ng (synthetic)",
                "accent": spoken_as or language, "voice": asdict(voice),
            })
    return write_manifest(rows, out_dir / "manifest.jsonl")
