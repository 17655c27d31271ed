"""What the trainings of an ablation came to: one row per arm, with intervals over seeds and sentences."""

import numpy as np
import pandas as pd

from csm_nb.ablate.arms import GRID, JUDGING, REFERENCE, TRAINED_IN, Training, count_length, name_rate
from csm_nb.judge.intervals import share_interval
from csm_nb.paths import show_path
from csm_nb.provenance import read_json
from csm_nb.runs import folders

UNTRAINED = ("reference", "base")  # espeak-ng and the model before any training: one row of each, whatever the seed


def compare_arms(rows: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """Return CER, LID accuracy and runaways by model over held-out sentences, and the difference in CER to `reference`.

    `rows` are what 04 judged, with the column seed, that of the training; a model that was not trained has one. CER counts
    as 1 at most. The difference is paired by seed and sentence. Intervals are 95 %, over seeds and sentences
    (two_way_interval). Probes are left out: what 04 reads beside them is what nothing before has seen.
    """
    rows = rows[~rows.probe.astype(bool)]
    rows = rows.assign(cer=rows.cer.clip(upper=1), right=(rows.heard == rows.language).astype(float))
    rates, right = (
        {name: part.pivot_table(index="seed", columns="text", values=value) for name, part in rows.groupby("model", sort=False)}
        for value in ("cer", "right")
    )
    table = []
    for name, part in rows.groupby("model", sort=False):
        own = rates[name]
        row = {"model": name, "seeds": len(own), "sentences": own.shape[1], "runaways": int((~part.ended.astype(bool)).sum())}
        row |= _describe("CER", own, "CER low", "CER high") | _describe("heard right", right[name], "low", "high")
        low, high = share_interval(round(row["heard right"] * own.shape[1]), own.shape[1])  # all right leaves no spread
        row |= {"low": min(low, row["low"]), "high": max(high, row["high"])}
        other = rates[reference] if reference in rates and name != reference else own.iloc[:0]
        if name in UNTRAINED:  # the same against every seed of the other
            own = pd.DataFrame([own.iloc[0]] * len(other), index=other.index)
        table.append(row | _describe("difference", own - other, "difference low", "difference high"))
    return pd.DataFrame(table).round(3)


def _describe(name, values, low, high):
    values = values.dropna(how="all").dropna(axis=1).to_numpy(float)
    mean = values.mean() if values.size else np.nan
    return dict(zip((name, low, high), (mean, *two_way_interval(values)), strict=True))


def two_way_interval(values, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values`, shape (seeds, sentences), over both.

    Seeds and sentences are drawn anew, each with replacement (the pigeonhole bootstrap: Owen 2007, Annals of Applied
    Statistics 1(2)). One seed leaves an interval over sentences alone, and few show too little of their spread: two .71 of
    it, three .82, five .89. Of nothing, (nan, nan).
    """
    values = np.atleast_2d(np.asarray(values, float))
    if values.size == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(size, np.full(size, 1 / size), draws) / size for size in values.shape]
    low, high = np.quantile(np.einsum("ds,st,dt->d", counts[0], values, counts[1], optimize=True), [0.025, 0.975])
    return float(low), float(high)


def pick_rates(losses: dict) -> dict:
    """Return {arm: the name of its best rate in the grid} by the lowest of `losses` {name: held-out loss}; without one, none.

    By the loss, since the sentences of the comparison must not choose what is compared.
    """
    grids = {arm: [name_rate(arm, factor) for factor in GRID] for arm in (REFERENCE, "full")}
    found = {arm: [name for name in names if name in losses] for arm, names in grids.items()}
    return {arm: min(names, key=losses.get) for arm, names in found.items() if names}


def read_judged(training: Training) -> pd.DataFrame:
    """Return what 04 judged of a training in its own language: the rows of its model, under the arm's name, base, reference.

    Raises LookupError where it judged no model of the training.
    """
    task = training.tasks[JUDGING]
    rows = pd.read_csv(task.folder / "judged.csv", keep_default_na=False)  # "null" may be what was heard
    own = folders.name_trained(task.params, training.language)
    rows = rows[(rows.language == training.language) & rows.model.isin([*UNTRAINED, own])]
    if own not in set(rows.model):
        raise LookupError(f"{show_path(task.folder)} judged no model {own}")
    return rows.assign(model=rows.model.replace({own: training.arm}), seed=training.seed)


def describe_training(training: Training) -> dict:
    """Return what one training of an arm was: parameters trained, steps, compute, seconds, and the held-out loss after 03.

    Compute is the FLOPs of its steps over those that LoRA takes with the profile's own steps (1 is equal).
    """
    made = [task.folder for stage, task in training.tasks.items() if stage in TRAINED_IN]
    metrics = [read_json(folder / "metrics.json") for folder in made]
    steps = sum(part["trained_steps"] for part in metrics)
    planned = sum(count_length(stage, training.params[stage]) for stage in TRAINED_IN)
    by_steps = training.params[TRAINED_IN[-1]]["recipe"]["steps"]
    done = steps if by_steps else sum(count_length(stage, task.params) for stage, task in training.tasks.items()
                                      if stage in TRAINED_IN)
    return {
        "model": training.arm,
        "seed": training.seed,
        "trained parameters (M)": metrics[-1].get("trained_parameters_m", np.nan),
        "steps": steps,
        "compute": round(done * training.cost / planned, 3),
        "seconds": round(sum(read_json(folder / "run.json")["seconds"] for folder in made)),
        "loss": metrics[-1]["last_loss"],
    }


def build_table(trainings: list[Training]) -> pd.DataFrame:
    """Return the comparison of one language: reference and base once, then one row per arm, in the order of the arms.

    What a training was is the mean over its seeds; `best rate` marks in each grid of learning rates the one with the lowest
    held-out loss of the first seed, which all of a grid have; `against best rate` is full's CER at its own less that of
    LoRA + text at its own. The column `state` says "done" or "failed: ..., see ...", of some of the seeds ("1 of 3 seeds
    failed: ...") or of all: an arm without results has no figures. A training whose results cannot be read has failed too.
    """
    parts, described = [], []
    for training in trainings:
        if training.state != "done":
            continue
        try:
            rows, figures = read_judged(training), describe_training(training)
        except (OSError, LookupError, AttributeError, ValueError) as error:
            training.fault = f"its results cannot be read, {error!r}"
            continue
        parts.append(rows[~rows.model.isin(UNTRAINED)] if parts else rows)
        described.append(figures)
    names, rates = list(dict.fromkeys(training.arm for training in trainings)), {}
    table = pd.DataFrame({"model": [*(name for name in UNTRAINED if parts and name in set(parts[0].model)), *names]})
    if parts:
        trained, judged = pd.DataFrame(described), compare_arms(pd.concat(parts))
        first = trained[trained.seed == trainings[0].seed].set_index("model").loss
        rates = pick_rates(first.dropna().to_dict())
        if len(rates) == 2:
            best = compare_arms(pd.concat(parts), rates[REFERENCE]).filter(regex="model|difference")
            best.columns = best.columns.str.replace("difference", "against best rate")
            judged = judged.merge(best[best.model == rates["full"]], on="model", how="left")
        trained = trained.drop(columns="seed").groupby("model").mean().round(3)
        table = table.merge(trained, on="model", how="left").merge(judged, on="model", how="left")
    states = [_describe_state([training for training in trainings if training.arm == name]) for name in table.model]
    return table.assign(**{"best rate": table.model.isin(rates.values()), "state": states})


def _describe_state(trainings):
    failed = [training.state for training in trainings if training.state != "done"]
    if not failed:
        return "done"
    some = "" if len(failed) == len(trainings) else f"{len(failed)} of {len(trainings)} seeds "
    return some + failed[0]
