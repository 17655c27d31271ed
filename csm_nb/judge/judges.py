"""Judges: which language is heard, what is understood, and how sure a figure over clips is."""

import json
import re
from hashlib import sha256

import numpy as np
import pyarrow as pa
import torch
from transformers import pipeline
from transformers.utils import logging

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, resample
from csm_nb.device import pick_device
from csm_nb.hub import fetch_model
from csm_nb.keep import make_once
from csm_nb.languages import LANGUAGES, get_language, read_label
from csm_nb.provenance import hash_code, hash_tensors, hash_value
from csm_nb.text.normalise import normalise_text

SHORTEST = 0.1  # s; nothing is asked about less
# A voice has time for so many letters. The fastest speech here, espeak-ng's French, has 24.5 letters per second, read
# Danish, Swedish and Norwegian 4 to 19; the few on top are for words that are cut out tight.
LETTERS_PER_SECOND, LETTERS_ON_TOP = 25, 5
LETTERS_PER_TOKEN = 1.7  # of Whisper's tokenizer: the least in 60 sentences of each language, Danish; English has 4
ENGLISH_ONLY = 51_864  # tokens of OpenAI's *.en models; the multilingual ones have more
WHISPER_SECONDS = 30  # what Whisper's encoder takes at once
WHISPER_TOKENS = 440  # it has 448 places, some of which the prompt takes
# What hearing imports and that changes nothing that is heard: how files are found and kept, and the rules of comparing texts.
GIVEN = ("text", "hub", "paths", "claims", "keep", "provenance")
SETTINGS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "max_length"}  # of a config: change with its user


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
    """Return indices of clips with something to hear, and those clips as the pipeline takes them."""
    rate = judge.feature_extractor.sampling_rate
    heard = [i for i, wav in enumerate(wavs) if len(wav) >= SHORTEST * SAMPLE_RATE and np.isfinite(wav).all() and np.any(wav)]
    return heard, [{"raw": resample(wavs[i], SAMPLE_RATE, rate), "sampling_rate": rate} for i in heard]


def describe_judge(judge) -> dict:
    """Return all that decides what a judge hears in a clip, in words and hashes: what is kept of it is named by that.

    Weights count as they are in memory, whatever id or revision they came by; a Whisper by the language that it was told.
    """
    model, writer = judge.model, getattr(judge, "tokenizer", None)
    settings = (model.config, getattr(judge, "generation_config", None), judge.feature_extractor)
    settings = [{key: value for key, value in part.to_dict().items() if key not in SETTINGS} for part in settings if part]
    return {
        "judge": judge.task, "kind": model.config.model_type,
        "weights": hash_tensors(dict(model.named_parameters()) | dict(model.named_buffers())),
        "settings": hash_value(json.loads(json.dumps(settings, default=str))),
        "vocabulary": hash_value(writer.get_vocab()) if writer is not None else "",
        "computed": {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")},
        "code": hash_code("from csm_nb.judge import judges", paths.PACKAGE, GIVEN),
    }


def _hear(judge, wavs, hear, batch_size, keep):
    """Return what `hear` says of each clip; with `keep`, of those only that this judge has not heard before."""
    if keep is None:
        return hear(judge, wavs, batch_size)
    wavs = [np.ascontiguousarray(wav, np.float32) for wav in wavs]
    order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))  # of like length together
    keys = [sha256(wavs[i].tobytes()).hexdigest()[:24] for i in order]

    def make(chosen):
        answers = hear(judge, [wavs[order[place]] for place in chosen], batch_size)
        return [{"heard": json.dumps(answer, ensure_ascii=False)} for answer in answers]

    rows = make_once(keep, "heard", describe_judge(judge), keys, make, pa.schema([("heard", pa.string())]))
    answers = dict(zip(order, (json.loads(row["heard"]) for row in rows), strict=True))
    return [answers[i] for i in range(len(wavs))]


def identify_languages(lid, wavs, batch_size: int = 8, keep=None) -> list[dict]:
    """Return {our language code: probability} per clip (24 kHz), everything else summed under "other".

    Labels are mapped by read_label, Bokmål and Nynorsk summed into no. A clip under 0.1 s, silent or not finite gets
    {"none": 1.0}. With `keep` (keep.Keep), a clip that this judge has heard before is not heard again (describe_judge,
    and the clip's samples).
    """
    return _hear(lid, wavs, _identify, batch_size, keep)


def _identify(lid, wavs, batch_size):
    answers = [{"none": 1.0} for _ in wavs]
    heard, inputs = _to_inputs(lid, wavs)
    for i, scores in zip(heard, lid(inputs, top_k=None, batch_size=batch_size) if inputs else [], strict=True):
        answer = {}
        for score in scores:
            code = read_label(score["label"])
            answer[code] = answer.get(code, 0.0) + score["score"]
        answers[i] = answer
    return answers


def transcribe(asr, wavs, batch_size: int = 8, keep=None) -> list[str]:
    """Return what the recogniser writes for each clip (24 kHz); "" for a clip with nothing to hear.

    A Whisper may write as many tokens as the clip has time for and no more, since on a cut word it repeats itself to its
    end; clips of like length go together. It hears a clip above 30 s in overlapping pieces, which the pipeline joins. `keep`
    as in identify_languages.
    """
    return _hear(asr, wavs, _write_down, batch_size, keep)


def _write_down(asr, wavs, batch_size):
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
