"""Generation: many sentences at once, capped, found again where they were spoken before, and runaways counted."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from csm_nb.codec.mimi import decode
from csm_nb.csm.load import encode_text, inner_model
from csm_nb.csm.record import get_record
from csm_nb.csm.speakers import get_speakers, pick_voice
from csm_nb.csm.tags import get_tags, pick_tag
from csm_nb.keep import make_once
from csm_nb.provenance import hash_value
from csm_nb.speak.batch import Batch, Sampling, Utterance, draw_numbers
from csm_nb.speak.decoders import Decoders
from csm_nb.speak.voice import describe_speech, name_active
from csm_nb.text.letters import count_letters
from csm_nb.text.spoken import read_out

# A generous upper bound of speaking time, for the cap: slow speech takes about 0.1 s per letter.
SECONDS_PER_LETTER, SECONDS_ON_TOP = 0.15, 1.0
AT_ONCE = 4  # what is kept is written so many batches at a time: places that fall free are taken, and a kill loses little
_SCHEMA = pa.schema([("text", pa.string()), ("codes", pa.list_(pa.list_(pa.uint16()))), ("finish", pa.string())])


class SpeechError(ValueError):
    """A text that can not be spoken: nothing to say, or more than the model has room for; says which, and the limit."""


@dataclass(frozen=True)
class Speech:
    """What the model said: wav (float32, 24 kHz), codes (frames x codebooks), and why it ends there.

    `finish` is "end" where the model ended by itself, "length" where it had not at its cap (a runaway), and "retry" where it
    did in a later attempt (attempts.speak_again).
    """

    text: str
    wav: np.ndarray
    codes: np.ndarray
    finish: str

    @property
    def ended(self) -> bool:
        """Return whether the model ended by itself."""
        return self.finish != "length"


def cap_seconds(text: str) -> float:
    """Return the longest that `text` may take to be spoken, by its letters read out; what takes longer is a runaway."""
    return SECONDS_PER_LETTER * count_letters(text) + SECONDS_ON_TOP


def count_frames(inner, text: str) -> int:
    """Return the cap of `text` in frames of the codec."""
    return int(inner.codec_model.config.frame_rate * cap_seconds(text))


def check_text(model, processor, text: str, speaker: str = "0", tag: str = "", context=()) -> None:
    """Raise SpeechError when `text` holds nothing to say, or more than fits the model's context: prompt and capped frames."""
    if not any(c.isalnum() for c in text):
        raise SpeechError(f"there is nothing to say in {text!r}: it holds neither letter nor digit; leave it out")
    tokenizer, limit = processor.tokenizer, model.config.max_position_embeddings
    known = [i for i in tokenizer(text, add_special_tokens=False).input_ids if i != tokenizer.unk_token_id]
    if not any(c.isalnum() for c in tokenizer.decode(known)):
        raise SpeechError(f"there is nothing to say in {text!r}: the model's tokenizer knows none of its letters; give the text "
                          "in letters that it knows")
    prompt = len(encode_text(processor, text, speaker, tag))
    prompt += sum(len(encode_text(processor, said, voice, tag)) + len(codes) + 1 for said, codes, voice in context)
    frames = count_frames(model, text)
    if prompt + frames > limit:
        raise SpeechError(f"a text of {len(text)} characters takes up to {prompt + frames} positions ({prompt} of text, {frames} "
                          f"frames: {cap_seconds(text):.0f} s), and the model has {limit}: split it at its sentences and speak "
                          f"them one by one. It begins: {text[:60]!r}")


@torch.inference_mode()
def speak(model, processor, texts, speaker_ids=None, temperature: float = 0.6, top_k: int = 30, seed: int = 0,
          batch_size: int = 32, keep=None, language: str = "", top_p: float = 1.0, context=(), decoders=None) -> list[Speech]:
    """Speak `texts` with the base or an adapted model, `batch_size` at once; one speaker id for all, or one per text.

    Without a speaker id, the voice of the adapter's own corpus with the most clips, or the base's "0". What a text says
    follows from the model, the text, its voice and `seed`, not from the others that are spoken with it: in float32 on a CPU to
    the last bit (speak.decoders); rounding may let one differ elsewhere. The same text twice says the same twice. Every text has
    its own cap in frames; one that reaches it did not end by itself (`finish` is "length": a runaway) and is returned as far as
    it came. The tag that the model was trained with stands before each text: that of `language`, by default of the adapter's
    own. `context` is what was said before, [(text, codes, speaker)], for a voice to go on from (prompt_rows).
    `decoders` (read_decoders) spare whoever speaks often with the same weights that they are read each time.

    With `keep` (keep.Keep) what was said before is found again, by what voice.describe_speech says, and what is new is kept:
    its codes, each decoded alone, so that it sounds the same to the last bit. Before anything is spoken, raises SpeechError
    for a text with nothing to say or too long for the model's context, speakers.SpeakerError for a voice and tags.TagError
    for a language that the adapter was not trained with.
    """
    texts, known, context = list(texts), get_speakers(model), list(context)
    speakers = [speaker_ids] * len(texts) if isinstance(speaker_ids, str | int | None) else list(speaker_ids)
    voices = {speaker: pick_voice(known, "" if speaker is None else str(speaker)) for speaker in set(speakers)}
    speakers = [voices[speaker] for speaker in speakers]
    written, texts = texts, read_texts(model, texts, language)
    inner, sampling, active = inner_model(model), Sampling(temperature, top_k, top_p), name_active(model)
    tag = pick_tag(get_tags(model), language)
    for text, speaker in zip(texts, speakers, strict=True):
        check_text(inner, processor, text, speaker, tag, context)
    order = sorted(range(len(texts)), key=lambda i: cap_seconds(texts[i]))  # of like length together

    def make(chosen):
        nonlocal decoders
        decoders = decoders or read_decoders(model)  # not where all of it was said before
        waiting = [make_utterance(decoders, inner, processor, texts[order[place]], speakers[order[place]], active, tag, seed,
                                  sampling, context, place) for place in chosen]
        said = {one.key: one for one in say(decoders, waiting, batch_size)}
        return [{"text": texts[order[place]], "codes": said[place].codes, "finish": said[place].finish} for place in chosen]

    if keep is None:
        rows = make(range(len(order)))
    else:
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        settings |= {"context": [(said, np.asarray(codes).tolist(), voice) for said, codes, voice in context]} if context else {}
        keys = [hash_value([texts[i], speakers[i], encode_text(processor, texts[i], speakers[i], tag)]) for i in order]
        rows = make_once(keep, "spoken", describe_speech(model, settings), keys, make, _SCHEMA, AT_ONCE * batch_size)
    said = [None] * len(texts)
    for i, row in zip(order, rows, strict=True):
        codes = np.array(row["codes"], np.uint16)
        said[i] = Speech(written[i], decode(inner.codec_model, [codes])[0], codes, row["finish"])
    return said


def read_decoders(model) -> Decoders:
    """Return what speaks in `model` as it is now: with the active adapter, or none."""
    active = name_active(model)
    return Decoders(inner_model(model), [active] if active else [])


def read_texts(model, texts, language: str = "") -> list[str]:
    """Return texts as the model was trained to have them: read out (text.spoken) where its record says so, else as they are."""
    record = get_record(model)
    return [read_out(text, language or record["language"]) for text in texts] if record.get("read_out") else list(texts)


def make_utterance(decoders: Decoders, inner, processor, text: str, speaker: str, adapter: str = "", tag: str = "",
                   seed: int = 0, sampling: Sampling | None = None, context=(), key=None) -> Utterance:
    """Return what a Batch says of `text`, with its cap and its random numbers: behind its `tag`, after `context`."""
    cap = count_frames(inner, text)
    return Utterance(prompt_rows(decoders, processor, text, speaker, adapter, tag, context), cap,
                     draw_numbers(text, speaker, seed, cap, decoders.codebooks), adapter, sampling or Sampling(), key)


def prompt_rows(decoders: Decoders, processor, text: str, speaker: str, adapter: str = "", tag: str = "",
                context=()) -> torch.Tensor:
    """Return the rows of a prompt (length, width): what was said before, and the text that is to be said.

    `context` is [(text, codes (frames, codebooks), speaker)], each read as in training: its text, its frames, the end of speech.
    """
    rows, device = [], decoders.audio.device
    for said, codes, voice in context:
        frames = torch.as_tensor(np.asarray(codes).astype(np.int64), device=device)
        rows += [decoders.embed_text(encode_text(processor, said, voice, tag), adapter), decoders.embed_codes(frames),
                 decoders.embed_codes(torch.zeros_like(frames[:1]))]
    return torch.cat([*rows, decoders.embed_text(encode_text(processor, text, speaker, tag), adapter)])


def say(decoders: Decoders, waiting: list[Utterance], slots: int):
    """Yield each of `waiting` when it is said, `slots` of them at once, the longest first; each takes the place of one before."""
    waiting = sorted(waiting, key=lambda one: one.cap)
    if not waiting:
        return
    batch = Batch(decoders, min(slots, len(waiting)), max(len(one.prompt) + one.cap for one in waiting))
    while waiting or len(batch):
        while waiting and batch.free(waiting[-1].adapter):
            batch.admit(waiting.pop())
        yield from (one for one in batch.step() if one.finish)
