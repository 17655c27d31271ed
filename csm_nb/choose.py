"""The checkpoint that speaks best: each one reads the same probes and is judged, since the lowest loss may mislead."""

import numpy as np
import pandas as pd
from safetensors import SafetensorError

from csm_nb.batches import TrainingError
from csm_nb.checkpoints import MARKER, has_finite_weights, list_checkpoints, load_weights
from csm_nb.judge import bootstrap_interval, character_error_rates, identify_languages, transcribe
from csm_nb.provenance import read_json
from csm_nb.speak import speak

TAKES = 4  # of each text: by one take of 8 probes an adapter's score was .47, .69 or 1.01, by four .57, .59 or .77


def choose_checkpoint(model, processor, out_dir, texts, language: str, lid, asr, speaker_id: str = "0",
                      seed: int = 0) -> pd.DataFrame:
    """Puts the weights of the best checkpoint in `out_dir` into `model` and returns how all of them did, one row each.

    `model` is as train_model leaves it. Every complete checkpoint, of an adapter or of a fully trained model, speaks `texts`
    several times, with the same seed. Columns: step, held-out loss, what judge_model returns, then whether it is chosen, and
    whether the loss would have chosen it. One that can not be read or holds weights that are no numbers is left out, and
    printed. Raises TrainingError when none is left.
    """
    found, rows, broken = list_checkpoints(out_dir), [], []
    for step, folder in found:
        problem = find_problem(model, folder)
        if problem:
            broken.append(f"{folder.name}: {problem}")
            continue
        loss = read_json(folder / MARKER).get("eval_loss", float("nan"))
        figures = judge_model(model, processor, texts, language, lid, asr, speaker_id, seed)
        rows.append({"step": step, "held-out loss": loss} | figures)
    if not rows:
        if broken:
            raise TrainingError(f"{out_dir}: no checkpoint can be used ({'; '.join(broken)}); delete them and train again")
        raise TrainingError(f"{out_dir}: no complete checkpoint to choose from; name the folder that a training wrote to, or "
                            "train again")
    for line in broken:
        print(f"left out, {line}")
    table = mark_choice(pd.DataFrame(rows))
    load_weights(model, dict(found)[table.step[table.chosen].item()])
    return table.round(3)


def find_problem(model, folder) -> str:
    """Puts a checkpoint's weights into `model` and returns why they can not be used, or "" if they can."""
    try:
        load_weights(model, folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        return f"can not be read ({error})"
    return "" if has_finite_weights(model) else "holds weights that are no numbers"


def judge_model(model, processor, texts, language: str, lid, asr, speaker_id: str = "0", seed: int = 0) -> dict:
    """How well `model` speaks `texts`, each four times: CER and share heard as `language`, with 95 % intervals over texts,
    runaways (share), score.

    The score is CER + (1 - heard right) + runaways, an unweighted sum of three error rates: 0 is perfect, 3 the worst. A
    clip's CER counts as 1 at most, so that one that babbles does not outweigh all the others.
    """
    texts = [text for text in texts for _ in range(TAKES)]
    said = speak(model, processor, texts, speaker_id, seed=seed)
    wavs = [s.wav for s in said]
    cer = character_error_rates(texts, transcribe(asr, wavs), language).clip(max=1).reshape(-1, TAKES).mean(1)
    right = np.array([max(scores, key=scores.get) == language for scores in identify_languages(lid, wavs)], dtype=float)
    right, runaways = right.reshape(-1, TAKES).mean(1), float(np.mean([not s.ended for s in said]))
    (cer_low, cer_high), (low, high) = bootstrap_interval(cer), bootstrap_interval(right)
    return {
        "CER": cer.mean(), "CER low": cer_low, "CER high": cer_high, "heard right": right.mean(), "low": low, "high": high,
        "runaways": runaways, "score": cer.mean() + (1 - right.mean()) + runaways,
    }


def mark_choice(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the columns chosen (the lowest score; of equals the lower loss, then the later step) and by loss (the lowest)."""
    def first(*keys):  # a missing loss sorts last
        return table.sort_values([*keys, "step"], ascending=[True] * len(keys) + [False]).index[0]

    measured = table["held-out loss"].notna()
    return table.assign(**{
        "chosen": table.index == first("score", "held-out loss"),
        "by loss": (table.index == first("held-out loss")) & measured,
    })


def describe_choice(table: pd.DataFrame) -> dict:
    """For a run's metrics, of choose_checkpoint's table: the chosen step with its figures, and the step that the loss chose."""
    best, by_loss = table[table.chosen].iloc[0], table.step[table["by loss"]].tolist()
    return {
        "chosen_step": int(best.step), "step_by_loss": by_loss[0] if by_loss else None, "checkpoints": len(table),
        "chosen_cer": float(best.CER), "chosen_heard_right": float(best["heard right"]),
        "chosen_runaways": float(best.runaways), "chosen_score": float(best.score),
    }
