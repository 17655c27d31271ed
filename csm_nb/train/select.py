"""Which checkpoint is saved, whether its training taught anything, and how well it speaks. All figures are of saved weights."""

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy

from csm_nb.csm.load import inner_model
from csm_nb.device import half_precision
from csm_nb.judge.intervals import bootstrap_interval, count_needed_mean, share_interval
from csm_nb.judge.judges import identify_languages, transcribe
from csm_nb.recipe import TrainingError
from csm_nb.speak.generate import speak
from csm_nb.text.normalise import character_error_rates
from csm_nb.text.sentences import VALIDATION_CLIPS, make_sentences
from csm_nb.train.checkpoints import has_finite_weights, list_checkpoints, load_weights
from csm_nb.train.loss import compute_loss
from csm_nb.train.packing import IGNORED, collate, pack_row, read_clips

CHOICES = ("best", "last")
TEXTS = 32  # over so many texts a score has a standard deviation of .08 over seeds; checkpoints differ by .01 to .05
FEWEST_CLIPS = 8  # held-out clips; a bootstrap interval over fewer is too narrow
LEAST_FALL = 0.01  # nats; a fall that two decimals do not show is none, however sure
JUDGED = ("CER", "CER low", "CER high", "heard right", "low", "high", "runaways", "score")


@torch.no_grad()
def measure_clips(model, processor, rows, recipe) -> np.ndarray:
    """Return the loss of each held-out clip in nats, shape (clips,): backbone + depth decoder, weighed by codebook as trained.

    `rows` are the held-out token rows of split.split_rows. At most 128 are taken, as in the training's own evaluations.
    Clips, their order and the frames drawn for the depth decoder follow from the recipe's seed, so that the losses of two
    models are paired clip by clip. Their mean is over clips; that in the log is over frames. Weights, modes and random
    numbers are left as they were. Raises TrainingError when there is no clip.
    """
    clips = read_clips(rows, processor, recipe.max_tokens, inner_model(model).codec_model.config.frame_rate)
    chosen = np.random.default_rng(recipe.seed).permutation(clips.usable)[:VALIDATION_CLIPS]
    chosen = chosen[np.argsort(clips.lengths[chosen], kind="stable")]  # clips of similar length together: little padding
    groups = np.cumsum(clips.lengths[chosen]) // recipe.max_tokens  # as many at once as a row of the training holds
    losses, training = [], model.training
    model.eval()  # no dropout
    try:
        for indices in np.split(chosen, np.flatnonzero(np.diff(groups)) + 1):
            batch = collate([draw_clip(clips, index, recipe) for index in indices.tolist()])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            with half_precision(model.device.type):  # as after a training, whose Trainer leaves it in the model's forward
                output = compute_loss(model, batch, recipe.codebook_weights)
            losses.append(split_loss(output, batch, recipe.codebook_weights).cpu().numpy())
    finally:
        model.train(training)
    return np.concatenate(losses).astype(float)


def draw_clip(clips, index: int, recipe) -> dict:
    """Return a clip alone in a row (packing.pack_row), with at least two frames for the depth decoder, the same every time."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng([recipe.seed, index]).integers(2**62)))
    frames = clips.lengths[index] - len(clips.input_ids[index])
    return pack_row(clips, [index], max(recipe.depth_ratio, 2 / frames), generator)  # two, as collate may drop one


def split_loss(output, batch: dict, codebook_weights=()) -> torch.Tensor:
    """Return the loss of each row of `batch` in nats, shape (rows,), from the model's output for all of them.

    For a batch of one row it is what loss.compute_loss gives.
    """
    weights = torch.tensor(codebook_weights or [1.0] * batch["codes"].shape[-1], dtype=torch.float32, device=output.logits.device)
    weights = weights / weights.mean()
    backbone = cross_entropy(output.logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    backbone = backbone.sum(1) / (batch["labels"][:, 1:] != IGNORED).sum(1)
    drawn, targets = batch["depth_frames"], batch["codes"][batch["depth_frames"]][:, 1:]
    depth = cross_entropy(output.depth_decoder_logits.float().transpose(1, 2), targets, reduction="none")
    depth = torch.zeros_like(backbone).index_add(0, drawn.nonzero()[:, 0], (depth * weights[1:]).mean(1)) / drawn.sum(1)
    return weights[0] * backbone + depth


def compare_losses(before, after) -> dict:
    """Return what a stage learned, from the losses of the same held-out clips (measure_clips) before it and after it.

    `after` is of the saved weights. Keys: verdict, because (a sentence), first_loss, last_loss, loss_fall with its 95 %
    bootstrap interval over clips (loss_fall_low, loss_fall_high), held_out_clips; losses in nats. The verdict is "learned"
    when the whole interval is a fall of at least .01 nats, and "no gain" when none of it is. Otherwise, and with fewer than
    8 clips, it is "unclear". Raises ValueError when the two are not of the same clips.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape:
        raise ValueError(f"{len(before)} clips before and {len(after)} after; measure both on the same held-out clips")
    falls = before - after
    low, high = bootstrap_interval(falls) if np.isfinite(falls).all() else (np.nan, np.nan)  # NaN is never "learned"
    first, last, fall, count = before.mean(), after.mean(), falls.mean(), len(falls)
    words = f"the loss on {count} held-out clip{'s' * (count != 1)} went from {first:.2f} to {last:.2f} nats"
    if count < FEWEST_CLIPS:
        verdict = "unclear"
        because = f"{words}; it takes {FEWEST_CLIPS} clips and more to decide: hold out {FEWEST_CLIPS - count} more"
    else:
        verdict = "learned" if low >= LEAST_FALL else "unclear" if high >= LEAST_FALL else "no gain"
        because = f"{words}, a fall of {fall:.2f} (95 % interval {low:.2f} to {high:.2f})"
        if verdict != "learned":
            because += f"; learned is a fall of {LEAST_FALL} and more in the whole interval"
        if verdict == "unclear":
            needed = count_needed_mean(fall, low, high, count, LEAST_FALL) if fall > LEAST_FALL else None
            if needed:
                because += f", which about {needed} clips would show"
    figures = {"first_loss": first, "last_loss": last, "loss_fall": fall, "loss_fall_low": low, "loss_fall_high": high}
    figures = {name: round(float(value), 4) for name, value in figures.items()}
    return {"verdict": verdict, "because": because} | figures | {"held_out_clips": count}


def draw_texts(language: str, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return two lists of 32 validation sentences of `language`: one to choose a checkpoint by, one to report it by.

    No sentence is in both, and none is a probe or one that 04 reads.
    """
    drawn = make_sentences(language, 2 * TEXTS, seed, "validation")
    return drawn[:TEXTS], drawn[TEXTS:]


def select_checkpoint(model, processor, out_dir, rows, recipe, texts=(), language: str = "", lid=None, asr=None,
                      speaker_id: str = "0", seed: int = 0, choice: str = "best", keep=None) -> pd.DataFrame:
    """Put the weights of the chosen checkpoint in `out_dir` into `model`; return a table with one row per candidate.

    `model` is as train_model leaves it. Candidates are the complete checkpoints of the last third of the steps. The one
    with the lowest loss on held-out clips (measure_clips of `rows`) is chosen. Where there are `texts` (at least 32) and
    judges, another replaces it only if its score is better beyond the 95 % interval over texts. A score alone would often
    choose a worse one: it differs more from seed to seed than from checkpoint to checkpoint (TEXTS). With `choice` "last"
    the newest is chosen, for comparing trainings instead of checkpoints. `keep` as in judge_model.

    Columns: step; held-out loss in nats; where judges were asked, the figures of summarise_speech and by how much the score
    is better than that of the lowest loss (better by, better low, better high); chosen; by loss (whether it has the lowest);
    why. A checkpoint that can not be read or has weights that are not finite is left out, with a printed line. Raises
    TrainingError when none is left, for too few texts and for an unknown `choice`.
    """
    if choice not in CHOICES:
        raise TrainingError(f"choice is {choice!r}; allowed are {' and '.join(CHOICES)}")
    if len(texts) and len(set(texts)) < TEXTS:
        raise TrainingError(f"{len(set(texts))} texts to choose by; allowed are {TEXTS} and more (select.draw_texts), or none: "
                            "then the loss alone chooses")
    folders = dict(find_candidates(model, out_dir)[-1 if choice == "last" else 0 :])
    judged, table = [], []
    for step, folder in folders.items():
        load_weights(model, folder)
        row = {"step": step, "held-out loss": measure_clips(model, processor, rows, recipe).mean()}
        if len(texts) and len(folders) > 1:  # one candidate needs no judge
            judged.append(judge_model(model, processor, texts, language, lid, asr, speaker_id, seed, keep))
            row |= summarise_speech(judged[-1])
        table.append(row)
    table = mark_choice(pd.DataFrame(table), [part.score.to_numpy() for part in judged])
    if choice == "last":
        table["why"] = "the last one, as choice=last asks"
    load_weights(model, folders[table.step[table.chosen].item()])
    return table.round(3)


def find_candidates(model, out_dir) -> list:
    """Return [(step, folder), ...] of the usable checkpoints in the last third of the steps, oldest first.

    The newest usable one counts as the end of the steps. Weights are tried on `model`, which is left with some of them.
    Raises TrainingError when there is none.
    """
    candidates, broken = [], []
    for step, folder in reversed(list_checkpoints(out_dir)):
        if candidates and 3 * step < 2 * candidates[0][0]:
            break
        problem = find_problem(model, folder)
        if problem:
            broken.append(f"{folder.name}: {problem}")
        else:
            candidates.append((step, folder))
    if not candidates:
        if broken:
            raise TrainingError(f"{out_dir}: no checkpoint can be used ({'; '.join(broken)}); delete them and train again")
        raise TrainingError(f"{out_dir}: no complete checkpoint to choose from; name the folder that a training wrote to, or "
                            "train again")
    for line in reversed(broken):
        print(f"left out, {line}")
    return candidates[::-1]


def find_problem(model, folder) -> str:
    """Put a checkpoint's weights into `model` and return why they can not be used, or "" if they can."""
    try:
        load_weights(model, folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        return f"can not be read ({error})"
    return "" if has_finite_weights(model) else "holds weights that are no numbers"


def judge_model(model, processor, texts, language: str, lid, asr, speaker_id: str = "0", seed: int = 0,
                keep=None) -> pd.DataFrame:
    """Return how well `model` speaks each of `texts`: one row per text with CER, right, runaway and score.

    `right` is whether the language ID hears `language`, `runaway` whether the clip had not ended at its limit. The score is
    CER + (not right) + runaway, an unweighted sum: 0 is perfect, 3 the worst. A clip's CER counts as 1 at most, so that one
    clip of babble does not outweigh all others. With `keep` (keep.Keep) nothing
    is spoken or heard that was before.
    """
    said = speak(model, processor, texts, speaker_id, seed=seed, keep=keep, language=language)
    wavs = [s.wav for s in said]
    table = pd.DataFrame({
        "text": list(texts), "CER": character_error_rates(texts, transcribe(asr, wavs, keep=keep), language).clip(max=1),
        "right": [max(scores, key=scores.get) == language for scores in identify_languages(lid, wavs, keep=keep)],
        "runaway": [not s.ended for s in said],
    })
    return table.assign(score=table.CER + ~table.right + table.runaway)


def summarise_speech(judged: pd.DataFrame) -> dict:
    """Return the means of judge_model's table, with 95 % intervals over texts (keys: JUDGED).

    They are CER with its bootstrap interval, LID accuracy ("heard right") with Wilson's interval, the share of runaways,
    and the score.
    """
    (cer_low, cer_high), (low, high) = bootstrap_interval(judged.CER), share_interval(judged.right.sum(), len(judged))
    figures = (judged.CER.mean(), cer_low, cer_high, judged.right.mean(), low, high, judged.runaway.mean(), judged.score.mean())
    return dict(zip(JUDGED, map(float, figures), strict=True))


def mark_choice(table: pd.DataFrame, scores=()) -> pd.DataFrame:
    """Return a table of step and held-out loss with the columns chosen, by loss and why added.

    `scores` has one array per row, of the same texts (judge_model); with it there are also the columns better by, better low
    and better high. The lowest loss is chosen, of equals the later step. It is replaced by one whose score is lower in the
    whole 95 % interval over texts; of several such, by the one with the lowest score.
    """
    best = chosen = table.sort_values(["held-out loss", "step"], ascending=[True, False]).index[0]
    why = pd.Series(f"a higher loss than step {table.step[best]}", index=table.index)
    why[best] = "the lowest held-out loss" if len(table) > 1 else "the only one in the last third of the steps"
    if len(scores):
        gains = [scores[best] - own for own in scores]
        intervals = [bootstrap_interval(gain) for gain in gains]
        table = table.assign(**{"better by": [gain.mean() for gain in gains], "better low": [low for low, _ in intervals],
                                "better high": [high for _, high in intervals]})
        why = pd.Series([f"by {gain.mean():.3f} ({low:.3f} to {high:.3f}) over {len(gain)} texts"
                         for (low, high), gain in zip(intervals, gains, strict=True)], index=table.index)
        better = table[table["better low"] > 0]
        if len(better):
            chosen = better.sort_values(["better by", "held-out loss"], ascending=[False, True]).index[0]
        step = table.step[best]
        why[table["better low"] > 0] = f"a better score than step {step}, beyond the interval: " + why
        why[table["better low"] <= 0] = f"a higher loss than step {step}, and no better score beyond the interval: " + why
        why[best] = "the lowest held-out loss" + ("" if len(better) else "; no other has a better score beyond the interval")
    return table.assign(**{"chosen": table.index == chosen, "by loss": table.index == best, "why": why})


def describe_choice(table: pd.DataFrame, history: list[dict]) -> dict:
    """Return what metrics and card say of select_checkpoint's table: which step was saved and why, and the steps trained."""
    best = table[table.chosen].iloc[0]
    return {
        "steps": int(best.step), "chosen_because": best.why, "checkpoints": len(table),
        "step_by_loss": int(table.step[table["by loss"]].iloc[0]), "trained_steps": int(history[-1]["step"]),
    }


def describe_speech(judged: pd.DataFrame) -> dict:
    """Return what metrics and card say of how the saved weights speak: the figures of judge_model's table, with intervals.

    `judged` is of texts that had no part in the choice of the checkpoint. Shares are from 0 to 1.
    """
    names = ("cer", "cer_low", "cer_high", "heard_right", "heard_right_low", "heard_right_high", "runaways")
    low, high = share_interval(judged.runaway.sum(), len(judged))
    figures = dict(zip(names, summarise_speech(judged).values(), strict=False)) | {"runaways_low": low, "runaways_high": high}
    return {name: round(value, 4) for name, value in figures.items()} | {"judged_texts": len(judged)}
