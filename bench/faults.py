"""Whether every fault planted into a corpus is named with its kind, and every good clip passes.

    nice python bench/faults.py --clips 10000 --share 0.01

speaks a few hundred sentences by espeak-ng, makes so many clips of them, no two alike (level, silence, a little noise), plants
faults among them and lets csm_nb.clips.check sort them. It prints one line per kind and ends with 1 where one was missed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.clips.check import check_clips
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences

BASES = 200  # clips that espeak-ng speaks; the others are made of them
OTHER = "I do not know what that is or where she lives."
# kind: (samples, text) of a clip with that fault, of the samples and the text of a good one, and another good text
FAULTS = {
    "unreadable": lambda wav, text, more: (None, text),
    "silent": lambda wav, text, more: (0.001 * wav, text),
    "too short": lambda wav, text, more: (wav[: SAMPLE_RATE // 5], text),
    "too long": lambda wav, text, more: (np.resize(wav, 31 * SAMPLE_RATE), text),
    "clipped": lambda wav, text, more: (np.clip(100 * wav, -1, 1), text),
    "cut short": lambda wav, text, more: (wav[np.argmax(np.convolve(wav**2, np.ones(960), "same")) :], text[-12:]),
    "no text": lambda wav, text, more: (wav, "..."),
    "foreign letters": lambda wav, text, more: (wav, "Собака спит на полу."),
    "other language": lambda wav, text, more: (wav, OTHER),
    "pace": lambda wav, text, more: (wav, f"{text} {more} " * 4),
    "same audio": lambda wav, text, more: (wav, more),
}  # fmt: skip


def plant_faults(folder, clips: int, share: float, language: str = "da", seed: int = 0) -> list[tuple[dict, str]]:
    """Write a corpus of `clips` into `folder` and return (row, kind of its fault or "") of each; `share` of them have one."""
    rng, planted = np.random.default_rng(seed), []
    texts = make_sentences(language, min(BASES, clips), seed)
    bases = [speak_text(text, language, VOICES[number % len(VOICES)]) for number, text in enumerate(texts)]
    every, kinds, last = round(1 / share), list(FAULTS), None
    for number in range(clips):
        which = number % len(bases)
        text, more = texts[which], texts[which - 1]
        silence = rng.integers(0, SAMPLE_RATE // 5, 2)
        wav = np.pad(bases[which], silence) * rng.uniform(0.3, 1.5)
        wav = (wav + rng.normal(0, 1e-4, len(wav))).astype(np.float32)
        kind = kinds[number // every % len(kinds)] if number % every == every - 1 else ""
        if kind:
            wav, text = FAULTS[kind]({"same audio": last, "too short": bases[which]}.get(kind, wav), text, more)
        else:
            last = wav
        path = Path(folder) / f"{number:06d}.wav"
        if wav is None:
            path.write_bytes(b"no audio")
        else:
            write_audio(path, wav)
        row = {"text": text, "audio_path": str(path), "speaker_id": str(number // len(bases)), "language": language}
        planted.append((row, kind))
    return planted


def count_found(planted) -> pd.DataFrame:
    """Return, by kind of fault planted, how many clips have it, were set aside by its name, by another, and not at all."""
    good, set_aside = check_clips([row for row, _ in planted])
    named = {row["audio_path"]: "" for row in good} | {row["audio_path"]: row["kind"] for row in set_aside}
    table = pd.DataFrame([(kind, named[row["audio_path"]]) for row, kind in planted], columns=["planted", "found"])
    table["right"], table["missed"] = table.planted == table.found, (table.planted != "") & (table.found == "")
    counts = table.groupby("planted").agg(clips=("found", "size"), right=("right", "sum"), missed=("missed", "sum"))
    return counts.assign(otherwise=counts.clips - counts.right - counts.missed).rename(index={"": "good clips"})


def main() -> int:
    """Print the table; return 1 where a fault was missed or named otherwise, or a good clip set aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.01, help="of the clips that have a fault")
    parser.add_argument("--language", default="da")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        planted = plant_faults(folder, given.clips, given.share, given.language)
        made = time.perf_counter()
        counts = count_found(planted)
        took = time.perf_counter() - made
    print(counts.to_string())
    print(f"{given.clips} clips made in {made - start:.0f} s, checked in {took:.0f} s: {given.clips / took:.0f} per second")
    return int((counts.clips != counts.right).any())


if __name__ == "__main__":
    sys.exit(main())
