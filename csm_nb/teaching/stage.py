"""What 01, 02 and 03 do alike, a call per cell: load, look at the clips, encode, attach, train, select, judge, save."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.clips import check, filters, level
from csm_nb.codec.mimi import decode, load_codec
from csm_nb.corpora import listed, sources, split, tokens
from csm_nb.corpora.codes import read_given
from csm_nb.csm import adapters, load, record, save, speakers, tags
from csm_nb.fidelity import gate
from csm_nb.hub import describe_model
from csm_nb.judge import judges
from csm_nb.keep import Keep
from csm_nb.languages import get_language
from csm_nb.manifest import read_manifest
from csm_nb.paths import resolve_path
from csm_nb.provenance import write_json
from csm_nb.recipe import FIELDS, Recipe, read_recipe
from csm_nb.runs import folders
from csm_nb.runs.folders import Run
from csm_nb.show import players, results, sound
from csm_nb.speak.generate import speak
from csm_nb.synth.corpus import HELD_OUT_VOICES, make_corpus
from csm_nb.synth.engines import make_spoken, read_engine
from csm_nb.teaching import several
from csm_nb.text.sentences import draw_prompts, make_sentences, spell_alphabet
from csm_nb.train import callbacks, cost, select, self_check, trainer
from csm_nb.train.place import place_training

LONGEST_HEARD = 10  # s of a clip that is set aside: enough to hear why


@dataclass(frozen=True)
class Clips:
    """The clips of a stage: those to use, as check.check_clips leaves them, and those set aside with the reason."""

    good: list[dict]
    set_aside: list[dict]
    card: dict = field(default_factory=dict)  # what the adapter's card says of them


@dataclass(frozen=True)
class Encoded:
    """Clips as codec tokens, parted in two; `clips` have their speakers' numbers, `before` is what the stage goes on from."""

    clips: Clips
    train_rows: object
    valid_rows: object
    place: Path
    voices: list[dict]
    voice: str
    before: Path | None


@dataclass(frozen=True)
class Training:
    """What is to be trained: model, data, recipe with its steps, the folder that keeps it (train.place).

    `keep` is the account of what is said and heard on the way (keep.Keep).
    """

    model: object
    processor: object
    data: Encoded
    recipe: Recipe
    place: Path
    keep: Keep


def describe_run(run: Run) -> pd.DataFrame:
    """Return the recipe as a table (show_recipe), under the stage, its base model and what 00 said of its codec.

    Raises ParameterError where 00 forbids the training.
    """
    print(f"{run.stage} for {get_language(run.language).name}, results in {run.place}")
    print(describe_model(run.base_model))
    print(gate.check_verdict(run, run.ignore_verdict))
    return show_recipe(run)


def show_recipe(run: Run) -> pd.DataFrame:
    """Return the effective recipe of a run: a row per field with its value, where that is from, and what it means.

    Those that are given come first.
    """
    rows = [{"field": name, "value": str(run.recipe[name]), "from": run.origins.get(name, "default"),
             "meaning": FIELDS[name].metadata["meaning"]} for name in sorted(FIELDS, key=lambda name: name not in run.origins)]
    return pd.DataFrame(rows).set_index("field").rename_axis(None)


def load_base(run: Run):
    """Return (model, processor) of the run's base model, after the self-check, whose table is shown."""
    recipe = read_recipe(run.params)
    model, processor = load.load_base(run.base_model, run.device, recipe.dtype, recipe.four_bit, recipe.backend,
                                      run.params.get("method", "lora"))
    tags.find_rows(processor.tokenizer, _make_tags(run))  # before hours are spent on what it can not read
    display(self_check.prove_model(model, processor, _list_own(run.language)))
    return model, processor


def _make_tags(run):
    return tags.make_tags(run.params.get("tag", "none"), run.languages)


def _list_own(language):
    """Texts that hold a language's own letters, which have to survive the tokenizer."""
    return (*get_language(language).probes, spell_alphabet(language))


def make_speech(run: Run, language: str, count: int, seed: int, **how) -> list[dict]:
    """Return the rows of `count` sentences of `language`, spoken by espeak-ng or by the run's `engine` (synthetic).

    `how` is that of synth.corpus.make_corpus: other voices, or `spoken_as` for the accent of another language. What another
    engine spoke stays in data/synthetic for all runs, as it may have cost money.
    """
    prompts, drawn = draw_prompts(language, count, seed)
    print(drawn)
    taught = how.get("spoken_as") or language
    place = run.dir / ("corpus" if taught == run.language else f"corpus_{taught}")
    if not run.params.get("engine"):
        return read_manifest(make_corpus(prompts, language, place, **how))
    engine, voices, budget = read_engine(run.engine)
    spoken = make_spoken(prompts, language, place, engine, voices, budget, how.get("spoken_as"),
                         run.data / "synthetic" / engine.name)
    return read_manifest(spoken)


def name_engine(run: Run) -> str:
    """Return what spoke the run's synthetic clips, for the model's card."""
    return f"{run.params.get('engine', {}).get('name', 'espeak-ng')} (synthetic)"


def read_corpus(run: Run) -> tuple[list[dict], dict]:
    """Return the rows of the run's corpus, and what the model's card says of it: data and licence.

    Without a corpus, espeak-ng voices that no stage before has used stand in for it, and it says so.
    """
    if run.corpus:
        rows = [row for code in run.languages for row in sources.load_corpus(run.corpus, code, run.corpus_clips, run.seed)]
        card = {"data": sources.describe_data(run.corpus, rows)}
        card |= listed.describe_licence(run.languages, run.corpus, run.corpus_licence, rows)
    else:
        rows = [row for code in run.languages
                for row in make_speech(run, code, run.corpus_clips, run.seed + 1, voices=HELD_OUT_VOICES)]
        card = {"data": "espeak-ng voices that no stage before has used, standing in for a real corpus (synthetic)",
                "licence": f"of the data: {run.corpus_licence or 'synthetic speech'}"}
    print(f"the corpus: {card['data']}; licence {card['licence']}")
    return rows, card


def check_clips(rows, processor, run: Run | None = None) -> Clips:
    """Return the clips that can be trained on, and show what they are: the corpus card, and what is lost.

    Of a `run`, its parameters say how they are cleaned (filters.choose_clips). The card has hours, voices, lengths, characters,
    loudness and band, with hours per voice as a figure; three clips to hear, a short one, a middling and a long one; how many
    clips are set aside or remarked on for what, up to three of the former to hear, and each with its reason; the characters that
    the tokenizer has no token for.
    """
    settings, language = run.params if run else {}, run.language if run else next((row["language"] for row in rows), "")
    if settings.get("max_cer") or settings.get("pseudo_labels"):
        print(f"{run.asr_model} listens to the clips; of a corpus that it was trained on it knows the texts, and lets more pass")
    clips = Clips(*filters.choose_clips(rows, settings, lambda code: judges.load_asr(run.asr_model, run.device, code),
                                        Keep(run.data) if run else None))
    clips = replace(clips, card=check.describe_provenance(clips.good, clips.set_aside, settings))
    seconds = np.array([row["duration"] for row in clips.good])
    print(f"{len(clips.good)} clips, {seconds.sum() / 60:.1f} minutes; {len(clips.set_aside)} set aside")
    if done := level.describe_levels(clips.good):
        print(done)
    hours = pd.Series(seconds / 3600).groupby([str(row["speaker_id"]) for row in clips.good]).agg(["sum", "size"])
    card = {"hours": f"{seconds.sum() / 3600:.2f}", "clips": len(seconds), "voices": len(hours),
            "clips per voice": f"{hours['size'].min()} to {hours['size'].max()}",
            "different texts": len({row["text"] for row in clips.good}),
            "shortest, s": f"{seconds.min():.1f}", "median, s": f"{np.median(seconds):.1f}", "longest, s": f"{seconds.max():.1f}"}
    card |= check.describe_texts(clips.good, language) | check.describe_sound(clips.good)
    display(pd.Series(card, name="the corpus").to_frame())
    display(results.draw_hours(hours["sum"].to_numpy()))
    order = np.argsort(seconds, kind="stable")
    heard = dict.fromkeys(int(order[round(share * (len(order) - 1))]) for share in (0.1, 0.5, 0.9))
    heard = [i for i in heard if "codes_row" not in clips.good[i]]  # codes alone have no sound of their own
    if heard:
        display(players.players([(clips.good[i]["text"], read_audio(clips.good[i]["audio_path"])) for i in heard], columns=3))
    _show_faults(clips)
    _list_unknown(processor, clips)
    return clips


def _show_faults(clips):
    kinds = check.count_kinds(clips.good, clips.set_aside)
    if len(kinds):
        display(kinds)
    heard = []
    for row in {row["kind"]: row for row in reversed(clips.set_aside)}.values():  # one of each kind
        with suppress(AudioError, OSError):
            heard.append((f"{row['kind']}: {row['text']}", read_audio(row["audio_path"])[: LONGEST_HEARD * SAMPLE_RATE]))
    if heard:
        display(players.players(heard[:3], columns=3))
    if clips.set_aside:
        display(pd.DataFrame(clips.set_aside, columns=["audio_path", "kind", "reason"]))


def _list_unknown(processor, clips):
    unknown = self_check.list_unknown(processor, [row["text"] for row in clips.good])
    print("every character of the texts has a token" if unknown.empty else "characters that the tokenizer has no token for:")
    if not unknown.empty:
        display(unknown)


def replace_texts(data: Encoded, texts: dict[str, str], processor) -> Encoded:
    """Return the same tokens with other texts (`texts` maps the old ones); shows what the tokenizer has no token for in them."""
    clips = replace(data.clips, good=[row | {"text": texts[row["text"]]} for row in data.clips.good])
    _list_unknown(processor, clips)
    return replace(data, clips=clips, **{name: [row | {"text": texts[row["text"]]} for row in getattr(data, name)]
                                         for name in ("train_rows", "valid_rows")})


def encode_clips(run: Run, clips: Clips, corpus: str = "") -> Encoded:
    """Return the clips as codec tokens of the base model's codec, parted into training and held out, speakers numbered.

    `corpus` is where the clips are from, if not from espeak-ng. Only what is not in data/tokens yet is encoded. The table
    that is shown says who speaks; the run keeps the list of clips that were set aside (set_aside.json).
    """
    if clips.set_aside:
        write_json(run.dir / "set_aside.json", clips.set_aside)
    before, said = folders.find_adapter(run.params.get("init_adapter", ""), run), _make_tags(run)
    if run.languages[1:] or tags.name_kind(said) != "none":
        good = several.balance_hours(clips.good, run.languages, run.seed)
        hours = f"{sum(row['duration'] for row in good) / 3600:.2f}"
        clips = replace(clips, good=good, card=clips.card | {"hours": hours})
    good, voices = speakers.number_speakers(clips.good, corpus, before)
    codec = load_codec(run.base_model, run.device)
    made = tokens.write_tokens(good, codec, run.data, read_recipe(run.params).workers)
    rows = tags.tag_rows(tokens.read_tokens(made["path"], codec), said)
    train_rows, valid_rows, how = split.split_rows(rows, read_recipe(run.params).max_tokens)
    folders.note_used(run, tokens=made["path"])
    found = made["clips"] - made["encoded"]  # here, or in the tokens of another corpus
    print(f"{made['encoded']} clips encoded, {found} found; {len(train_rows)} to train on; {how}")
    voices = speakers.count_speakers(voices, train_rows)
    voice = speakers.pick_voice(voices)
    print(f"speaks as {voice}")
    display(pd.DataFrame(voices).drop(columns=["content", "speaker"]))  # who they are is in base.json: pages are passed on
    return Encoded(replace(clips, good=good), train_rows, valid_rows, Path(made["path"]), voices, voice, before)


def start_training(run: Run, model, processor, data: Encoded) -> Training:
    """Return the training of a run, begun from the stage before or anew, after the self-check of what is trained."""
    recipe = read_recipe(run.params)
    model = adapters.start_training(model, run.params.get("method", "lora"), data.before, recipe.rank, recipe.alpha,
                                    recipe.dropout, recipe.train_mlp, recipe.train_text, data.voices, run.seed,
                                    _make_tags(run), tags.find_rows(processor.tokenizer, _make_tags(run)))
    record.set_record(model, language=run.language, read_out=run.params.get("read_out", False))
    print(f"goes on from {folders.show_path(data.before) if data.before else 'the base'}{_say_kept(model, recipe, data.before)}")
    display(pd.Series(adapters.describe_adapter(model), name="trained").to_frame())
    texts = [row["text"] for row in data.clips.good]
    display(self_check.prove_model(model, processor, _list_own(run.language), texts))
    place = place_training(model, data.train_rows, data.valid_rows, recipe, run.data)
    folders.note_used(run, training=place)
    recipe = trainer.fix_steps(recipe, data.train_rows, processor, model, place)
    return Training(model, processor, data, recipe, place, Keep(run.data))


def _say_kept(model, recipe, before):
    """Return in words what an adapter that is gone on from keeps, where the recipe says otherwise; "" where it does not."""
    if before is None or not hasattr(model, "peft_config"):
        return ""
    own = model.peft_config[model.active_adapter]
    kept = {"rank": own.r, "alpha": own.lora_alpha, "dropout": own.lora_dropout}
    other = [f"{name} {value:g}, not {getattr(recipe, name):g}" for name, value in kept.items() if value != getattr(recipe, name)]
    return f", which keeps its {'; '.join(other)}: the recipe's is for an adapter that begins anew" if other else ""


def measure_cost(training: Training) -> pd.DataFrame:
    """Return what the training will cost and what the plan of a language would (cost.measure_cost), before it starts."""
    costs = cost.measure_cost(training.model, training.processor, training.data.train_rows, training.recipe,
                              out_dir=training.place)
    print(cost.describe_cost(costs))
    return cost.tabulate_cost(costs)


def train(run: Run, training: Training, probes) -> dict:
    """Train, show how it goes and what it says, and return {"before": loss of each held-out clip, "history": of losses}.

    Three of `probes` are spoken before the first step and on the way, and stay with the training; none for ().
    """
    model, processor, data, recipe, place = (training.model, training.processor, training.data, training.recipe,
                                             training.place)
    before = select.measure_clips(model, processor, data.valid_rows, recipe)
    print(f"{len(before)} held-out clips before the first step: {before.mean():.2f} nats")
    samples = callbacks.SpeakSamples(model, processor, probes[:3], data.voice, recipe.sample_every, place / "samples", run.seed)
    watch = callbacks.show_progress(recipe, samples if probes else None)
    history = trainer.train_model(model, processor, data.train_rows, data.valid_rows, place, recipe, watch)
    return {"before": before, "history": history}


def load_judges(run: Run):
    """Return (language ID, recogniser) of a run."""
    return judges.load_lid(run.lid_model, run.device), judges.load_asr(run.asr_model, run.device, run.language)


def select_checkpoint(run: Run, training: Training, lid=None, asr=None) -> pd.DataFrame:
    """Return the checkpoints of the last third with why one was taken, and put that one into the model; with a figure.

    With judges, those also decide that hear what each says; without, the loss alone (select.select_checkpoint).
    """
    texts = select.draw_texts(run.language, run.seed)[0] if lid else ()
    table = select.select_checkpoint(training.model, training.processor, training.place, training.data.valid_rows,
                                     training.recipe, texts, run.language, lid, asr, training.data.voice, run.seed,
                                     training.recipe.choice, training.keep)
    display(results.draw_checkpoints(table))
    return table


def judge_speech(run: Run, training: Training, lid, asr) -> dict:
    """Return how well the saved weights speak sentences that had no part in choosing them, for metrics and card."""
    texts = select.draw_texts(run.language, run.seed)[1]
    judged = select.judge_model(training.model, training.processor, texts, run.language, lid, asr, training.data.voice,
                                run.seed + 1, training.keep)
    figures = select.describe_speech(judged)
    display(pd.Series(figures, name="saved weights").round(3).to_frame())
    return figures | several.judge_others(run, training, lid)


def listen(run: Run, training: Training, language: str, probes) -> None:
    """Show what the saved weights say: the first probe beside the same before the training, then four held-out sentences."""
    said = [*probes[:1], *make_sentences(language, 4, run.seed, "test")]
    speech = speak(training.model, training.processor, said, training.data.voice, seed=run.seed, keep=training.keep)
    heard = [(f"{s.text} ({'ended' if s.ended else 'runaway'})", s.wav) for s in speech]
    first = min(training.place.glob("samples/step-*/0.wav"), key=lambda path: int(path.parent.name[5:]), default=None)
    if first:
        when = "before the training" if first.parent.name == "step-0" else first.parent.name.replace("-", " ")
        heard.insert(0, (f"{when}: {probes[0]}", read_audio(first)))
    display(players.players(heard))


def compare_voice(run: Run, training: Training):
    """Return a figure: a clip of the voice, and the same words by the saved weights below it, on one scale."""
    clip = speakers.find_clip(training.data.clips.good, training.data.voice)
    again, = speak(training.model, training.processor, [clip["text"]], training.data.voice, seed=run.seed, keep=training.keep)
    if "codes_row" in clip:  # of a data set of codes alone: what the codec makes of them
        (codes, _), = read_given([clip], ["clip"], training.model.codec_model)[0].values()
        wav, = decode(training.model.codec_model, [codes])
    else:
        wav = read_audio(clip["audio_path"])
    clips = [("clip", wav), ("adapter", again.wav)]
    return sound.draw_spectrograms(clips, title=clip["text"])


def finish(run: Run, training: Training, trained: dict, table: pd.DataFrame, card: dict, judged: dict | None = None,
           place: str = "") -> None:
    """Save what was trained, into the run and, if given, below `place` as well, say whether it learned, and end the run.

    `card` is what the model card says of the data; the figures of selection and judges come on top.
    """
    gain = select.compare_losses(trained["before"], select.measure_clips(training.model, training.processor,
                                                                         training.data.valid_rows, training.recipe))
    figures = gain | select.describe_choice(table, trained["history"]) | (judged or {}) | several.measure_each(run, training)
    counted = {"clips": len(training.data.train_rows)}
    before = {"goes on from": training.data.before} if training.data.before else {}
    before |= {"languages": ", ".join(run.languages)} if run.languages[1:] else {}
    card = {"language": run.language, "stage": run.stage} | before | card | training.data.clips.card | counted | figures
    folder = [resolve_path(place) / folders.name_trained(run.params, run.language)] if place else []
    for path in (run.dir / "adapter", *folder):
        save.save_trained(training.model, training.processor, path, card, run.base_model)
        print(f"saved in {folders.show_path(path)}")
    share = adapters.describe_adapter(training.model)["trained parameters (M)"]
    metrics = figures | counted | {"set_aside": len(training.data.clips.set_aside), "trained_parameters_m": share}
    metrics |= check.count_clips(training.data.clips.good, training.data.clips.set_aside)
    folders.note_used(run, **training.keep.places)
    print(training.keep.describe())
    print(f"{gain['verdict']}: {gain['because']}")
    folders.finish_run(run, metrics, gain["verdict"])
