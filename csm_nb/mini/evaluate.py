"""What the miniature models score on sentences and voices that they never heard, and the cards that say so."""

from pathlib import Path

import numpy as np
import pandas as pd

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE
from csm_nb.cards import save_card
from csm_nb.codec.mimi import load_codec, round_trip
from csm_nb.confusion.matrix import judge_speech
from csm_nb.confusion.prompts import speak_models
from csm_nb.csm.load import load_base
from csm_nb.fidelity.clips import code_clips, find_clips, measure_clips, name_condition
from csm_nb.fidelity.verdict import format_figure, summarise
from csm_nb.judge.errors import average_cer
from csm_nb.judge.intervals import share_interval
from csm_nb.judge.judges import identify_languages, load_asr, load_lid, transcribe
from csm_nb.languages import LANGUAGES
from csm_nb.mini.judges import CODEC_FROM, CODES
from csm_nb.paths import STAGES
from csm_nb.provenance import hash_folder, read_json
from csm_nb.synth.corpus import HELD_OUT_VOICES
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.normalise import character_error_rates
from csm_nb.text.sentences import make_sentences

NORDIC = ("no", "sv", "da")
GROUPS = {"seen": "shipped voices", "unheard": "unheard voices", "read_by_others": "another language's text"}
JUDGES = {  # what it is, the hub's name of its task, what is measured
    "asr": ("speech recogniser (characters, CTC)", "automatic-speech-recognition",
            "Character error rate (mean over clips, case and punctuation removed)"),
    "lid": ("language judge", "audio-classification",
            "LID accuracy on clips of 2 to 4 s. Where the voice reads a text of another language, "
            "right is the language of the voice: the sounds decide, not the words"),
}


def speak_held_out(code: str, voices, clips: int, seed: int = 1, read_by: str | None = None):
    """Return `clips` held-out sentences of language `code` as (text, wav at 24 kHz), spoken by `voices` in turn."""
    texts = make_sentences(code, clips, seed=seed, split="test")
    return [(text, speak_text(text, read_by or code, voices[i % len(voices)])) for i, text in enumerate(texts)]


def evaluate_judges(asr, lid, clips: int = 30, seconds=(2.0, 4.0), seed: int = 1, codec=None) -> dict:
    """Return {"asr": {group: {language: mean CER}}, "lid": {group: {language: LID accuracy}}} on held-out sentences.

    Group "seen" are the voices of the miniature models, "unheard" two formant variants that no training clip had,
    "read_by_others" sentences of one language in the voice of another, where right means the voice's. Languages are
    judged on clips cut to between `seconds`. With `codec`, of what that makes of the same clips.
    """
    rng, figures = np.random.default_rng(seed), {"asr": {}, "lid": {}}
    for group, voices in (("seen", VOICES), ("unheard", HELD_OUT_VOICES), ("read_by_others", VOICES)):
        errors, right = {}, {}
        for number, code in enumerate(CODES):
            read_by = CODES[(number + 1 + seed % 9) % len(CODES)] if group == "read_by_others" else code
            texts, wavs = zip(*speak_held_out(code, voices, clips, seed, read_by), strict=True)
            wavs = [round_trip(codec, wav) for wav in wavs] if codec else list(wavs)
            if group != "read_by_others":
                errors[code] = average_cer(character_error_rates(texts, transcribe(asr, wavs), code))["CER"]
            answers = identify_languages(lid, [wav[: int(rng.uniform(*seconds) * SAMPLE_RATE)] for wav in wavs])
            right[read_by] = float(np.mean([max(answer, key=answer.get) == read_by for answer in answers]))
        if errors:
            figures["asr"][group] = errors
        figures["lid"][group] = right
    return figures


def evaluate_codec(codec, work, clips: int = 12, seed: int = 1) -> dict:
    """Return {measure: "median (95 % interval)"} of 00's measures over held-out sentences and voices of no, sv, da."""
    rows = [row for code in NORDIC for row in find_clips("", code, clips, seed, work)[0]]
    most = codec.config.num_quantizers
    summary = summarise(measure_clips(code_clips(rows, codec, [most], controls=False)))
    summary = summary[summary.condition == name_condition(most)]
    return {row.measure: format_figure(row.figure, row.low, row.high) for row in summary.itertuples()}


def evaluate_base(model, processor, asr, lid, sentences: int = 30, seed: int = 1) -> dict:
    """Return {"cer", "runaways", "heard": {language read: {heard: share}}} of the base reading held-out sentences.

    CER and the share of runaways are of English, the only language that it was taught; what is heard when it reads no,
    sv and da is the bleed that adapters start from.
    """
    texts = {code: make_sentences(code, sentences, seed, "test") for code in ("en", *NORDIC)}
    prompts = pd.DataFrame({"language": np.repeat(list(texts), sentences), "text": np.concatenate(list(texts.values()))})
    rows = judge_speech(speak_models(model, processor, {}, prompts, seed), lid, dict.fromkeys(CODES, asr))
    english = rows[rows.language == "en"]
    heard = {code: part.heard.value_counts(normalize=True).to_dict() for code, part in rows.groupby("language")}
    return {"cer": average_cer(english.cer)["CER"], "runaways": float(1 - english.ended.mean()), "heard": heard}


def read_default_run(runs, base) -> dict | None:
    """Return what the newest `make run` under `runs` on the model folder `base` found; None where it is not complete.

    {"adapters": {language: {"cer", "heard_right", "low", "high", "runaways", "sentences"}}, "minutes": from the first start
    to the last end}; of an adapter's language and its held-out sentences. Runs that were skipped
    because they were done before count where they were made.
    """
    records, adapters = [], {}
    for code in NORDIC:
        for stage in STAGES:
            done = sorted(Path(runs).glob(f"{code}/{stage}/*/done.json"), key=lambda path: path.stat().st_mtime)
            if not done:
                return None
            records.append(read_json(done[-1].with_name("run.json")))
            if stage == "04_confusion":
                metrics = read_json(done[-1].with_name("metrics.json"))
                if "heard_right" not in metrics:
                    return None  # there was no adapter
                adapters[code] = {key: metrics[key] for key in ("cer", "heard_right", "low", "high", "runaways", "sentences")}
    if {record["inputs"].get("base_model", {}).get("hash") for record in records} - {None} != {hash_folder(Path(base))}:
        return None
    seconds = max(r["started"] + r["seconds"] for r in records) - min(r["started"] for r in records)
    return {"adapters": adapters, "minutes": seconds / 60}


def evaluate_models(models, clips: int = 30, seed: int = 1, work="data/mini/evaluate", runs=paths.ROOT / "runs") -> dict:
    """Return all figures of the miniature models in the folder `models`, on held-out sentences, and of `runs` on them."""
    models = Path(models)
    model, processor = load_base(models / "csm-mini", "cpu")
    asr, lid, codec = load_asr(models / "asr-mini", "cpu"), load_lid(models / "lid-mini", "cpu"), load_codec(models / "csm-mini")
    return {
        "clips": clips, "original": evaluate_judges(asr, lid, clips, seed=seed),
        "decoded": evaluate_judges(asr, lid, clips, seed=seed, codec=codec),
        "codec": evaluate_codec(codec, work, seed=seed), "base": evaluate_base(model, processor, asr, lid, clips, seed),
        "run": read_default_run(runs, models / "csm-mini"),
        "megabytes": sum(path.stat().st_size for path in models.glob("*-mini/*") if path.is_file()) / 1e6,
    }


def tabulate(figures: dict) -> str:
    """Return the figures of `evaluate_models` as the Markdown table of README: what, figure, and what is aimed at."""
    def spread(rows):
        return f"{100 * np.mean(list(rows.values())):.1f} ({100 * min(rows.values()):.1f} to {100 * max(rows.values()):.1f})"

    def share(rows):  # of all clips of all languages, by Wilson
        count = figures["clips"] * len(rows)
        low, high = share_interval(round(figures["clips"] * sum(rows.values())), count)
        return f"{spread(rows)} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"

    original, decoded, base = figures["original"], figures["decoded"], figures["base"]
    english = ", ".join(f"{code} {100 * base['heard'][code].get('en', 0):.0f} %" for code in NORDIC)
    rows = [
        ("ASR CER, unheard voices: mean of ten languages (range)", spread(original["asr"]["unheard"]) + " %", "<= 5 %"),
        ("the same after the codec", spread(decoded["asr"]["unheard"]) + " %", "<= 10 %"),
        ("F0 correlation through the codec, median (95 % interval)", figures["codec"]["f0_correlation"], ">= .95"),
        ("F0 error through the codec, cents", figures["codec"]["f0_rmse_cents"], "<= 60"),
        ("LID accuracy, unheard voices, 2 to 4 s: mean (range)", share(original["lid"]["unheard"]), ">= 98 %"),
        ("the same after the codec", share(decoded["lid"]["unheard"]), ">= 95 %"),
        ("base, English, held-out sentences: CER", f"{100 * base['cer']:.1f} %", "<= 15 %"),
        ("base, English: runaways", f"{100 * base['runaways']:.1f} %", "<= 2 %"),
        ("base reading no, sv, da: heard as English (the bleed)", english, "reported"),
        ("size of the three folders", f"{figures['megabytes']:.1f} MB", "<= 25 MB"),
        *_tabulate_run(figures["run"]),
    ]
    return "\n".join(["| what | figure | aimed at |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def _tabulate_run(run):
    if run is None:
        return [("adapters of the default `make run`", "no complete run on this base model; `make run`, then again", "")]

    def spread(key):
        return ", ".join(f"{code} {100 * figures[key]:.0f} %" for code, figures in run["adapters"].items())

    right = ", ".join(f"{code} {100 * figures['heard_right']:.0f} ({100 * figures['low']:.0f} to {100 * figures['high']:.0f}) %"
                      for code, figures in run["adapters"].items())
    said = sum(figures["sentences"] for figures in run["adapters"].values())
    endless = sum(figures["runaways"] for figures in run["adapters"].values())
    return [
        ("adapters of the default `make run`, held-out sentences: CER", spread("cer"), "<= 20 %"),
        ("their LID accuracy (95 % interval)", right, ">= 90 % each, from 80 % on"),
        ("their runaways", f"{endless} of {said} sentences", "<= 2 %"),
        ("default `make run`, after set-up", f"{run['minutes']:.1f} minutes", "<= 12 minutes"),
    ]


def write_cards(models, figures: dict) -> list[Path]:
    """Write README.md of the three folders from their training.json and the figures of `evaluate_models`; return their paths."""
    models = Path(models)
    known = {"library_name": "transformers", "license": "apache-2.0"}
    path = models / "csm-mini"
    cards = [save_card(path, _describe_base(path, figures), language="en", pipeline_tag="text-to-speech", **known)]
    for kind, (_, task, _) in JUDGES.items():
        path = models / f"{kind}-mini"
        cards.append(save_card(path, _describe_judge(path, kind, figures), language=list(CODES), pipeline_tag=task, **known))
    return cards


def _describe_training(record: dict, part: str) -> str:
    commands = ", then ".join(f"`python -m csm_nb.mini {part} --minutes {minutes:g}`" for minutes in record["minutes"])
    remark = f" ({record['remark']})" if "remark" in record else ""
    return f"{commands}: {record['steps']} steps in {record['seconds']} s of training, {record['processor']}{remark}"


def _describe_base(folder, figures):
    training = read_json(folder / "training.json")
    codec = "\n".join(f"| {name} | {figure} |" for name, figure in figures["codec"].items())
    return f"""# csm-mini

A miniature of Sesame CSM with its Mimi codec inside, trained from nothing on **espeak-ng synthetic speech** and speaking
only English: it proves the workbook, and says nothing about CSM-1B or about people.

The classes and the layout of the folder are those of `sesame/csm-1b` (CsmForConditionalGeneration, MimiModel,
CsmProcessor with chat template); one token is one character. The checkpoint holds one of the two tied codebook tables,
as a published one may: tie the other after loading (`csm_nb.csm.load.load_base` does). Speakers 0 to 3. All it has heard is
espeak-ng's English voices; they read English sentences and, so that it learned letters, training sentences of the other
languages too, as somebody does who knows English only.
The last 128 rows of its text table, `<|reserved_special_token_0|>` to `_127|>` as Llama 3's tokenizer ships them, are as
they were drawn: no text uses them, and adapters train them as tags of languages.
{(folder / "model.safetensors").stat().st_size / 1e6:.1f} MB, float16 on disk, to be run in float32.

Made by {_describe_training(training["codec"], "codec")}; then
{_describe_training(training["base"], "base")}.

`python -m csm_nb.mini evaluate` ({figures["clips"]} held-out sentences per language, none of them in training):

{tabulate(figures)}

Through the codec at all its codebooks, held-out sentences and voices of Norwegian, Swedish and Danish, median (95 %
interval over clips):

| measure | figure |
| --- | --- |
{codec}
"""


def _describe_judge(folder, kind, figures):
    training, size = read_json(folder / "training.json"), (folder / "model.safetensors").stat().st_size / 1e6
    columns = {f"{GROUPS[group]}{after}": rows for after, source in (("", "original"), (", after the codec", "decoded"))
               for group, rows in figures[source][kind].items()}
    table = ["| language | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    table += [f"| {code} | " + " | ".join(f"{100 * rows[code]:.1f} %" for rows in columns.values()) + " |" for code in CODES]
    table.append("| mean | " + " | ".join(f"{100 * np.mean(list(rows.values())):.1f} %" for rows in columns.values()) + " |")
    what, task, measure = JUDGES[kind]
    since = f", from {100 * CODEC_FROM:.0f} % of the training time on," if kind == "asr" else ""
    return f"""# {folder.name}

A miniature {what} for {", ".join(LANGUAGES[c].name for c in CODES)}.
Trained on nothing but **espeak-ng synthetic speech** of template sentences, it judges such speech and says nothing about
people.

    pipeline("{task}", "models/{folder.name}")

A conformer (Wav2Vec2-BERT classes) of {size:.1f} MB, float16 on disk, float32 in memory. The same voices spoke every
language; noise, equaliser, low-pass, speed and level were drawn anew for every clip, no clip was heard twice, and
{100 * training["round_trips"]:.0f} % of the clips{since} went through the codec of csm-mini.

Made by {_describe_training(training, kind)}.

{measure}, {figures["clips"]} held-out sentences per language (none of them in training), by `python -m csm_nb.mini evaluate`:

{chr(10).join(table)}
"""
