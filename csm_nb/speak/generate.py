"""Generation: many sentences at once, with both decoders cached, capped, and runaways counted."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa
import torch
from transformers import DynamicCache

from csm_nb.codec.mimi import decode
from csm_nb.csm.load import encode_text, inner_model
from csm_nb.csm.speakers import get_speakers, pick_voice
from csm_nb.csm.tags import get_tags, pick_tag
from csm_nb.keep import make_once
from csm_nb.provenance import hash_value
from csm_nb.speak.voice import describe_speech
from csm_nb.text.letters import count_letters

# A generous upper bound of speaking time, for the cap: slow speech takes about 0.1 s per letter.
SECONDS_PER_LETTER, SECONDS_ON_TOP = 0.15, 1.0
_SCHEMA = pa.schema([("text", pa.string()), ("codes", pa.list_(pa.list_(pa.uint16()))), ("ended", pa.bool_())])


class SpeechError(ValueError):
    """A text that can not be spoken: nothing to say, or more than the model has room for; says which, and the limit."""


@dataclass(frozen=True)
class Speech:
    """What the model said: wav (float32, 24 kHz), codes (frames x codebooks), and whether it ended by itself."""

    text: str
    wav: np.ndarray
    codes: np.ndarray
    ended: bool


def sample(logits: torch.Tensor, temperature: float, top_k: int, drawn: torch.Tensor | None) -> torch.Tensor:
    """Return one index per row of logits (batch, vocabulary), by its number `drawn` (batch,), uniform in 0 to 1.

    The `top_k` likeliest share the line from 0 to 1 by their probabilities, in the order of their indices: by rank, two that
    are as likely but for rounding change places, and one of 64 utterances came out otherwise in another batch. Temperature 0
    takes the likeliest, and needs no number.
    """
    if temperature <= 0:
        return logits.argmax(-1)
    indices = logits.topk(min(top_k, logits.shape[-1])).indices.sort(-1).values
    shares = (logits.gather(-1, indices).float() / temperature).softmax(-1).cumsum(-1)
    place = (shares <= drawn[:, None] * shares[:, -1:]).sum(-1, keepdim=True).clamp(max=shares.shape[-1] - 1)
    return indices.gather(-1, place)[:, 0]


def draw_numbers(text: str, speaker: str, seed: int, frames: int, codebooks: int) -> torch.Tensor:
    """Return the random numbers of one utterance, uniform in 0 to 1, (frames, codebooks): of what it is alone."""
    digest = sha256(f"{seed}\0{speaker}\0{text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.rand(frames, codebooks, generator=generator)


def cap_seconds(text: str) -> float:
    """Return the longest that `text` may take to be spoken, by its letters read out; what takes longer is a runaway."""
    return SECONDS_PER_LETTER * count_letters(text) + SECONDS_ON_TOP


def check_text(model, processor, text: str, speaker: str = "0", tag: str = "") -> None:
    """Raise SpeechError when `text` holds nothing to say, or more than fits the model's context: prompt and capped frames."""
    if not any(c.isalnum() for c in text):
        raise SpeechError(f"there is nothing to say in {text!r}: it holds neither letter nor digit; leave it out")
    tokenizer, limit = processor.tokenizer, model.config.max_position_embeddings
    known = [i for i in tokenizer(text, add_special_tokens=False).input_ids if i != tokenizer.unk_token_id]
    if not any(c.isalnum() for c in tokenizer.decode(known)):
        raise SpeechError(f"there is nothing to say in {text!r}: the model's tokenizer knows none of its letters; give the text "
                          "in letters that it knows")
    prompt = len(encode_text(processor, text, speaker, tag))
    frames = int(model.codec_model.config.frame_rate * cap_seconds(text))
    if prompt + frames > limit:
        raise SpeechError(f"a text of {len(text)} characters takes up to {prompt + frames} positions ({prompt} of text, {frames} "
                          f"frames: {cap_seconds(text):.0f} s), and the model has {limit}: split it at its sentences and speak "
                          f"them one by one. It begins: {text[:60]!r}")


@torch.inference_mode()
def speak(model, processor, texts, speaker_ids=None, temperature: float = 0.6, top_k: int = 30, seed: int = 0,
          batch_size: int = 32, keep=None, language: str = "") -> list[Speech]:
    """Speak `texts` with the base or an adapted model, in batches; one speaker id for all, or one per text.

    Without a speaker id, the voice of the adapter's own corpus with the most clips, or the base's "0". What a text says
    follows from the model, the text, its voice and `seed`, not from the others of its batch: of 64 sentences none differed in
    batches of 1, 4 and 32, in float32 on a CPU; rounding may let one differ elsewhere. The same text twice says the same
    twice. Every text has its own cap in frames; one that reaches it did not end by itself (`ended` is False: a runaway) and
    is returned as far as it came. The tag that the model was trained with stands before each text: that of `language`, by
    default of the adapter's own.

    With `keep` (keep.Keep) what was said before is found again, by what voice.describe_speech says, and what is new is kept:
    its codes, each decoded alone, so that it sounds the same to the last bit. Before anything is spoken, raises SpeechError
    for a text with nothing to say or too long for the model's context, speakers.SpeakerError for a voice and tags.TagError
    for a language that the adapter was not trained with.
    """
    texts, known = list(texts), get_speakers(model)
    speakers = [speaker_ids] * len(texts) if isinstance(speaker_ids, str | int | None) else list(speaker_ids)
    voices = {speaker: pick_voice(known, "" if speaker is None else str(speaker)) for speaker in set(speakers)}
    speakers = [voices[speaker] for speaker in speakers]
    inner, tag = inner_model(model), pick_tag(get_tags(model), language)
    for text, speaker in zip(texts, speakers, strict=True):
        check_text(inner, processor, text, speaker, tag)
    order = sorted(range(len(texts)), key=lambda i: cap_seconds(texts[i]))  # of like length together

    def make(chosen):
        chosen = [order[place] for place in chosen]
        batch = generate_codes(inner, processor, [texts[i] for i in chosen], [speakers[i] for i in chosen],
                               temperature, top_k, seed, tag)
        return [{"text": texts[i], "codes": codes.tolist(), "ended": ended}
                for i, (codes, ended) in zip(chosen, batch, strict=True)]

    if keep is None:
        starts = range(0, len(order), batch_size)
        rows = [row for start in starts for row in make(range(start, min(start + batch_size, len(order))))]
    else:
        made_of = describe_speech(model, {"temperature": temperature, "top_k": top_k, "seed": seed})
        keys = [hash_value([texts[i], speakers[i], encode_text(processor, texts[i], speakers[i], tag)]) for i in order]
        rows = make_once(keep, "spoken", made_of, keys, make, _SCHEMA, batch_size)
    said = [None] * len(texts)
    for i, row in zip(order, rows, strict=True):
        codes = np.array(row["codes"], np.uint16)
        said[i] = Speech(texts[i], decode(inner.codec_model, [codes])[0], codes, row["ended"])
    return said


def generate_codes(model, processor, texts, speakers, temperature, top_k, seed, tag="") -> list[tuple[np.ndarray, bool]]:
    """Return, of one batch of prompts, (codes as uint16 frames x codebooks, ended by itself) per prompt."""
    device, config = model.device, model.config
    prompts = [encode_text(processor, text, speaker, tag) for text, speaker in zip(texts, speakers, strict=True)]
    longest, frame_rate = max(map(len, prompts)), model.codec_model.config.frame_rate
    counts = [int(frame_rate * cap_seconds(text)) for text in texts]
    caps, drawn = torch.tensor(counts, device=device), torch.zeros(len(texts), max(counts), config.num_codebooks)
    for row, (text, speaker, count) in enumerate(zip(texts, speakers, counts, strict=True)):
        drawn[row, :count] = draw_numbers(text, speaker, seed, count, config.num_codebooks)
    drawn = drawn.to(device)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all rows go on at the same place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    # A text table that was trained is float32, also where the model around it is bfloat16.
    dtype = model.backbone_model.embed_tokens.embed_audio_tokens.weight.dtype
    embeds, cache = model.embed_text_tokens(ids).to(dtype), DynamicCache(config=config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    frames, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    lengths = caps.clone()
    for number in range(max(counts)):
        output = model.backbone_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                      past_key_values=cache, use_cache=True)
        frame = generate_frame(model, output.last_hidden_state[:, -1], temperature, top_k, drawn[:, number])
        stops = (frame == config.codebook_eos_token_id).all(-1) & ~ended & (number < caps)
        lengths[stops] = number
        ended |= stops
        frames.append(frame)
        if (ended | (number + 1 >= caps)).all():
            break
        embeds = model.backbone_model.embed_tokens(frame[:, None])
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        positions = positions[:, -1:] + 1
    codes = torch.stack(frames, 1).cpu().numpy().astype(np.uint16)
    return [(codes[row, : max(1, int(lengths[row]))], bool(ended[row])) for row in range(len(prompts))]


def generate_frame(model, hidden: torch.Tensor, temperature: float, top_k: int, drawn: torch.Tensor) -> torch.Tensor:
    """Return all codebooks of one frame, (batch, codebooks), from the backbone's last hidden state (batch, width).

    `drawn` are the frame's random numbers, of the shape of its codebooks.
    """
    depth, cache = model.depth_decoder, DynamicCache(config=model.config.depth_decoder_config)
    codes = model.codec_model.config.codebook_size  # the vocabulary has a few ids more, which the codec can not decode
    tokens = [sample(model.lm_head(hidden)[..., :codes], temperature, top_k, drawn[:, 0])]
    ids = torch.stack([torch.zeros_like(tokens[0]), tokens[0]], 1)  # position 0 is replaced by the hidden state
    for number in range(1, model.config.num_codebooks):
        state = hidden.clone() if len(tokens) == 1 else None
        output = depth(input_ids=ids, backbone_last_hidden_state=state, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(sample(output.logits[:, -1, :codes], temperature, top_k, drawn[:, number]))
        ids = tokens[-1][:, None]
    return torch.stack(tokens, 1)
