"""Judges: which language is heard, what is understood, and how sure a figure over clips is."""

import re
import unicodedata

import jiwer
import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm
from transformers import pipeline
from transformers.utils import logging

from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.codec import pick_device
from csm_nb.hub import fetch_model
from csm_nb.languages import LANGUAGES, get_language
from csm_nb.numbers import spell_numbers, unify_numbers

SHORTEST = 0.1  # s; nothing is asked about less
# A voice has time for so many letters. The fastest speech here, espeak-ng's French, has 24.5 letters per second, read
# Danish, Swedish and Norwegian 4 to 19; the few on top are for words that are cut out tight.
LETTERS_PER_SECOND, LETTERS_ON_TOP = 25, 5
LETTERS_PER_TOKEN = 1.7  # of Whisper's tokenizer: the least in 60 sentences of each language, Danish; English has 4
ENGLISH_ONLY = 51_864  # tokens of OpenAI's *.en models; the multilingual ones have more
WHISPER_SECONDS = 30  # what Whisper's encoder takes at once
WHISPER_TOKENS = 440  # it has 448 places, some of which the prompt takes
# Names that tools give our languages beside those of the table; a locale or script behind them is cut off.
_NAMES = {
    "no": ("nb", "nn", "nor", "bokmål", "bokmal", "nynorsk", "norsk"), "sv": ("svenska",), "da": ("dansk",),
    "de": ("ger", "deutsch"), "fr": ("fre", "français"), "es": ("castilian", "español"),
    "nl": ("dut", "flemish", "nederlands"), "it": ("italiano",), "pl": ("polski",),
}  # fmt: skip
_LABELS = {
    name.lower(): code for code, entry in LANGUAGES.items()
    for name in (code, entry.name, entry.iso3, entry.whisper, *entry.mms_lid, *_NAMES.get(code, ()))
}  # fmt: skip

# Judges


def load_lid(model, device: str = "auto"):
    """Return a language-ID pipeline of a folder or hub id (audio classification), in float32.

    Raises ValueError for one whose labels name none of our languages.
    """
    lid = _load("audio-classification", model, device, "lid_model")
    labels = list(lid.model.config.id2label.values())
    if not any(read_label(label) != "other" for label in labels):
        raise ValueError(f"{model}: its labels {', '.join(labels[:5])} ... name none of the languages {', '.join(LANGUAGES)}; "
                         "take a language ID whose config.json has id2label with codes or names, such as facebook/mms-lid-126")
    return lid


def read_label(label: str) -> str:
    """Return our code for what a language ID calls a language (nb, nno, "Norwegian", no-NO, nob_Latn, <|no|>), else "other"."""
    name = unicodedata.normalize("NFC", str(label)).lower().removeprefix("__label__").strip("<|> ")
    return _LABELS.get(re.split(r"[\W_]+", name)[0], "other")


def load_asr(model, device: str = "auto", language: str = "en"):
    """Return a speech-recognition pipeline (CTC or Whisper); "by-language" takes the language table's model.

    A Whisper is told the language, so that it writes down what it hears instead of guessing which language it is. One that
    can not be told is left as it is, and that is printed. It takes the likeliest token at each step: five beams, the
    pipeline's default, take three times as long.
    """
    entry = get_language(language)
    asr = _load("automatic-speech-recognition", entry.asr if model == "by-language" else model, device, "asr_model")
    if asr.model.config.model_type == "whisper":
        problem = _set_language(asr, entry)
        if problem:
            print(f"{model}: {problem}")
        asr.generation_config.num_beams = 1
    return asr


def _set_language(asr, entry):
    """Tell a Whisper the language of the table's `entry`; return why it can not be told, or ""."""
    settings, vocabulary = asr.model.generation_config, asr.tokenizer.get_vocab()
    spoken = {token: place for token, place in vocabulary.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", token)}
    multilingual = getattr(settings, "is_multilingual", None)
    if multilingual is False or asr.model.config.vocab_size == ENGLISH_ONLY or not spoken or "<|transcribe|>" not in vocabulary:
        if entry.code == "en":
            return ""
        return f"an English-only Whisper; what it writes for {entry.name} is guesswork. Take a multilingual one"
    if not getattr(settings, "lang_to_id", None):  # fine-tuned with an old config: its tokenizer has them all the same
        settings.lang_to_id = spoken
    if not getattr(settings, "task_to_id", None):
        settings.task_to_id = {task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")
                               if f"<|{task}|>" in vocabulary}
    if getattr(settings, "no_timestamps_token_id", None) is None:
        settings.no_timestamps_token_id = vocabulary.get("<|notimestamps|>")
    settings.is_multilingual = True
    settings.forced_decoder_ids = asr.generation_config.forced_decoder_ids = None  # the older way to say the same
    if f"<|{entry.code}|>" not in settings.lang_to_id:
        return f"it does not know {entry.name} ({', '.join(sorted(settings.lang_to_id))}) and guesses the language of each clip"
    settings.language, settings.task = entry.whisper, "transcribe"
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual", "language", "task"):
        setattr(asr.generation_config, name, getattr(settings, name))
    return ""


def _load(task, model, device, use):
    logging.disable_progress_bar()  # a bar that stays at 0 % in every executed notebook
    return pipeline(task, model=str(fetch_model(model, use)), device=pick_device(device), dtype=torch.float32)


def _to_inputs(judge, wavs):
    """Indices of clips with something to hear, and those clips as the pipeline takes them."""
    rate = judge.feature_extractor.sampling_rate
    heard = [i for i, wav in enumerate(wavs) if len(wav) >= SHORTEST * SAMPLE_RATE and np.isfinite(wav).all() and np.any(wav)]
    return heard, [{"raw": resample(wavs[i], SAMPLE_RATE, rate), "sampling_rate": rate} for i in heard]


def identify_languages(lid, wavs, batch_size: int = 8) -> list[dict]:
    """Return {our language code: probability} per clip (24 kHz), everything else summed under "other".

    Labels are mapped by read_label, Bokmål and Nynorsk summed into no. A clip under 0.1 s, silent or not finite gets
    {"none": 1.0}.
    """
    answers = [{"none": 1.0} for _ in wavs]
    heard, inputs = _to_inputs(lid, wavs)
    for i, scores in zip(heard, lid(inputs, top_k=None, batch_size=batch_size) if inputs else [], strict=True):
        answer = {}
        for score in scores:
            code = read_label(score["label"])
            answer[code] = answer.get(code, 0.0) + score["score"]
        answers[i] = answer
    return answers


def transcribe(asr, wavs, batch_size: int = 8) -> list[str]:
    """Return what the recogniser writes for each clip (24 kHz); "" for a clip with nothing to hear.

    A Whisper may write as many tokens as the clip has time for and no more, since on a cut word it repeats itself to its
    end; clips of like length go together. It hears a clip above 30 s in overlapping pieces, which the pipeline joins.
    """
    texts = [""] * len(wavs)
    heard, inputs = _to_inputs(asr, wavs)
    if not heard:
        return texts
    if asr.type != "seq2seq_whisper":
        for i, answer in zip(heard, asr(inputs, batch_size=batch_size), strict=True):
            texts[i] = answer["text"].strip()
        return texts
    allowed = [count_tokens(min(len(wavs[i]) / SAMPLE_RATE, WHISPER_SECONDS)) for i in heard]
    batches = []
    for place in sorted(range(len(heard)), key=lambda place: len(wavs[heard[place]])):
        if batches and len(batches[-1]) < batch_size and allowed[place] <= 2 * allowed[batches[-1][0]]:
            batches[-1].append(place)
        else:
            batches.append([place])
    for batch in batches:
        asr.generation_config.max_length = max(allowed[place] for place in batch)  # besides the prompt, for a Whisper
        longest = max(len(wavs[heard[place]]) for place in batch) / SAMPLE_RATE
        pieces = {"chunk_length_s": WHISPER_SECONDS, "ignore_warning": True} if longest > WHISPER_SECONDS else {}
        for place, answer in zip(batch, asr([inputs[place] for place in batch], batch_size=len(batch), **pieces), strict=True):
            texts[heard[place]] = answer["text"].strip()
    return texts


def count_letters(seconds: float) -> int:
    """Return how many letters a clip has time for, at the fastest speech there is."""
    return int(LETTERS_PER_SECOND * seconds + LETTERS_ON_TOP)


def count_tokens(seconds: float) -> int:
    """Return how many tokens Whisper may write for a clip: enough for count_letters of the language with the shortest ones."""
    return min(WHISPER_TOKENS, int(count_letters(seconds) / LETTERS_PER_TOKEN) + 4)  # and a stop, a capital, the end


def find_hallucinations(transcripts, wavs) -> np.ndarray:
    """Return for each transcript whether it has more letters than its clip (24 kHz) has time for: the recogniser made them up."""
    return np.array([len(normalise_text(text).replace(" ", "")) > count_letters(len(wav) / SAMPLE_RATE)
                     for text, wav in zip(transcripts, wavs, strict=True)], dtype=bool)


# Error rates

COMPARED = ("Before they are compared, texts lose case and punctuation, and every number, in digits or in words, takes one "
            "written form of its language (“7”, “sju” and “syv” are the same).")  # for the pages that show a CER
COUNTED = (f"In means a clip counts as 100 % at most; a hallucination has more than {LETTERS_PER_SECOND} letters per second "
           f"of its clip and {LETTERS_ON_TOP} on top.")


def normalise_text(text: str, language: str = "") -> str:
    """Return lowercase words only, composed Unicode, single spaces: what two texts are compared by.

    With a `language` its numbers are in words, of one form each (csm_nb.numbers); without one digits stay. Letters keep
    their accents, also those that have no composed form; apostrophes are one character, and pairs of them that quote are
    no letters.
    """
    text = unicodedata.normalize("NFC", text)
    if language:
        text = spell_numbers(text, language)
    text = re.sub("[\u00ad\u200b-\u200d\u2060\ufeff]", "", text)  # soft hyphens, joiners: inside words, never seen
    text = re.sub("[’‘ʼ´`′＇]", "'", unicodedata.normalize("NFC", text.lower()))
    text = re.sub(r"(?<!\w)'(\w[^']*\w)'(?!\w)", r" \1 ", text)
    kept = (letter if letter.isalnum() or letter == "'" or unicodedata.category(letter)[0] == "M" else " " for letter in text)
    words = [word for word in "".join(kept).split() if word.strip("'")]
    return unify_numbers(" ".join(words), language) if language else " ".join(words)


def character_error_rates(references, hypotheses, language: str) -> np.ndarray:
    """Return the character error rate of each pair after normalise_text; above 1 where more was heard than was said.

    `language` is that of the texts, for their numbers. Means take each at most as 1 (average_cer). Raises ValueError for a
    reference without letters.
    """
    rates = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        expected = normalise_text(reference, language)
        if not expected:
            raise ValueError(f"the reference {reference!r} has no letters; a character error rate is not defined")
        rates.append(jiwer.cer(expected, normalise_text(hypothesis, language)))
    return np.array(rates, dtype=float)


def average_cer(rates) -> dict:
    """Return CER (mean over clips, each counted as 1 at most), CER low, CER high (95 %), CER median, CER over 50 % (share).

    NaN are left out; of none everything is NaN.
    """
    rates = np.asarray(rates, dtype=float)
    rates = rates[np.isfinite(rates)].clip(max=1)
    low, high = bootstrap_interval(rates)
    mean, median, over = (rates.mean(), np.median(rates), (rates > 0.5).mean()) if len(rates) else (float("nan"),) * 3
    return {"CER": float(mean), "CER low": low, "CER high": high, "CER median": float(median), "CER over 50 %": float(over)}


# How sure

CLEAR, CLEAR_LOW = 0.9, 0.8  # a share is clear from .9 on, when its lower bound is .8 or more; below when its upper is below .9
MOST_NEEDED = 10_000  # sentences; a share so near to the bound that it takes more is not decided by counting


def share_interval(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share, `right` of `count` sentences; (nan, nan) of none.

    Unlike a bootstrap it does not shrink to a point where all are right: 16 of 16 is .81 to 1. Count sentences, never
    several takes of one. Raises ValueError for counts that are no share.
    """
    if count == 0:
        return float("nan"), float("nan")
    interval = binomtest(int(right), int(count)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def decide_share(right: int, count: int) -> str:
    """Return "clear" (share of .9 or more, lower bound .8 or more), "below" (upper bound below .9), or "unclear"."""
    low, high = share_interval(right, count)
    if count and 10 * right >= 9 * count and low >= CLEAR_LOW:
        return "clear"
    return "below" if high < CLEAR else "unclear"


def count_needed(right: int, count: int) -> int | None:
    """Return how many sentences would decide if their share were the one seen; None if 10,000 do not (it is at the bound).

    Wilson's interval of a share s ends at p where (s - p)^2 = z^2 p (1 - p) / n; that is solved for n.
    """
    if count == 0 or decide_share(right, count) != "unclear":
        return count or None
    bound, share = CLEAR_LOW if 10 * right >= 9 * count else CLEAR, right / count
    needed = int(np.ceil(norm.ppf(0.975) ** 2 * bound * (1 - bound) / (share - bound) ** 2))
    return needed if needed <= MOST_NEEDED else None


def count_needed_mean(figure: float, low: float, high: float, count: int, limit: float) -> int | None:
    """Return how many clips would tell `figure` from `limit` if it stayed as it is; None if 10,000 do not.

    An interval narrows by the root of the number of clips.
    """
    edge = low if figure > limit else high
    if not count or figure == limit or not np.isfinite([figure, edge]).all():
        return None
    needed = max(count, int(np.ceil(count * ((figure - edge) / (figure - limit)) ** 2)))
    return needed if needed <= MOST_NEEDED else None


def write_share(right: int, count: int) -> str:
    """Return "38 of 40, 95 % (83 to 99 %)"; "none of 0" for no sentence."""
    if count == 0:
        return "none of 0"
    low, high = share_interval(right, count)
    return f"{right} of {count}, {100 * right / count:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def write_needed(needed: int | None, what: str = "sentences") -> str:
    """Return in words how many would decide (count_needed)."""
    return f"some {needed} {what} would decide" if needed else f"at the bound: {MOST_NEEDED:,} {what} would not decide"


def confusion_matrix(true, predicted, labels) -> pd.DataFrame:
    """Return counts: a row for each of `labels` that was read, a column for each of them and each other that was heard."""
    columns = [*labels, *sorted(set(predicted) - set(labels))]
    table = pd.crosstab(pd.Series(list(true), name="read"), pd.Series(list(predicted), name="heard"))
    return table.reindex(index=list(labels), columns=columns, fill_value=0)


def bootstrap_interval(values, statistic=np.mean, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over clips (Efron 1979); NaN are left out.

    (nan, nan) of fewer than two values: one says nothing of its spread.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    figures = np.apply_along_axis(statistic, 1, values[picks])
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
