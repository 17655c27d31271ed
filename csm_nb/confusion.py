"""What is said and what is heard: base and adapters read sentences of several languages, the judges listen."""

import numpy as np
import pandas as pd

from csm_nb.csm import load_adapter, load_base, remove_adapters
from csm_nb.judge import bootstrap_interval, character_error_rates, identify_languages, transcribe
from csm_nb.languages import get_language
from csm_nb.params import TRAINED, resolve_path
from csm_nb.speak import speak
from csm_nb.speakers import get_speakers, pick_voice
from csm_nb.synth import VOICES, speak_text
from csm_nb.texts import make_sentences

CLEAR = 0.9  # share of a language's sentences that must be heard as that language


def find_adapters(folder, languages, method: str = "lora") -> tuple[dict, list[str]]:
    """({language: folder}, languages without one) among `folder`/lora_<language>, or full_<language> by method "full"."""
    paths = {code: resolve_path(folder) / f"{method}_{code}" for code in languages}
    found = {code: path for code, path in paths.items() if (path / TRAINED[method]).exists()}
    return found, [code for code in languages if code not in found]


def list_sentences(languages, count: int, seed: int = 0) -> pd.DataFrame:
    """Probes and `count` held-out sentences of each language: columns language, text, probe (bool)."""
    rows = [(code, text, True) for code in languages for text in get_language(code).probes]
    rows += [(code, text, False) for code in languages for text in make_sentences(code, count, seed, "test")]
    return pd.DataFrame(rows, columns=["language", "text", "probe"])


def speak_reference(prompts: pd.DataFrame) -> pd.DataFrame:
    """The prompts spoken by espeak-ng (synthetic): the ceiling of the judges. Adds model, wav, ended."""
    wavs = [speak_text(row.text, row.language, VOICES[0]) for row in prompts.itertuples()]
    return prompts.assign(model="reference", wav=wavs, ended=True)


def speak_models(model, processor, adapters: dict, prompts: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What the base and each adapter read: one row per model and prompt, with model, speaker, wav, ended added.

    `adapters` maps a language to its folder, whose name the rows have; each speaks with a voice of its own corpus. All are
    on one base under their names, one active at a time, and `model` is afterwards what it was before; fully trained models
    are loaded one after the other. The base reads every prompt, an adapter those of its own language and, of others, those
    whose column `cross` is true (without that column, all). Raises AdapterError for an adapter that can not be put on.
    """
    parts, worn = [_read_aloud("base", model, processor, prompts, seed)], None
    try:
        for language, folder in adapters.items():
            own = prompts[(prompts.language == language) | prompts.get("cross", True)]
            if (folder / TRAINED["lora"]).exists():
                worn = load_adapter(model if worn is None else worn, folder, name=f"adapter_{language}")
                parts.append(_read_aloud(folder.name, worn, processor, own, seed))
            else:
                trained, _ = load_base(str(folder), str(model.device), model.dtype)
                parts.append(_read_aloud(folder.name, trained, processor, own, seed))
                del trained  # before the next one comes
    finally:
        if worn is not None:
            remove_adapters(worn)
    return pd.concat(parts, ignore_index=True)


def _read_aloud(name, model, processor, prompts, seed):
    voice = pick_voice(get_speakers(model))
    said = speak(model, processor, list(prompts.text), voice, seed=seed)
    return prompts.assign(model=name, speaker=voice, wav=[s.wav for s in said], ended=[s.ended for s in said])


def judge_speech(rows: pd.DataFrame, lid, asr: dict) -> pd.DataFrame:
    """Adds what the judges heard: heard (language), confidence of the language that was read, transcript, cer."""
    scores = identify_languages(lid, list(rows.wav))
    rows = rows.assign(heard=[max(s, key=s.get) for s in scores],
                       confidence=[s.get(code, 0.0) for s, code in zip(scores, rows.language, strict=True)])
    transcripts = pd.Series("", index=rows.index)
    for code, part in rows.groupby("language"):
        transcripts[part.index] = transcribe(asr[code], list(part.wav))
    return rows.assign(transcript=transcripts, cer=character_error_rates(list(rows.text), list(transcripts)))


def share_right(rows: pd.DataFrame) -> pd.DataFrame:
    """By model and language read: share heard as that language and mean CER, each with a 95 % interval; runaways; n."""
    table = []
    for (name, code), part in rows.groupby(["model", "language"], sort=False):
        right = (part.heard == code).to_numpy(float)
        (right_low, right_high), (cer_low, cer_high) = bootstrap_interval(right), bootstrap_interval(part.cer.to_numpy())
        table.append({
            "model": name, "read": code, "heard right": right.mean(), "low": right_low, "high": right_high,
            "heard most": part.heard.mode()[0], "CER": part.cer.mean(), "CER low": cer_low, "CER high": cer_high,
            "runaways": int((~part.ended).sum()), "sentences": len(part),
        })
    return pd.DataFrame(table).round(3)


def pair_with_reference(rows: pd.DataFrame, reference: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Clips to compare by eye and ear, two a row: the reference audio of its sentence, then what the model said.

    (label, wav) each; the label says what the ASR wrote and how far that is from the text.
    """
    originals = reference.set_index(["language", "text"])
    clips = []
    for row in rows.itertuples():
        original = originals.loc[(row.language, row.text)]
        for name, clip in ((f"reference, {row.language}", original), (row.model, row)):
            clips.append((f"{name}, {clip.cer:.0%} wrong:\n“{clip.transcript}”", clip.wav))
    return clips


def judge_verdict(reference: pd.DataFrame, spoken: pd.DataFrame, language: str) -> tuple[str, dict]:
    """("clear" | "bleeds into xx" | "unclear: why", metrics) for the adapter of `language` reading its own sentences.

    Clear from 90 % heard right; unclear when the judge itself does not reach that on the reference audio. What it bleeds
    into is what was heard most instead, all of them where several were heard equally often.
    """
    table = pd.concat([share_right(reference), share_right(spoken)])
    own = spoken[spoken.model.isin([f"{method}_{language}" for method in TRAINED]) & (spoken.language == language)]
    ceiling = float((reference[reference.language == language].heard == language).mean())
    metrics = {"table": table.to_dict("records"), "ceiling": ceiling}
    if len(own) == 0:
        return "unclear: no adapter", metrics
    heard = own.heard.value_counts(normalize=True)
    metrics |= {"heard_right": float(heard.get(language, 0.0)), "cer": float(own.cer.mean()), "runaways": int((~own.ended).sum())}
    if ceiling < CLEAR:
        return f"unclear: judge hears {ceiling:.0%} of the reference", metrics
    if metrics["heard_right"] >= CLEAR:
        return "clear", metrics
    wrong = heard.drop(language, errors="ignore")
    return f"bleeds into {', '.join(sorted(wrong.index[wrong == wrong.max()]))}", metrics


def judge_inputs(texts, speech: dict, asr, language: str) -> pd.DataFrame:
    """CER of the same sentences said from several inputs: rows with model (the input's name), text, transcript, cer."""
    parts = []
    for name, said in speech.items():
        heard = transcribe(asr, [s.wav for s in said])
        parts.append(pd.DataFrame({
            "model": name, "language": language, "text": texts, "wav": [s.wav for s in said], "ended": [s.ended for s in said],
            "transcript": heard, "cer": character_error_rates(texts, heard),
        }))
    return pd.concat(parts, ignore_index=True)


def compare_inputs(rows: pd.DataFrame, spelled: list[dict], phonemic: list[dict]) -> tuple[str, dict]:
    """("phonemes" | "spelling" | "no difference", metrics): the paired CER difference, spelling minus phonemes.

    The interval is a 95 % bootstrap over sentences; a side wins when it leaves out zero.
    """
    by_text = rows.pivot_table(index="text", columns="model", values="cer")
    difference = (by_text["spelling"] - by_text["phonemes"]).to_numpy()
    low, high = bootstrap_interval(difference)
    last = {name: [row["eval_loss"] for row in history if "eval_loss" in row][-1]
            for name, history in (("spelling", spelled), ("phonemes", phonemic))}
    metrics = {
        "cer_spelling": float(by_text["spelling"].mean()), "cer_phonemes": float(by_text["phonemes"].mean()),
        "cer_difference": float(np.mean(difference)), "low": float(low), "high": float(high), "sentences": len(by_text),
        "loss_spelling": last["spelling"], "loss_phonemes": last["phonemes"],
    }
    verdict = "phonemes" if low > 0 else "spelling" if high < 0 else "no difference"
    return verdict, metrics
