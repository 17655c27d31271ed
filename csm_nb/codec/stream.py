"""A codec fed and read frame by frame: what a server and a microphone need."""

from contextlib import contextmanager

import numpy as np
import torch
from transformers import DynamicCache, MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiConvTranspose1d

from csm_nb.codec.mimi import check_causal, check_codebooks, check_codes, check_samples


@torch.inference_mode()
def encode_stream(codec, chunks, num_codebooks: int | None = None):
    """Yield the codes of one clip that comes in chunks: for each, uint16 (frames, codebooks), together those of `encode`.

    `chunks` are float32 mono at the codec's rate, of any length: samples that do not fill a frame wait for the next chunk,
    so that some give no frames. What waits at the end is filled up with zeros and yielded last. Streams can go on side
    by side. Raises ValueError as `encode` does, while it is iterated over.
    """
    check_codebooks(codec, num_codebooks)
    check_causal(codec)
    size, state, waiting = codec.config.frame_size, None, np.zeros(0, np.float32)
    for number, chunk in enumerate(chunks):
        waiting = np.concatenate([waiting, check_samples(f"chunk {number}", chunk)])
        whole = len(waiting) // size * size
        codes, state = _encode_next(codec, waiting[:whole], num_codebooks, state)
        waiting = waiting[whole:]
        yield codes
    if len(waiting):
        yield _encode_next(codec, np.pad(waiting, (0, size - len(waiting))), num_codebooks, state)[0]


@torch.inference_mode()
def decode_stream(codec, chunks):
    """Yield the speech of one clip whose codes come in chunks (frames, codebooks): float32 samples of each chunk's frames.

    Together they are what `decode` gives, to rounding. Streams can go on side by side. Raises ValueError as `decode` does,
    while it is iterated over.
    """
    check_causal(codec)
    state = None
    for number, chunk in enumerate(chunks):
        codes = check_codes(codec, f"chunk {number}", chunk)
        wav, state = _decode_next(codec, codes, state) if codes.size else (np.zeros(0, np.float32), state)
        yield wav


def _encode_next(codec, wav, num_codebooks, state):
    """Return codes (frames, codebooks) of the next whole frames, and the state after them; `state` is None at first."""
    if len(wav) == 0:
        return np.zeros((0, num_codebooks or codec.config.num_quantizers), np.uint16), state
    values = torch.from_numpy(wav)[None, None].to(codec.device)
    if isinstance(codec, MimiModel):
        out = codec.encode(values, num_quantizers=num_codebooks, use_streaming=True, **(state or {}))
        codes, state = out.audio_codes, {name: out[name] for name in ("encoder_past_key_values", "padding_cache")}
    else:
        state = state or codec.open_stream()
        codes = codec.encode_next(values, num_codebooks, state)
    return codes[0].T.cpu().numpy().astype(np.uint16), state


def _decode_next(codec, codes, state):
    """Return samples of the next frames of a stream, and the state after them; `state` is None at first."""
    codes = torch.from_numpy(codes.T.copy())[None].to(codec.device)
    if isinstance(codec, MimiModel):
        cache, past = state = state or (DynamicCache(config=codec.config), {})
        with _carry_inputs(codec, past):
            wav = codec.decode(codes, decoder_past_key_values=cache).audio_values
    else:
        state = state or codec.open_stream()
        wav = codec.decode_next(codes, state)
    return wav[0, 0].float().cpu().numpy(), state


@contextmanager
def _carry_inputs(codec, past):
    """Let the decoder's convolutions go on from their last inputs, in `past`, while open, instead of from silence.

    transformers carries them over for encoding alone (padding_cache); for decoding only attention has a cache.
    """

    def prepend(conv, inputs):
        return (torch.cat([past[conv], inputs[0]], dim=-1),) if conv in past else inputs

    def trim(conv, inputs, output):
        hidden, kernel, stride = inputs[0], conv.conv.kernel_size[0], conv.conv.stride[0]
        known = past[conv].shape[-1] if conv in past else 0
        if reach := (kernel - 1) * conv.conv.dilation[0] // stride:  # no decoder convolution has dilation and stride
            past[conv] = hidden[..., -reach:]
        return output[..., known * output.shape[-1] // hidden.shape[-1] :]

    convs = [m for part in (codec.upsample, codec.decoder) for m in part.modules()]
    convs = [m for m in convs if isinstance(m, MimiConv1d | MimiConvTranspose1d)]
    handles = [m.register_forward_pre_hook(prepend) for m in convs] + [m.register_forward_hook(trim) for m in convs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
