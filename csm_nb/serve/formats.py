"""Speech as a file or a stream of bytes: one encoder for each answer, and what every file says of itself."""

import io

import numpy as np
import soundfile
from soundfile import _ffi, _snd

# What libsndfile calls a format, how its samples are held, and its media type
FORMATS = {
    "wav": ("WAV", "PCM_16", "audio/wav"), "mp3": ("MP3", "MPEG_LAYER_III", "audio/mpeg"),
    "flac": ("FLAC", "PCM_16", "audio/flac"), "opus": ("OGG", "OPUS", "audio/ogg"), "pcm": ("RAW", "PCM_16", "audio/pcm"),
}
UNKNOWN = b"\xff\xff\xff\xff"  # the size in a RIFF header of what has no end yet
PAGE = 0x1302, 50.0  # SFC_SET_OGG_PAGE_LATENCY_MS of libsndfile, and ms: a page of Ogg holds a second otherwise
MP3_HEAD = b"\xff\xf3"  # of a frame of MPEG-2 layer III, which 24 kHz is


class Encoder:
    """Encodes one utterance as it comes: `feed` returns the bytes that are ready, `close` the rest.

    Without `stream` all bytes come with `close`, with true sizes in the header. `about` is written into the file's metadata; raw
    samples ("pcm": 16 bits, little endian) have none.
    """

    def __init__(self, kind: str, rate: int, about: str, stream: bool):
        container, held, _ = FORMATS[kind]
        self.kind, self.stream, self.sent, self.buffer = kind, stream, 0, io.BytesIO()
        how = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if kind == "mp3" else {}  # 80 kbit/s; see _take
        self.file = soundfile.SoundFile(self.buffer, "w", rate, 1, held, "LITTLE" if kind == "pcm" else None, container, **how)
        if kind != "pcm":
            self.file.title, self.file.software, self.file.comment = "Synthetic speech", "csm-nb", about
        if kind == "opus":
            _snd.sf_command(self.file._file, PAGE[0], _ffi.new("double*", PAGE[1]), 8)

    def feed(self, wav: np.ndarray) -> bytes:
        """Return the bytes that are ready after these samples (float32, -1 to 1); b"" where the encoder waits for more."""
        self.file.write(np.clip(wav, -1, 1))
        return self._take() if self.stream else b""

    def close(self) -> bytes:
        """Return what is left: the end of a stream, or a whole file."""
        self.file.close()
        return self._take() if self.stream else self.buffer.getvalue()

    def _take(self):
        ready = self.buffer.getvalue()[self.sent :]
        if self.sent == 0 and self.kind == "mp3":
            # LAME's first frame is for the figures of the whole file, which come late: empty it would be heard as silence, and
            # of a varying bit rate nobody could tell the duration without it.
            head, _, frames = ready.partition(MP3_HEAD)
            _, head_again, frames = frames.partition(MP3_HEAD)
            self.sent = len(ready) if frames else 0
            return head + head_again + frames if frames else b""
        if self.sent == 0 and self.kind == "wav" and ready:
            size = ready.index(b"data") + 4
            ready = ready[:4] + UNKNOWN + ready[8:size] + UNKNOWN + ready[size + 4 :]
        self.sent += len(ready)
        return ready
