"""What the base and the adapters read aloud, and their reading of it."""

import numpy as np
import pandas as pd

from csm_nb.csm.adapters import AdapterError, load_adapter, remove_adapters
from csm_nb.csm.load import load_base
from csm_nb.csm.speakers import get_speakers, pick_voice
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path
from csm_nb.provenance import read_json
from csm_nb.recipe import TRAINED
from csm_nb.speak.generate import speak
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences

FEWEST = 10  # sentences below which a bootstrap of them decides nothing: of two it is as narrow as they are alike
HOME = "en"  # what the base model was taught
PROBES, HELD_OUT = "probes", "held-out"  # the kinds of sentences; nothing was chosen on the held-out ones


def find_adapters(folder, names: dict, method: str = "lora") -> tuple[dict, list[str]]:
    """Return ({language: folder}, languages without one) of the adapters in `folder`.

    `names` maps each language to the name that its adapter has there (runs.folders.name_trained): several may share one.
    Raises AdapterError for one whose base.json names other languages or can not be read.
    """
    paths = {code: resolve_path(folder) / name for code, name in names.items()}
    found = {code: path for code, path in paths.items() if (path / TRAINED[method]).exists()}
    for code, path in found.items():
        try:
            record = read_json(path / "base.json")
            taught = record.get("language", code)
            taught = code if code in record.get("tags", {}) else taught
        except (ValueError, AttributeError) as error:
            raise AdapterError(f"{path}/base.json is half a file, or none of an adapter's ({error}); fetch it again, or train it "
                               "again") from error
        if taught != code:
            raise AdapterError(f"{path} is trained on {taught}, by its base.json, and would be read as the one of {code}: rename "
                               f"it to {method}_{taught}, or run 03_adapter for {code}")
    return found, [code for code in names if code not in found]


def list_languages(language: str, compare) -> list[str]:
    """Return the languages that are told apart: those of `compare`, each once and in its order, and always `language`."""
    return list(dict.fromkeys([*compare, *([] if language in compare else [language])]))


def list_sentences(languages, count: int, seed: int = 0) -> pd.DataFrame:
    """Return the probes and `count` held-out sentences of each language, one row per sentence.

    Held-out sentences are of the split "test", on which nothing is chosen. Columns: language, text, probe (bool), on
    ("probes" or "held-out").
    """
    languages = list(dict.fromkeys(languages))
    rows = [(code, text, True) for code in languages for text in get_language(code).probes]
    rows += [(code, text, False) for code in languages for text in make_sentences(code, count, seed, "test")]
    prompts = pd.DataFrame(rows, columns=["language", "text", "probe"])
    return prompts.assign(on=np.where(prompts.probe, PROBES, HELD_OUT))


def list_prompts(language: str, compare, count: int, seed: int = 0) -> pd.DataFrame:
    """Return what is read in 04: `count` held-out sentences of `language` and of English, and the probes of all languages.

    One row per sentence, as list_sentences, with the column `cross`: whether adapters of other languages read it as well.
    They read the probes of the languages that are compared. Other English is for the base alone, whose language it is.
    """
    compared = list_languages(language, compare)
    prompts = list_sentences([*compared, HOME], count, seed)
    prompts = prompts[prompts.probe | prompts.language.isin([language, HOME])].reset_index(drop=True)
    return prompts.assign(cross=prompts.probe & prompts.language.isin(compared))


def speak_reference(prompts: pd.DataFrame) -> pd.DataFrame:
    """Return the prompts spoken by espeak-ng (synthetic), with the columns model, wav and ended added.

    What the judges get right of these is their ceiling.
    """
    wavs = [speak_text(row.text, row.language, VOICES[0]) for row in prompts.itertuples()]
    return prompts.assign(model="reference", wav=wavs, ended=True)


def speak_models(model, processor, adapters: dict, prompts: pd.DataFrame, seed: int = 0, keep=None) -> pd.DataFrame:
    """Return what the base and each adapter read: one row per model and prompt, with model, speaker, wav, ended added.

    `adapters` maps a language to its folder; the column model has the folder's kind and the language, lora_sv, also where
    an adapter has several: it speaks each with its tag, as that one is asked for. Each speaks with a voice of its own corpus.
    The base reads every prompt. An adapter reads those of its own language and, of others, those whose column `cross` is
    true (without that column, all). Adapters are put on one base, one active at a time, and taken off at the end: `model`
    is then what it was before. Fully trained models are loaded one after the other. With `keep` (keep.Keep) nothing is spoken
    that was before: of the 224 utterances of 04 for Norwegian, Swedish or Danish, 144 are the same in all three (the probes, and
    English by the base). Raises AdapterError for an adapter that can not be put on.
    """
    parts, worn = [_read_aloud("base", model, processor, prompts, seed, keep)], None
    try:
        for language, folder in adapters.items():
            own = prompts[(prompts.language == language) | prompts.get("cross", True)]
            if (folder / TRAINED["lora"]).exists():
                worn = load_adapter(model if worn is None else worn, folder, name=f"adapter_{language}")
                parts.append(_read_aloud(f"lora_{language}", worn, processor, own, seed, keep, language))
            else:
                trained, _ = load_base(str(folder), str(model.device), model.dtype)
                parts.append(_read_aloud(f"full_{language}", trained, processor, own, seed, keep, language))
                del trained  # before the next one comes
    finally:
        if worn is not None:
            remove_adapters(worn)
    return pd.concat(parts, ignore_index=True)


def _read_aloud(name, model, processor, prompts, seed, keep, language=""):
    voice = pick_voice(get_speakers(model))
    said = speak(model, processor, list(prompts.text), voice, seed=seed, keep=keep, language=language)
    return prompts.assign(model=name, speaker=voice, wav=[s.wav for s in said], ended=[s.ended for s in said])
