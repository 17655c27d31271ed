"""What the arms of an ablation came to: one table and one figure a language, sentence by sentence, with intervals."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from csm_nb import params as settings
from csm_nb.arms import FROZEN, FULL_LR, JUDGING, REFERENCE, STEPS, TRAINED, Work, write_value
from csm_nb.confusion import share_right
from csm_nb.hub import describe_model
from csm_nb.judge import bootstrap_interval
from csm_nb.languages import get_language
from csm_nb.params import resolve_path, show_path
from csm_nb.plots import COLOURS, GREY, INK, make_figure, set_labels
from csm_nb.provenance import read_json


def compare_arms(rows: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """Return shares and error rates by model (confusion.share_right) over held-out sentences, and the difference in CER.

    The difference to `reference` is paired by sentence, with a 95 % bootstrap interval. Probes are left out: a training
    may have chosen its checkpoint by them.
    """
    rows = rows[~rows.probe.astype(bool)]
    table = share_right(rows).drop(columns=["read", "heard most"])
    rates = rows.pivot_table(index="text", columns="model", values="cer")
    paired = []
    for name in table.model:
        difference = np.array([np.nan])
        if reference in rates and name != reference:
            difference = (rates[name] - rates[reference]).dropna().to_numpy()
        low, high = bootstrap_interval(difference)
        paired.append({"difference": difference.mean(), "difference low": low, "difference high": high})
    return table.join(pd.DataFrame(paired).round(3))


def read_judged(work: Work) -> pd.DataFrame:
    """Return what 04 judged of an arm in its own language: the rows of its model, under the arm's name, base and reference."""
    rows = pd.read_csv(work.runs[JUDGING] / "judged.csv", keep_default_na=False)  # "null" may be what was heard
    own = settings.name_trained(work.calls[0][1], work.language)
    rows = rows[(rows.language == work.language) & rows.model.isin(["reference", "base", own])]
    return rows.assign(model=rows.model.replace({own: work.arm}))


def describe_training(work: Work) -> dict:
    """Return what an arm's training was: parameters trained, steps, compute, seconds, and the held-out loss after 03.

    Compute is the FLOPs of its steps over those that LoRA takes with the profile's own steps (1 is equal).
    """
    made = [read_json(work.runs[stage] / "metrics.json") for stage in STEPS if stage in work.runs]
    steps = sum(metrics["trained_steps"] for metrics in made)
    planned = sum(work.params[stage][key] for stage, key in STEPS.items())
    return {
        "trained parameters (M)": made[-1].get("trained_parameters_m"),
        "steps": steps,
        "compute": round(steps * work.cost / planned, 3),
        "seconds": round(sum(read_json(work.runs[stage] / "run.json")["seconds"] for stage in STEPS if stage in work.runs)),
        "loss": made[-1]["last_loss"],
    }


def build_table(works: list[Work]) -> pd.DataFrame:
    """Return the comparison of one language: reference and base once, then a row an arm, in the order of the arms.

    The column `state` says "done" or "failed: see <log>"; an arm without results has no figures. An arm whose results
    cannot be read has failed too.
    """
    parts, training = {}, {}
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
        parts |= {name: part for name, part in rows.groupby("model", sort=False) if name not in parts}
        training[work.arm] = described
    names = [name for name in ("reference", "base") if name in parts] + [work.arm for work in works]
    table = pd.DataFrame({"model": names})
    if parts:
        trained = pd.DataFrame([{"model": name} | described for name, described in training.items()])
        judged = compare_arms(pd.concat(parts.values()))
        table = table.merge(trained, on="model", how="left").merge(judged, on="model", how="left")
    failed = {work.arm: f"failed: see {show_path(work.log)}" for work in works if work.state != "done"}
    return table.assign(state=[failed.get(name, "done") for name in names])


def draw_ablation(table: pd.DataFrame, title: str = ""):
    """Return a figure of the arms on one axis: CER and share heard right, whiskers the 95 % interval over sentences.

    `table` is what build_table returns. The dashed line is the arm that the others are compared with; models without a
    training of this call (base, reference) are grey; an arm without results says that it failed.
    """
    figure, axes = make_figure(1, 2, 9, 0.42 * len(table) + 1.2, sharey=True)
    panels = (("CER", "CER low", "CER high", "Character error rate: less is better"),
              ("heard right", "low", "high", "Heard as its language: more is better"))
    done = table.state == "done"
    for ax, (name, low, high, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(table.to_dict("records")):
            if not done[place]:
                ax.text(0.015, place, "failed", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=GREY)
                continue
            own = row["model"] not in ("reference", "base")
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
    figure.supxlabel(f"n = {count} held-out sentences; whiskers: 95 % interval over sentences; dashed: {REFERENCE}",
                     fontsize=8.5, color=INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def format_table(table: pd.DataFrame) -> str:
    """Return build_table's frame as a Markdown table for people, columns aligned; rates and intervals in %, "–" for nothing."""
    heads = ["arm", "trained (M)", "steps", "compute", "seconds", "loss", "CER, %", f"against {REFERENCE}, points",
             "heard right, %", "runaways", "sentences"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in table.to_dict("records"):
        failed = "" if row["state"] == "done" else " (failed: see log)"
        lines.append([
            row["model"] + failed, _write_number(row, "trained parameters (M)", "{:.2f}"), _write_number(row, "steps", "{:.0f}"),
            _write_number(row, "compute", "{:.1%}"), _write_number(row, "seconds", "{:.0f}"),
            _write_number(row, "loss", "{:.2f}"),
            _write_interval(row, "CER", "CER low", "CER high", ".1f"),
            _write_interval(row, "difference", "difference low", "difference high", "+.1f"),
            _write_interval(row, "heard right", "low", "high", ".0f"),
            _write_number(row, "runaways", "{:.0f}"), _write_number(row, "sentences", "{:.0f}"),
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
    changed = "\n".join(f"- **{work.arm}** ({work.state}): {_describe_calls(work)}" for work in works)
    (folder / "ablation.md").write_text(f"""# {name}: the workbook with one thing changed at a time

{describe_model(params["base_model"])}

Speech: 01 and 02 train with espeak-ng (synthetic); 03 with {corpus}. Judges: {params["lid_model"]}, {params["asr_model"]}.

{format_table(table)}

![Character error rate and share heard right, by arm](ablation.png)

- **One training each** (seed {params["seed"]}): the intervals are over sentences, not over trainings. Another seed may move
  an arm by more than they say.
- CER, heard right and runaways are over held-out sentences only; the probes are left out, since a training may choose its
  checkpoint by them. Intervals are 95 % bootstraps; "against {REFERENCE}" is paired by sentence, + is worse.
- **Equal compute** is counted in FLOPs: {FROZEN} a position for a frozen weight (2 forward, 2 back to the activations), {TRAINED}
  for a trained one, the adapter's own weights included. A step of "full" costs {cost:.2f} of LoRA's, so it takes 1/{cost:.2f} of
  the steps, at {FULL_LR:g} of the learning rates. Compute is relative to the profile's own steps with LoRA. Seconds are those of
  01 to 03 with everything that they do besides training, and depend on how many arms ran side by side.
- "without anchor" gives the steps of 01 to 02, "without synthetic" those of 02 to 03: more epochs over the same corpus, at
  the learning rate of 03 ({params["adapter_lr"]:g} instead of {params["lr"]:g}). Loss is on 03's held-out clips, at its end.
- `reference` is espeak-ng itself, the judges' ceiling; `base` is the model before any training.

What each arm changed, and its runs:

{changed}

Made by `{command}`.
""", encoding="utf-8")
    return table, [folder / f"ablation.{end}" for end in ("md", "csv", "png")]


def _describe_calls(work):
    own = ("runs_dir", "adapters_dir", "compare", "sentences")  # the same for all, or said by the runs' folders
    calls = [f"{', '.join(stage[:2] for stage in stages)} with " + ", ".join(
        f"{key}={write_value(value)}" for key, value in overrides.items() if key not in own
    ) for stages, overrides in work.calls]
    runs = ", ".join(f"`{show_path(folder)}`" for folder in work.runs.values())
    return "; then ".join(calls) + f". Runs: {runs or 'none'}. Log: `{show_path(work.log)}`"
