"""Speech that can be played while it is made: frames by chunks that grow, decoded as they come."""

import numpy as np

from csm_nb.codec.stream import decode_stream

RAMP = (1, 2, 4, 8, 12)  # frames of the first chunks; the last size stays


def chunk_frames(frames):
    """Yield frames of codes (codebooks,) as chunks (frames, codebooks), uint16: the first of 1 frame, later ones of more.

    The first sound is there after one frame, and later the decoder is asked less often. What is left at the end is one chunk.
    """
    waiting, sizes = [], iter(RAMP)
    size = next(sizes)
    for codes in frames:
        waiting.append(codes)
        if len(waiting) == size:
            yield np.array(waiting, np.uint16)
            waiting, size = [], next(sizes, RAMP[-1])
    if waiting:
        yield np.array(waiting, np.uint16)


def stream_speech(inner, frames):
    """Yield the speech (float32, 24 kHz) of frames of codes while they come: together what the codec gives of them at once."""
    return decode_stream(inner.codec_model, chunk_frames(frames))
