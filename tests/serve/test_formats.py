"""Files and streams of speech: true sizes, one duration in all, and a word on what they are."""

import io

import numpy as np
import pytest
import soundfile

from csm_nb.serve.formats import FORMATS, UNKNOWN, Encoder

RATE, FRAME = 24_000, 0.08  # s; a frame of CSM
ABOUT = "Synthetic speech, no recording of a person. Model csm-1b, adapter lora_no+sv, speaker 12, seed 1234567."
WAV = (0.2 * np.random.default_rng(0).standard_normal(2 * RATE + 960)).astype(np.float32)


def encode(kind, stream):
    """Bytes of WAV by pieces of a frame of 25 Hz, as they come."""
    encoder = Encoder(kind, RATE, ABOUT, stream)
    return [encoder.feed(WAV[place : place + 960]) for place in range(0, len(WAV), 960)] + [encoder.close()]


def decode(data, kind):
    if kind == "pcm":
        return np.frombuffer(data, "<i2") / 2**15
    if kind == "flac":  # libsndfile wants to know how many there are; others read on
        data = data[:21] + bytes([data[21] & 0xF0]) + len(WAV).to_bytes(4, "big") + data[26:]
    return soundfile.read(io.BytesIO(data))[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_duration_is_the_same_to_one_frame_and_the_sound_is_that_of_the_samples(kind, stream):
    heard = decode(b"".join(encode(kind, stream)), kind)
    assert abs(len(heard) - len(WAV)) <= FRAME * RATE
    if kind in ("wav", "flac", "pcm"):
        assert len(heard) == len(WAV) and np.abs(heard - WAV).max() < 2**-15
    assert np.sqrt(np.mean(heard**2)) == pytest.approx(np.sqrt(np.mean(WAV**2)), rel=0.2)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_gives_bytes_long_before_its_end(kind):
    sizes = np.cumsum([len(piece) for piece in encode(kind, True)])
    assert sizes[len(sizes) // 4] > 0.1 * sizes[-1]
    assert [len(piece) for piece in encode(kind, False)][:-1] == [0] * (len(sizes) - 1)


def test_a_whole_wav_has_its_true_sizes_and_a_streamed_one_those_for_unknown():
    whole, streamed = b"".join(encode("wav", False)), b"".join(encode("wav", True))
    place = whole.index(b"data") + 4
    assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
    assert int.from_bytes(whole[place : place + 4], "little") == 2 * len(WAV) == len(whole) - place - 4
    assert streamed[4:8] == UNKNOWN == streamed[place : place + 4] and streamed[place + 4 :] == whole[place + 4 :]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "pcm"])
def test_every_file_says_that_it_is_synthetic_and_what_made_it(kind, stream):
    with soundfile.SoundFile(io.BytesIO(b"".join(encode(kind, stream)))) as file:
        assert file.comment == ABOUT and file.title == "Synthetic speech"
    assert kind != "wav" or b"LIST" in encode(kind, True)[0]


def test_samples_beyond_full_scale_are_clipped():
    encoder = Encoder("pcm", RATE, ABOUT, True)
    assert np.frombuffer(encoder.feed(np.array([2, -2], np.float32)), "<i2").tolist() == [32767, -32768]
