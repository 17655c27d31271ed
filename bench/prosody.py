"""How many times faster than real time prosody is measured on one core: python bench/prosody.py [repeats] [manifest.jsonl]."""

import os
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import numpy as np
import torch

from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.manifest import read_manifest
from csm_nb.prosody.f0 import METHODS, ProsodyError, compare_clip, find_pitch_range, track_f0
from csm_nb.prosody.quality import measure_cpp, measure_irregularity, measure_low_band, track_voice
from csm_nb.prosody.turns import find_turns
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences


def gather_clips(manifest: str = "") -> dict[str, list]:
    """Return the clips to measure by what they are: espeak-ng in a low and a high voice, and of a manifest's recordings
    every twentieth that is longer than half a second."""
    texts = make_sentences("no", 8, 0, "test")
    clips = {f"espeak-ng {name}": [speak_text(text, "no", voice) for text in texts]
             for name, voice in (("low", VOICES[0]), ("high", VOICES[1]))}  # fmt: skip
    if manifest:
        wavs = [read_audio(row["audio_path"]) for row in read_manifest(manifest)]
        clips["recordings"] = [wav for wav in wavs if len(wav) > 0.5 * SAMPLE_RATE][::20]
    return clips


def time_parts(wavs, repeats: int) -> dict[str, float]:
    """Return seconds of audio per second of processor time, best of `repeats`, for each part and for the default set."""
    ranges = [find_pitch_range([wav]) for wav in wavs]
    tracks = [track_f0(wav, pitch_range=pitch_range) for wav, pitch_range in zip(wavs, ranges, strict=True)]
    parts = {
        "pitch range": lambda wav, pitch_range, track: find_pitch_range([wav]),
        "F0, HNR": lambda wav, pitch_range, track: track_f0(wav, pitch_range=pitch_range),
        "low band": lambda wav, pitch_range, track: measure_low_band(wav, track.times),
        "CPP": lambda wav, pitch_range, track: measure_cpp(wav, track.times, pitch_range),
        "irregularity": lambda wav, pitch_range, track: measure_irregularity(wav, track.times, pitch_range),
        "turns": lambda wav, pitch_range, track: find_turns(track),
        "default set": lambda wav, pitch_range, track: track_voice(wav, track_f0(wav, pitch_range=pitch_range)),
        "default set, range unknown": lambda wav, pitch_range, track: track_voice(wav, track_f0(wav)),
        "compare_clip": lambda wav, pitch_range, track: compare_clip(wav, wav, pitch_range=pitch_range),
    } | {f"F0 by {name}": lambda wav, pitch_range, track, name=name: track_f0(wav, SAMPLE_RATE, pitch_range, name)
         for name in METHODS[1:]}  # fmt: skip
    figures, seconds = {}, sum(map(len, wavs)) / SAMPLE_RATE
    for name, run in parts.items():
        found = []
        for _ in range(repeats + 1):  # the first compiles and loads
            start = time.process_time()
            try:
                for clip in zip(wavs, ranges, tracks, strict=True):
                    run(*clip)
            except ProsodyError as error:
                print(error)
                break
            found.append(time.process_time() - start)
        figures[name] = seconds / min(found[1:]) if found else np.nan
    return figures


def main(repeats: int, manifest: str) -> None:
    """Print the table: one row per part, one column per kind of clips."""
    torch.set_num_threads(1)
    clips = gather_clips(manifest)
    columns = {name: time_parts(wavs, repeats) for name, wavs in clips.items()}
    kinds = [f"{name} ({sum(map(len, wavs)) / SAMPLE_RATE:.0f} s)" for name, wavs in clips.items()]
    print(f"{'x real time, one core':28}" + "".join(f"{kind:>24}" for kind in kinds))
    for part in next(iter(columns.values())):
        print(f"{part:28}" + "".join(f"{figures[part]:24.1f}" for figures in columns.values()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2] if len(sys.argv) > 2 else "")
