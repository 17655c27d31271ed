"""Silence at the ends of clips is cut to a margin, and their level matched to a loudness: each is written once."""

from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from torchaudio import functional

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.provenance import hash_files, replace_file

FRAME, HOP = 480, 120  # samples: 20 ms, every 5
# Speech is what lies more than ABOVE over the clip's noise floor (the level that a twentieth of its frames is below), and at
# most QUIETEST under its loudest frame, which is what librosa.effects.trim calls silence. In 90 sentences of six languages by
# espeak-ng, between silence of .3 to 1.5 s, its onset is found at most 7 ms late by a noise 30 dB below it (22 by 10 dB over
# the floor) and its end 43; by a noise 20 dB below it would be 70 and 100, so a clip with less CONTRAST than this stays whole.
ABOVE, FLOOR, QUIETEST, CONTRAST = 6, 5, 60, 30  # dB, %, dB, dB
PEAK = -1.0  # dBFS that no gain goes beyond: the highest true peak of EBU R128 (2020), section i
GATE = 0.4  # s: the block of ITU-R BS.1770-4; a shorter clip is measured as if it went on and on


def find_kept(wav, margin: float) -> tuple[int, int]:
    """Return (first, last) of the samples at 24 kHz that stay when `margin` s of silence are left before and after the speech.

    All of them stay where speech can not be told from noise, for a margin of 0, and where there is less silence than that.
    """
    if not margin or len(wav) < FRAME:
        return 0, len(wav)
    levels = librosa.amplitude_to_db(librosa.feature.rms(y=wav, frame_length=FRAME, hop_length=HOP)[0], ref=np.max, top_db=None)
    floor = np.percentile(levels, FLOOR)
    if floor > -CONTRAST:
        return 0, len(wav)
    quietest = min(QUIETEST, -(floor + ABOVE))
    _, (first, last) = librosa.effects.trim(wav, top_db=quietest, frame_length=FRAME, hop_length=HOP)
    more = round(margin * SAMPLE_RATE)
    return max(0, int(first) - more), min(len(wav), int(last) + more)


def measure_loudness(wav, sample_rate: int = SAMPLE_RATE) -> float:
    """Return the loudness of mono samples in LUFS (ITU-R BS.1770-4, torchaudio); NaN where all is below -70."""
    wav = np.resize(wav, max(len(wav), int(np.ceil(GATE * sample_rate))))
    return float(functional.loudness(torch.from_numpy(wav)[None], sample_rate))


def find_gain(wav, sample_rate: int, loudness: float) -> tuple[float, bool]:
    """Return (dB, whether the peak limits it) that bring samples to `loudness` in LUFS; 0 for 0, and where nothing is loud."""
    wanted = loudness - measure_loudness(wav, sample_rate) if loudness else 0.0
    most = max(0.0, PEAK - 20 * float(np.log10(np.abs(wav).max() + 1e-12)))
    return (round(min(wanted, most), 2), wanted > most) if np.isfinite(wanted) else (0.0, False)


def level_clips(rows, loudness: float = 0.0) -> list[dict]:
    """Return `rows` with each audio_path a WAV of what is `kept` of it (check.check_clips), at `loudness` in LUFS (0: as it is).

    A file lies in data/clips, mono at its own sample rate, named by the bytes it comes from and what was done to it; it is
    written once. `levelled` says what that is: s cut off both ends together, gain in dB, whether the peak limited it. The
    marks of a row (`windows`) move with the cut. A row of which nothing is cut stays as it is for a loudness of 0, and codes
    alone stay in any case.
    """
    rows = list(rows)
    at = [number for number, row in enumerate(rows) if (loudness or row.get("kept")) and "codes_row" not in row]
    for number, content in zip(at, hash_files(Path(rows[number]["audio_path"]) for number in at), strict=True):
        rows[number] = _level_clip(rows[number], content, loudness)
    return rows


def _level_clip(row, content, loudness):
    rate = soundfile.info(row["audio_path"]).samplerate
    whole = read_audio(row["audio_path"], rate)
    start, end = row.get("kept") or (0.0, len(whole) / rate)
    first, last = round(start * rate), min(len(whole), round(end * rate))
    wav = whole[first:last]
    gain, limited = find_gain(wav, rate, loudness)
    path = paths.ROOT / "data" / "clips" / f"{content}-{first}-{last}-{loudness:g}-lufs.wav"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            soundfile.write(part, np.clip(wav * 10 ** (gain / 20), -1, 1), rate, format="WAV", subtype="PCM_16")
    row = {key: value for key, value in row.items() if key != "kept"}
    if row.get("windows"):
        row["windows"] = [[one - start, other - start, flag] for one, other, flag in row["windows"]
                          if start <= one < other <= end]
    return row | {"audio_path": str(path), "levelled": {"cut": round((len(whole) - len(wav)) / rate, 3), "gain": gain,
                                                        "limited": bool(limited)}}


def describe_levels(rows) -> str:
    """Return in words what level_clips cut off and by how much it changed the level, with the extremes; "" where nothing."""
    done = [row["levelled"] for row in rows if "levelled" in row]
    if not done:
        return ""
    cut, gain = (np.array([one[name] for one in done]) for name in ("cut", "gain"))
    limited = sum(one["limited"] for one in done)
    said = f"silence cut off: {np.median(cut):.2f} s (median), {cut.max():.2f} s at most; gain: {np.median(gain):+.1f} dB "
    said += f"(median), {gain.min():+.1f} to {gain.max():+.1f}"
    return said + f"; less gain than asked for, as peaks stay below {PEAK:g} dBFS: {limited} clips" * bool(limited)
