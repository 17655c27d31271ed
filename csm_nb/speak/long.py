"""Long texts: sentence by sentence, each after the one before, joined with even pauses and one level."""

from dataclasses import dataclass

import librosa
import numpy as np

from csm_nb.audio import SAMPLE_RATE
from csm_nb.csm.load import inner_model
from csm_nb.csm.speakers import get_speakers, pick_voice
from csm_nb.speak.attempts import speak_again
from csm_nb.speak.generate import Speech, cap_seconds, read_decoders, read_texts, speak
from csm_nb.text.breaks import split_sentences

PAUSE = 0.35  # s between two sentences, counted from sound to sound
QUIET = 40  # dB below a sentence's loudest 20 ms: silence at its ends
MOST_GAIN = 6  # dB by which a sentence is brought to the level of the others


@dataclass(frozen=True)
class Reading:
    """A text that was read: wav (float32, 24 kHz), its sentences as they were spoken, and where each begins (s)."""

    wav: np.ndarray
    said: list[Speech]
    starts: list[float]


def read_aloud(model, processor, text: str, language: str, speaker: str = "", seed: int = 0, on_sentence=None, asr=None,
               attempts: int = 1, **how) -> Reading:
    """Return `text` read sentence by sentence (text.breaks.split_sentences) in `language`: no word of it is left out.

    Each sentence goes on from the one before (its text and codes are the context), where both have room in the model's
    context. `on_sentence(number, count)` is called after each. With a recogniser `asr`, each is the best of up to `attempts`
    (attempts.speak_again). `how` is that of speak. Raises SpeechError where nothing in the text can be said; a part with
    neither letter nor digit (a line of dashes) has nothing to say and is passed over.
    """
    parts = [piece for part in split_sentences(text, language) for piece in _fit(model, part, language)]
    voice, said, before = pick_voice(get_speakers(model), speaker), [], []
    spoken, decoders = [part for part in parts if any(map(str.isalnum, part))] or [text], read_decoders(model)
    for number, part in enumerate(spoken, 1):
        read, = read_texts(model, [part], language)
        given = how | {"speaker_ids": voice, "seed": seed, "decoders": decoders}
        given |= {"context": before} if _has_room(model, read, before) else {}
        if asr is None:
            one, = speak(model, processor, [part], language=language, **given)
        else:
            one, = speak_again(model, processor, [part], language, asr, attempts, **given)[0]
        said.append(one)
        before = [(read, one.codes, voice)] if one.ended else []  # a runaway is nothing to go on from
        if on_sentence:
            on_sentence(number, len(spoken))
    return join_speech(said)


def _fit(model, part, language):
    """Return a sentence whole where the model has room for it as it is read out, else in pieces: 40 digits take over a minute."""
    if len(part) < 2 or _has_room(model, *read_texts(model, [part], language), []):
        return [part]
    halves = split_sentences(part, language, len(part) // 2)
    return [piece for half in halves for piece in _fit(model, half, language)]


def _has_room(model, text, before):
    """Whether a sentence surely has room in the model's context after the one before."""
    taken = sum(len(codes) + 2 * len(said) for said, codes, _ in before) + 2 * len(text)
    return taken + inner_model(model).codec_model.config.frame_rate * cap_seconds(text) < model.config.max_position_embeddings


def join_speech(said: list[Speech]) -> Reading:
    """Return sentences as one: silence at their ends cut, PAUSE between them, each brought near the median level.

    The level is the root mean square of what is not silent; it is changed by MOST_GAIN at most, and no sample goes over full
    scale.
    """
    trimmed = [librosa.effects.trim(one.wav, top_db=QUIET, frame_length=480, hop_length=240)[0] for one in said]
    levels = [float(np.sqrt(np.mean(np.square(wav)))) if len(wav) else 0.0 for wav in trimmed]
    middle, pieces, starts, place = float(np.median([level for level in levels if level > 0] or [0])), [], [], 0
    for wav, level in zip(trimmed, levels, strict=True):
        most = 10 ** (MOST_GAIN / 20)
        gain = float(np.clip(middle / level, 1 / most, most)) if level > 0 else 1.0
        gain = min(gain, 1 / max(float(np.abs(wav).max(initial=0)), 1e-9))
        if pieces:
            pieces.append(np.zeros(round(PAUSE * SAMPLE_RATE), np.float32))
            place += len(pieces[-1])
        starts.append(place / SAMPLE_RATE)
        pieces.append((wav * gain).astype(np.float32))
        place += len(wav)
    return Reading(np.concatenate(pieces) if pieces else np.zeros(0, np.float32), said, starts)
