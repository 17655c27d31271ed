"""What the miniature judges score on sentences and voices that they never heard, and the cards that say so."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from csm_nb.audio import SAMPLE_RATE
from csm_nb.judge import character_error_rates, identify_languages, load_asr, load_lid, transcribe
from csm_nb.languages import LANGUAGES
from csm_nb.mini_judges import CODES
from csm_nb.params import ROOT
from csm_nb.synth import HELD_OUT_VOICES, VOICES, speak_text
from csm_nb.texts import make_sentences


def speak_held_out(code: str, voices, clips: int, seed: int = 1, read_by: str | None = None):
    """`clips` held-out sentences of language `code` as (text, wav at 24 kHz), spoken by `voices` in turn."""
    texts = make_sentences(code, clips, seed=seed, split="held_out")
    return [(text, speak_text(text, read_by or code, voices[i % len(voices)])) for i, text in enumerate(texts)]


def evaluate_judges(asr=ROOT / "models/asr-mini", lid=ROOT / "models/lid-mini", clips: int = 30, seconds=(2.0, 4.0),
                    seed: int = 1, round_trip=None) -> dict:
    """Figures of both judges on held-out sentences, by language: mean CER, and the share of languages told right.

    `seen` are the voices of the miniature models, `unheard` two formant variants that no training clip had. Language is
    judged on clips cut to between `seconds`; `read_by_others` are sentences of one language in the voice of another,
    where right means the voice's. `round_trip(wav) -> wav` judges what a codec makes of the same clips.
    """
    rng = np.random.default_rng(seed)
    asr, lid = load_asr(str(asr), "cpu", "en"), load_lid(str(lid), "cpu")
    figures = {"asr_cer": {}, "lid_right": {}, "clips": clips}
    for group, voices in (("seen", VOICES), ("unheard", HELD_OUT_VOICES), ("read_by_others", VOICES)):
        errors, right = {}, {}
        for number, code in enumerate(CODES):
            read_by = CODES[(number + 1 + seed % 9) % len(CODES)] if group == "read_by_others" else code
            texts, wavs = zip(*speak_held_out(code, voices, clips, seed, read_by), strict=True)
            wavs = [round_trip(wav) for wav in wavs] if round_trip else list(wavs)
            if group != "read_by_others":
                errors[code] = float(np.mean(character_error_rates(list(texts), transcribe(asr, wavs))))
            cut = [wav[: int(rng.uniform(*seconds) * SAMPLE_RATE)] for wav in wavs]
            best = [max(p, key=p.get) for p in identify_languages(lid, cut)]
            right[read_by] = float(np.mean([guess == read_by for guess in best]))
        if errors:
            figures["asr_cer"][group] = {**errors, "mean": float(np.mean(list(errors.values())))}
        figures["lid_right"][group] = {**right, "mean": float(np.mean(list(right.values())))}
    return figures


def write_model_card(folder, kind: str, figures: dict) -> Path:
    """README.md of a judge (`kind` "asr" or "lid") from its training record and the `figures` of `evaluate_judges`."""
    folder = Path(folder)
    training = json.loads((folder / "training.json").read_text())
    rows = figures["asr_cer" if kind == "asr" else "lid_right"]
    heads = {"seen": "shipped voices", "unheard": "unheard voices", "read_by_others": "another language's text"}
    table = ["| language | " + " | ".join(heads[g] for g in rows) + " |", "| --- |" + " --- |" * len(rows)]
    table += [f"| {c} | " + " | ".join(f"{100 * rows[g][c]:.1f} %" for g in rows) + " |" for c in (*CODES, "mean")]
    what, task, measure = {
        "asr": ("speech recogniser (characters, CTC)", "automatic-speech-recognition",
                "Character error rate (mean over clips, case and punctuation removed)"),
        "lid": ("language judge", "audio-classification",
                "Share of clips of 2 to 4 s whose language is told right. In the last column the voice reads a text of "
                "another language, and right is the language of the voice: the sounds decide, not the words"),
    }[kind]
    size = (folder / "model.safetensors").stat().st_size / 1e6
    command = f"python -m csm_nb.mini_judges {kind} {training['minutes']:g} {training['seed']}"
    card = f"""---
language: [{", ".join(f'"{c}"' for c in CODES)}]
pipeline_tag: {task}
library_name: transformers
---
# {folder.name}

A miniature {what} for {", ".join(LANGUAGES[c].name for c in CODES)}.
It was trained on nothing but **espeak-ng synthetic speech** of template sentences, and it judges such speech: it proves
the workbook, and says nothing about people.

    pipeline("{task}", "models/{folder.name}")

A conformer (Wav2Vec2-BERT classes) of {size:.1f} MB, float16 on disk, float32 in memory. The same voices spoke every
language; noise, equaliser, low-pass, speed and level were drawn anew for every clip, and no clip was heard twice.

Made by `{command}`: {training["steps"]} steps in {training["seconds"]} s on {training["processor"]}.

{measure}, {figures["clips"]} held-out sentences a language (none of them in training):

{chr(10).join(table)}
"""
    path = folder / "README.md"
    path.write_text(card)
    return path


def main(clips: str = "30") -> None:
    """python -m csm_nb.mini_judge_cards [CLIPS]: figures of both judges, printed and written into their cards."""
    torch.set_num_threads(1)
    figures = evaluate_judges(clips=int(clips))
    print(json.dumps(figures, indent=1))
    for kind in ("asr", "lid"):
        print(write_model_card(ROOT / f"models/{kind}-mini", kind, figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
