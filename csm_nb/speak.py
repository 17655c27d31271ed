"""Generation: many sentences at once, with both decoders cached, capped, and runaways counted."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from csm_nb.codec import decode
from csm_nb.csm import encode_text

# A generous upper bound of speaking time, for the cap: slow speech takes about 0.1 s a character.
SECONDS_PER_CHARACTER, SECONDS_ON_TOP = 0.15, 1.0


@dataclass(frozen=True)
class Speech:
    """What the model said: wav (float32, 24 kHz), codes (frames x codebooks), and whether it ended by itself."""

    text: str
    wav: np.ndarray
    codes: np.ndarray
    ended: bool


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator) -> torch.Tensor:
    """Draws one index a row from logits (batch, vocabulary); temperature 0 takes the likeliest."""
    if temperature <= 0:
        return logits.argmax(-1)
    values, indices = logits.float().topk(min(top_k, logits.shape[-1]))
    drawn = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return indices.gather(-1, drawn)[:, 0]


@torch.inference_mode()
def speak(model, processor, texts, speaker_ids="0", temperature: float = 0.6, top_k: int = 30, seed: int = 0,
          batch_size: int = 32) -> list[Speech]:
    """Speaks `texts` with the base or an adapted model, in batches; one speaker id for all or one a text.

    Reproducible by `seed`. Every text has its own cap in frames; one that reaches it did not end by itself
    (`ended` is False: a runaway) and is returned as far as it came.
    """
    texts = list(texts)
    speakers = [speaker_ids] * len(texts) if isinstance(speaker_ids, str) else list(speaker_ids)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator(device=inner.device).manual_seed(seed)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    codes, ended = [None] * len(texts), [False] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = generate_codes(inner, processor, [texts[i] for i in chosen], [speakers[i] for i in chosen],
                               temperature, top_k, generator)
        for i, (row, done) in zip(chosen, batch, strict=True):
            codes[i], ended[i] = row, done
    wavs = decode(inner.codec_model, codes)
    return [Speech(*parts) for parts in zip(texts, wavs, codes, ended, strict=True)]


def generate_codes(model, processor, texts, speakers, temperature, top_k, generator) -> list[tuple[np.ndarray, bool]]:
    """One batch of prompts to (codes as uint16 frames x codebooks, ended by itself) a prompt."""
    device, config = model.device, model.config
    prompts = [encode_text(processor, text, speaker) for text, speaker in zip(texts, speakers, strict=True)]
    longest, frame_rate = max(map(len, prompts)), model.codec_model.config.frame_rate
    caps = torch.tensor([int(frame_rate * (SECONDS_PER_CHARACTER * len(t) + SECONDS_ON_TOP)) for t in texts], device=device)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all rows go on at the same place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    embeds, cache = model.embed_text_tokens(ids), DynamicCache(config=config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    frames, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    lengths = caps.clone()
    for number in range(int(caps.max())):
        output = model.backbone_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                      past_key_values=cache, use_cache=True)
        frame = generate_frame(model, output.last_hidden_state[:, -1], temperature, top_k, generator)
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


def generate_frame(model, hidden: torch.Tensor, temperature: float, top_k: int, generator) -> torch.Tensor:
    """All codebooks of one frame, (batch, codebooks), from the backbone's last hidden state (batch, width)."""
    depth, cache = model.depth_decoder, DynamicCache(config=model.config.depth_decoder_config)
    codes = model.codec_model.config.codebook_size  # the vocabulary has a few ids more, which the codec can not decode
    tokens = [sample(model.lm_head(hidden)[..., :codes], temperature, top_k, generator)]
    ids = torch.stack([torch.zeros_like(tokens[0]), tokens[0]], 1)  # position 0 is replaced by the hidden state
    for _ in range(model.config.num_codebooks - 1):
        state = hidden.clone() if len(tokens) == 1 else None
        output = depth(input_ids=ids, backbone_last_hidden_state=state, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(sample(output.logits[:, -1, :codes], temperature, top_k, generator))
        ids = tokens[-1][:, None]
    return torch.stack(tokens, 1)
