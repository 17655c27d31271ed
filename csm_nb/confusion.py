"""What is said and what is heard: base and adapters read sentences of several languages, the judges listen."""

import numpy as np
import pandas as pd

from csm_nb.csm import AdapterError, load_adapter, load_base, remove_adapters
from csm_nb.judge import (
    average_cer,
    bootstrap_interval,
    character_error_rates,
    confusion_matrix,
    count_needed,
    decide_share,
    find_hallucinations,
    identify_languages,
    share_interval,
    transcribe,
    write_needed,
    write_share,
)
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.params import TRAINED, resolve_path
from csm_nb.provenance import read_json
from csm_nb.speak import speak
from csm_nb.speakers import get_speakers, pick_voice
from csm_nb.synth import VOICES, speak_text
from csm_nb.texts import make_sentences

FEWEST = 10  # sentences below which a bootstrap of them decides nothing: of two it is as narrow as they are alike
HOME = "en"  # what the base model was taught
PROBES, HELD_OUT = "probes", "held-out"  # the kinds of sentences; nothing was chosen on the held-out ones


def find_adapters(folder, languages, method: str = "lora") -> tuple[dict, list[str]]:
    """({language: folder}, languages without one) among `folder`/lora_<language>, or full_<language> by method "full".

    Raises AdapterError for one that says of itself that it is of another language.
    """
    paths = {code: resolve_path(folder) / f"{method}_{code}" for code in languages}
    found = {code: path for code, path in paths.items() if (path / TRAINED[method]).exists()}
    for code, path in found.items():
        try:
            taught = read_json(path / "base.json").get("language", code)
        except (ValueError, AttributeError) as error:
            raise AdapterError(f"{path}/base.json is half a file, or none of an adapter's ({error}); fetch it again, or train it "
                               "again") from error
        if taught != code:
            raise AdapterError(f"{path} is trained on {taught}, by its base.json, and would be read as the one of {code}: rename "
                               f"it to {method}_{taught}, or run 03_adapter for {code}")
    return found, [code for code in languages if code not in found]


def list_languages(language: str, compare) -> list[str]:
    """Return the languages that are told apart: those of `compare` once each, in its order, and `language` in any case."""
    return list(dict.fromkeys([*compare, *([] if language in compare else [language])]))


def list_sentences(languages, count: int, seed: int = 0) -> pd.DataFrame:
    """Return the probes and `count` held-out sentences of each language, once each.

    Columns: language, text, probe (bool), on ("probes" or "held-out").
    """
    languages = list(dict.fromkeys(languages))
    rows = [(code, text, True) for code in languages for text in get_language(code).probes]
    rows += [(code, text, False) for code in languages for text in make_sentences(code, count, seed, "test")]
    prompts = pd.DataFrame(rows, columns=["language", "text", "probe"])
    return prompts.assign(on=np.where(prompts.probe, PROBES, HELD_OUT))


def list_prompts(language: str, compare, count: int, seed: int = 0) -> pd.DataFrame:
    """Return what is read in 04: `count` held-out sentences of `language` and of English, and the probes of all languages.

    As list_sentences, with the column `cross`: whether adapters of other languages read it as well. They read the probes
    of the languages that are compared; English beside those is for the base alone, whose language it is.
    """
    compared = list_languages(language, compare)
    prompts = list_sentences([*compared, HOME], count, seed)
    prompts = prompts[prompts.probe | prompts.language.isin([language, HOME])].reset_index(drop=True)
    return prompts.assign(cross=prompts.probe & prompts.language.isin(compared))


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
    """Add what the judges heard: heard (language), confidence of the language that was read, transcript, cer, hallucinated.

    `asr` maps a language to its recogniser; cer may be above 1, and is counted as 1 at most wherever it is averaged.
    """
    rows = rows.reset_index(drop=True)
    scores = identify_languages(lid, list(rows.wav))
    rows = rows.assign(heard=[max(s, key=s.get) for s in scores],
                       confidence=[s.get(code, 0.0) for s, code in zip(scores, rows.language, strict=True)],
                       transcript="", cer=np.nan, hallucinated=False)
    for code, part in rows.groupby("language"):
        texts = transcribe(asr[code], list(part.wav))
        rows.loc[part.index, "transcript"] = texts
        rows.loc[part.index, "cer"] = character_error_rates(part.text, texts, code)
        rows.loc[part.index, "hallucinated"] = find_hallucinations(texts, list(part.wav))
    return rows


def share_right(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by model, language read and kind of sentence: share heard as that language, CER, runaways, n.

    The share has Wilson's 95 % interval, the mean CER a bootstrap one, both over sentences; a sentence's CER counts as 1
    at most (judge.average_cer). The column `on` says which sentences: probes, or held-out ones.
    """
    kinds = rows.get("on", pd.Series(HELD_OUT, index=rows.index))
    made_up = rows.get("hallucinated", pd.Series(False, index=rows.index))
    table = []
    for (name, code, kind), part in rows.assign(on=kinds, hallucinated=made_up).groupby(["model", "language", "on"], sort=False):
        right = int((part.heard == code).sum())
        low, high = share_interval(right, len(part))
        table.append({
            "model": name, "read": code, "on": kind, "heard right": right / len(part), "low": low, "high": high,
            "heard most": part.heard.mode()[0], **average_cer(part.cer), "hallucinations": int(part.hallucinated.sum()),
            "runaways": int((~part.ended.astype(bool)).sum()), "sentences": len(part),
        })
    return pd.DataFrame(table).round(3)


def _is_own(rows):
    """Which rows are of an adapter, or a fully trained model, that reads its own language."""
    return np.logical_or.reduce([rows.model == f"{method}_" + rows.language for method in TRAINED])


def list_confusions(reference: pd.DataFrame, spoken: pd.DataFrame, languages) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, counts) of the probes of `languages`, read against heard: reference, base, each by its own adapter."""
    sets = (("reference", reference), ("base", spoken[spoken.model == "base"]), ("own adapter", spoken[_is_own(spoken)]))
    probes = [(name, rows[rows.probe & rows.language.isin(languages)]) for name, rows in sets]
    return [(f"{name}, probes", confusion_matrix(rows.language, rows.heard, languages)) for name, rows in probes if len(rows)]


def count_heard(reference: pd.DataFrame, spoken: pd.DataFrame, language: str) -> pd.DataFrame:
    """Return counts of what was heard in the held-out sentences of `language`: a row per model, reference and base first."""
    rows = pd.concat([reference, spoken])
    rows = rows[(rows.language == language) & (rows.on == HELD_OUT)]
    return pd.crosstab(rows.model, rows.heard).reindex(list(dict.fromkeys(rows.model))).rename_axis("read by")


def pair_with_reference(rows: pd.DataFrame, reference: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Clips to compare by eye and ear, two a row: the reference audio of its sentence, then what the model said.

    (label, wav) each; the label says what the ASR wrote and how far that is from the text.
    """
    originals = reference.drop_duplicates(["language", "text"]).set_index(["language", "text"])
    clips = []
    for row in rows.itertuples():
        original = originals.loc[(row.language, row.text)]
        for name, clip in ((f"reference, {row.language}", original), (row.model, row)):
            clips.append((f"{name}, {clip.cer:.0%} wrong:\n“{clip.transcript}”", clip.wav))
    return clips


def judge_verdict(reference: pd.DataFrame, spoken: pd.DataFrame, language: str) -> tuple[str, dict]:
    """Return ("clear" | "bleeds into xx" | "unclear: why", metrics) for the adapter of `language` reading its own sentences.

    Only held-out sentences count. By judge.decide_share: clear from 90 % heard right with a lower bound of 80 % or more,
    bleeds when the upper bound is below 90 %, else unclear with how many sentences would decide; unclear as well when the
    judge itself is not clear on the reference audio by the same rule. What it bleeds into is the language heard most
    instead, all of them where several were heard equally often.
    """
    reference, spoken = (rows.drop_duplicates(["model", "language", "text"]) if "text" in rows else rows
                         for rows in (reference, spoken))
    table = pd.concat([share_right(reference), share_right(spoken)])
    own = spoken[_is_own(spoken) & (spoken.language == language)]
    ceiling = reference[reference.language == language]
    own, ceiling = (rows[rows.on == HELD_OUT] if "on" in rows else rows for rows in (own, ceiling))
    right, count = int((own.heard == language).sum()), len(own)
    judged, asked = int((ceiling.heard == language).sum()), len(ceiling)
    metrics = {"table": table.to_dict("records"), "on": HELD_OUT, "ceiling": judged / asked if asked else None}
    metrics |= dict(zip(("ceiling_low", "ceiling_high"), share_interval(judged, asked), strict=True)) if asked else {}
    if count == 0:
        named = spoken.model.isin([f"{method}_{language}" for method in TRAINED]).any()
        return f"unclear: {'no held-out sentence was read' if named else 'no adapter'}", metrics
    low, high = share_interval(right, count)
    cer = average_cer(own.cer)
    metrics |= {
        "heard_right": right / count, "low": low, "high": high, "sentences": count, "right": right,
        "cer": cer["CER"], "cer_low": cer["CER low"], "cer_high": cer["CER high"], "cer_median": cer["CER median"],
        "cer_over_half": cer["CER over 50 %"], "runaways": int((~own.ended.astype(bool)).sum()),
        "sentences_needed": count_needed(right, count),
    }
    if decide_share(judged, asked) != "clear":
        why = "" if decide_share(judged, asked) == "below" else f"; {write_needed(count_needed(judged, asked))}"
        return f"unclear: the judge hears {write_share(judged, asked)} of the reference{why}", metrics
    decided = decide_share(right, count)
    if decided == "clear":
        return "clear", metrics
    if decided == "unclear":
        return f"unclear: {write_share(right, count)} heard as {language}; {write_needed(metrics['sentences_needed'])}", metrics
    wrong = own.heard[own.heard.isin(set(LANGUAGES) - {language})].value_counts()
    heard = ", ".join(sorted(wrong.index[wrong == wrong.max()])) or "no language that is told apart here"
    return f"bleeds into {heard}", metrics


def describe_verdict(verdict: str, metrics: dict, language: str) -> str:
    """Return the verdict in words with what it rests on: shares with both bounds, for the adapter and for the reference."""
    parts = [f"{get_language(language).name}: {verdict}."]
    if "right" in metrics and not verdict.startswith("unclear"):
        parts.append(f"Of {metrics['sentences']} held-out sentences {100 * metrics['heard_right']:.0f} % are heard as "
                     f"{language}, 95 % interval {100 * metrics['low']:.0f} to {100 * metrics['high']:.0f} %.")
    if metrics["ceiling"] is not None:
        parts.append(f"Of the reference audio {100 * metrics['ceiling']:.0f} %, "
                     f"{100 * metrics['ceiling_low']:.0f} to {100 * metrics['ceiling_high']:.0f} %.")
    return " ".join(parts)


def judge_inputs(texts, speech: dict, asr, language: str) -> pd.DataFrame:
    """CER of the same sentences said from several inputs: rows with model (the input's name), text, transcript, cer."""
    parts = []
    for name, said in speech.items():
        heard = transcribe(asr, [s.wav for s in said])
        parts.append(pd.DataFrame({
            "model": name, "language": language, "text": texts, "wav": [s.wav for s in said], "ended": [s.ended for s in said],
            "transcript": heard, "cer": character_error_rates(texts, heard, language),
        }))
    return pd.concat(parts, ignore_index=True)


def compare_inputs(rows: pd.DataFrame, spelled: list[dict], phonemic: list[dict]) -> tuple[str, dict]:
    """("phonemes" | "spelling" | "no difference shown (n = ..)", metrics): the paired CER difference, spelling minus phonemes.

    The interval is a 95 % bootstrap over sentences, of which each counts as 1 at most; a side wins when it leaves out zero.
    Fewer than 10 sentences are "unclear".
    """
    rows = rows.assign(cer=rows.cer.clip(upper=1))
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
    verdict = "phonemes" if low > 0 else "spelling" if high < 0 else f"no difference shown (n = {len(by_text)})"
    if len(by_text) < FEWEST:
        verdict = f"unclear: {len(by_text)} of {FEWEST} sentences"
    return verdict, metrics
