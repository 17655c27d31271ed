"""A corpus that is spoken: sentences, read by voices in turn, as a manifest."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.manifest import write_manifest
from csm_nb.phonemes import espeak_ng
from csm_nb.synth.espeak import VOICES, Voice, speak_with

# Never spoken in training by any miniature model: they stand in for "a speaker that nobody has heard".
HELD_OUT_VOICES = (Voice("4", "m1", 48, 65, 160), Voice("5", "f3", 50, 65, 160))


def make_corpus(texts, language: str, out_dir, voices=VOICES, spoken_as: str | None = None) -> Path:
    """Speak `texts` in turn with `voices` into `out_dir` and return the path of its manifest.jsonl.

    The same arguments give the same samples. They are spoken on from clip to clip, which saves a start for each (half of
    the time), so that one clip depends on those before it.
    `spoken_as` lets the voice of another language read the text (English with a Norwegian accent: texts in English,
    language "en", spoken_as "no"). The manifest names the engine, so that synthetic speech is never taken for real.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    texts, rows, loaded = list(texts), [], espeak_ng.load_library()  # whatever makes the texts may speak itself
    with ThreadPoolExecutor(2) as writers:
        for number, text in enumerate(texts):
            voice = voices[number % len(voices)]
            wav, _ = speak_with(loaded, text, spoken_as or language, voice)
            path = out_dir / f"{number:05d}.wav"
            writers.submit(write_audio, path, wav)
            rows.append({
                "text": text, "audio_path": str(path), "speaker_id": voice.speaker_id, "language": language,
                "duration": round(len(wav) / SAMPLE_RATE, 3), "source": "espeak-ng (synthetic)",
                "accent": spoken_as or language, "voice": asdict(voice),
            })
    return write_manifest(rows, out_dir / "manifest.jsonl")
