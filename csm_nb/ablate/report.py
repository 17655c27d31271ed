"""What the arms of an ablation came to: one table and one figure per language, with intervals over seeds and sentences."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from csm_nb.ablate.arms import FROZEN, FULL_LR, GRID, JUDGING, REFERENCE, STEPS, TRAINED, Work, name_rate, write_value
from csm_nb.hub import describe_model
from csm_nb.judge.intervals import share_interval
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path, show_path
from csm_nb.provenance import read_json
from csm_nb.runs import folders
from csm_nb.show.style import COLOURS, GREY, INK, make_figure, set_labels

UNTRAINED = ("reference", "base")  # espeak-ng and the model before any training: one row of each, whatever the seed


def compare_arms(rows: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """Return CER, share heard right and runaways by model over held-out sentences, and the difference in CER to `reference`.

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


def read_judged(work: Work) -> pd.DataFrame:
    """Return what 04 judged of a training in its own language: the rows of its model, under the arm's name, base, reference."""
    rows = pd.read_csv(work.runs[JUDGING] / "judged.csv", keep_default_na=False)  # "null" may be what was heard
    own = folders.name_trained(work.calls[-1][1], work.language)
    rows = rows[(rows.language == work.language) & rows.model.isin(["reference", "base", own])]
    return rows.assign(model=rows.model.replace({own: work.arm}), seed=work.seed)


def describe_training(work: Work) -> dict:
    """Return what one training of an arm was: parameters trained, steps, compute, seconds, and the held-out loss after 03.

    Compute is the FLOPs of its steps over those that LoRA takes with the profile's own steps (1 is equal).
    """
    made = [read_json(work.runs[stage] / "metrics.json") for stage in STEPS if stage in work.runs]
    steps = sum(metrics["trained_steps"] for metrics in made)
    planned = sum(work.params[stage][key] for stage, key in STEPS.items())
    return {
        "trained parameters (M)": made[-1].get("trained_parameters_m", np.nan),
        "steps": steps,
        "compute": round(steps * work.cost / planned, 3),
        "seconds": round(sum(read_json(work.runs[stage] / "run.json")["seconds"] for stage in STEPS if stage in work.runs)),
        "loss": made[-1]["last_loss"],
    }


def build_table(works: list[Work]) -> pd.DataFrame:
    """Return the comparison of one language: reference and base once, then one row per arm, in the order of the arms.

    What a training was is the mean over its seeds; `best rate` marks in each grid of learning rates the one with the lowest
    held-out loss; `against best rate` is full's CER at its own less that of LoRA + text at its own. The column `state` says
    "done" or "failed: see <log>", of some of the seeds ("1 of 3 seeds failed: ...") or of all: an arm without results has
    no figures. A training whose results cannot be read has failed too.
    """
    parts, training = [], []
    for work in works:
        if work.state != "done":
            continue
        try:
            rows, described = read_judged(work), describe_training(work)
        except (OSError, LookupError, AttributeError, ValueError) as error:
            work.state = "failed"
            print(f"{work} failed: its results cannot be read: {error!r}", flush=True)
            continue
        if work.arm not in set(rows.model):
            work.state = "failed"
            print(f"{work} failed: {show_path(work.runs[JUDGING])} judged no model of it", flush=True)
            continue
        parts.append(rows[~rows.model.isin(UNTRAINED)] if parts else rows)
        training.append({"model": work.arm} | described)
    names, rates = list(dict.fromkeys(work.arm for work in works)), {}
    table = pd.DataFrame({"model": [*(name for name in UNTRAINED if parts and name in set(parts[0].model)), *names]})
    if parts:
        trained = pd.DataFrame(training).groupby("model").mean().round(3)
        rates = pick_rates(trained.loss.dropna().to_dict())
        judged = compare_arms(pd.concat(parts))
        if len(rates) == 2:
            best = compare_arms(pd.concat(parts), rates[REFERENCE]).filter(regex="model|difference")
            best.columns = best.columns.str.replace("difference", "against best rate")
            judged = judged.merge(best[best.model == rates["full"]], on="model", how="left")
        table = table.merge(trained, on="model", how="left").merge(judged, on="model", how="left")
    return table.assign(**{"best rate": table.model.isin(rates.values()),
                           "state": [_describe_state([work for work in works if work.arm == name]) for name in table.model]})


def _describe_state(works):
    failed = [work for work in works if work.state != "done"]
    if not failed:
        return "done"
    some = "" if len(failed) == len(works) else f"{len(failed)} of {len(works)} seeds "
    return f"{some}failed: see {show_path(failed[0].log)}"


def draw_ablation(table: pd.DataFrame, title: str = ""):
    """Return a figure of the arms: CER and share heard right, whiskers the 95 % interval over seeds and sentences.

    `table` is what build_table returns. The dashed line is the arm that the others are compared with; models without a
    training of this call (base, reference) are grey; an arm without results says that it failed.
    """
    figure, axes = make_figure(1, 2, 9, 0.42 * len(table) + 1.2, sharey=True)
    panels = (("CER", "CER low", "CER high", "Character error rate: less is better"),
              ("heard right", "low", "high", "Heard as its language: more is better"))
    done = ~table.state.str.startswith("failed")  # some of its seeds are enough to be drawn
    for ax, (name, low, high, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(table.to_dict("records")):
            if not done[place]:
                ax.text(0.015, place, "failed", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=GREY)
                continue
            own = row["model"] not in UNTRAINED
            colour = GREY if not own else COLOURS[0]
            ax.barh(place, row[name], color=colour, height=0.62, alpha=0.85 if own else 0.5)
            ax.errorbar(row[name], place, xerr=[[row[name] - row[low]], [row[high] - row[name]]], color=INK, capsize=3,
                        linewidth=1.2)
            ax.annotate(f"{row[name]:.0%}", (max(row[name], row[high]), place), (6, 0), textcoords="offset points",
                        va="center", fontsize=8.5, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        for row in table[done & (table.model == REFERENCE)].to_dict("records"):
            ax.axvline(row[name], color=COLOURS[1], linestyle="--", linewidth=1.1, zorder=0.9)
        set_labels(ax, label)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(0, 1.15 * np.nanmax([table.get(high, pd.Series(dtype=float)).max(), 0.2]))
        ax.grid(False, axis="y")
    axes[0].set_yticks(range(len(table)), table.model)
    axes[0].invert_yaxis()
    counts = sorted(set(table.sentences.dropna().astype(int))) if "sentences" in table else []
    count = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "no"
    seeds = int(table.seeds.max()) if "seeds" in table else 0
    figure.supxlabel(f"n = {count} held-out sentences, {seeds} seed{'s' * (seeds != 1)}; whiskers: 95 % interval over both; "
                     f"dashed: {REFERENCE}", fontsize=8.5, color=INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def describe_rates(table: pd.DataFrame) -> str:
    """Return in words how full stands against LoRA + text, each at the best rate of its grid; "" where one has none."""
    best = table[table["against best rate"].notna()] if "against best rate" in table else table.iloc[:0]
    if best.empty:
        return ""
    row, grid = best.iloc[0], {name_rate(REFERENCE, factor) for factor in GRID}
    other = next(name for name in table.model[table["best rate"]] if name in grid)
    names = ("against best rate", "against best rate low", "against best rate high")
    return f"Each at its best rate, {row.model} against {other}: {_write_interval(row, *names, '+.1f')} points of CER."


def format_table(table: pd.DataFrame) -> str:
    """Return build_table's frame as a Markdown table for people, columns aligned; rates and intervals in %, "–" for nothing."""
    heads = ["arm", "trained (M)", "steps", "compute", "seconds", "loss", "CER, %", f"against {REFERENCE}, points",
             "heard right, %", "runaways", "sentences", "seeds"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in table.to_dict("records"):
        failed = "" if row["state"] == "done" else f" ({row['state'].partition(':')[0]}: see log)"
        failed += " (best rate)" if row.get("best rate") else ""
        lines.append([
            row["model"] + failed, _write_number(row, "trained parameters (M)", "{:.2f}"), _write_number(row, "steps", "{:.0f}"),
            _write_number(row, "compute", "{:.1%}"), _write_number(row, "seconds", "{:.0f}"),
            _write_number(row, "loss", "{:.2f}"),
            _write_interval(row, "CER", "CER low", "CER high", ".1f"),
            _write_interval(row, "difference", "difference low", "difference high", "+.1f"),
            _write_interval(row, "heard right", "low", "high", ".0f"),
            _write_number(row, "runaways", "{:.0f}"), _write_number(row, "sentences", "{:.0f}"),
            _write_number(row, "seeds", "{:.0f}"),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {row} |" for row in rows)


def _write_number(row, name, form):
    value = row.get(name)
    return "–" if value is None or pd.isna(value) else form.format(value)


def _write_interval(row, name, low, high, form):
    if pd.isna(row.get(name, np.nan)):
        return "–"
    value, bottom, top = (f"{round(100 * row[key], 1) + 0.0:{form}}" for key in (name, low, high))
    return f"{value} ({bottom} to {top})"


def write_report(works: list[Work], command: str) -> tuple[pd.DataFrame, list[Path]]:
    """Write ablation.md, .csv and .png of one language's arms; return (table, their paths).

    They lie in <runs_dir>/ablate/<language>/ and are written anew by each call.
    """
    language, params = works[0].language, {key: value for part in works[0].params.values() for key, value in part.items()}
    folder = resolve_path(params["runs_dir"]) / "ablate" / language
    folder.mkdir(parents=True, exist_ok=True)
    table = build_table(works)
    table.to_csv(folder / "ablation.csv", index=False)
    name, base, cost = get_language(language).name, Path(params["base_model"]).name, max(work.cost for work in works)
    draw_ablation(table, f"{name}, {base}: arms at equal compute").savefig(folder / "ablation.png", dpi=150)
    corpus = params["corpus"] or "an espeak-ng voice that no stage before has used, standing in for a corpus (synthetic)"
    changed = "\n".join(f"- **{work.arm}**, seed {work.seed} ({work.state}): {_describe_calls(work)}" for work in works)
    (folder / "ablation.md").write_text(f"""# {name}: the workbook with one thing changed at a time

{describe_model(params["base_model"])}

Speech: 01 and 02 train with espeak-ng (synthetic); 03 with {corpus}. Judges: {params["lid_model"]}, {params["asr_model"]}.

{format_table(table)}

![Character error rate and share heard right, by arm](ablation.png)

- **{_describe_seeds(works)}**
- Every stage keeps its last checkpoint: one that is chosen would compare the draws of the choice with each other.
- CER (of a clip, at most 100 %), heard right and runaways are over held-out sentences only, without the probes. "Against
  {REFERENCE}" is paired by seed and sentence, + is worse.
- **Learning rates**: {REFERENCE} and full have {", ".join(f"{factor:g}" for factor in sorted(GRID))} times the rates of their own
  (full {FULL_LR:g} of LoRA's); "best rate" has the lowest held-out loss. {describe_rates(table)}
- **Data**: "data 1/8" has an eighth of the clips of 02 and 03, and as many steps as the whole, which is {REFERENCE}.
- **Equal compute** is counted in FLOPs: {FROZEN} a position for a frozen weight (2 forward, 2 back to the activations), {TRAINED}
  for a trained one, the adapter's own weights included. A step of "full" costs {cost:.2f} of LoRA's, so it takes 1/{cost:.2f} of
  the steps. Compute is relative to the profile's own steps with LoRA. Seconds are those of
  01 to 03 with everything that they do besides training, and depend on how many arms ran side by side.
- "without anchor" gives the steps of 01 to 02, "without synthetic" those of 02 to 03: more epochs over the same corpus, at
  the learning rate of 03 ({params["adapter_lr"]:g} instead of {params["lr"]:g}). Loss is on 03's held-out clips, at its end.
- `reference` is espeak-ng itself, the judges' ceiling; `base` is the model before any training.

What each arm changed, and its runs:

{changed}

Made by `{command}`.
""", encoding="utf-8")
    return table, [folder / f"ablation.{end}" for end in ("md", "csv", "png")]


def _describe_seeds(works):
    seeds = list(dict.fromkeys(work.seed for work in works))
    if len(seeds) == 1:
        return (f"One training per arm (seed {seeds[0]}): the intervals are over sentences, not over trainings. Another seed may "
                "move an arm by more than they say.")
    return (f"{len(seeds)} trainings per arm (seeds {', '.join(map(str, seeds))}): the 95 % intervals are over seeds and "
            "sentences, both drawn anew (two-way bootstrap).")


def _describe_calls(work):
    own = ("runs_dir", "adapters_dir", "compare", "sentences", "seed", "choice")  # the same for all, or said elsewhere
    calls = [f"{', '.join(stage[:2] for stage in stages)} with " + ", ".join(
        f"{key}={write_value(value)}" for key, value in overrides.items() if key not in own
    ) for stages, overrides in work.calls]
    runs = ", ".join(f"`{show_path(folder)}`" for folder in work.runs.values())
    return "; then ".join(calls) + f". Runs: {runs or 'none'}. Log: `{show_path(work.log)}`"
