"""The report of an ablation: one table, one figure and one page per language."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from csm_nb.ablate.arms import ADAPTER, FROZEN, FULL_LR, GRID, JUDGING, REFERENCE, SYNTHETIC, TRAINED, Training, name_rate
from csm_nb.ablate.compare import UNTRAINED, build_table
from csm_nb.hub import describe_model
from csm_nb.languages import get_language
from csm_nb.paths import resolve_path, show_path
from csm_nb.show.style import COLOURS, GREY, INK, make_figure, set_labels


def draw_ablation(table: pd.DataFrame, title: str = ""):
    """Return a figure of the arms: CER and LID accuracy, whiskers the 95 % interval over seeds and sentences.

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
    trained = table[~table.model.isin(UNTRAINED)]
    figure.supxlabel(f"held-out sentences: {_write_range(trained, 'sentences')}, seeds: {_write_range(trained, 'seeds')}; "
                     f"whiskers: 95 % interval over both; dashed: {REFERENCE}", fontsize=8.5, color=INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _write_range(table, name):
    counts = table[name].dropna().astype(int) if name in table else []
    return " to ".join(map(str, dict.fromkeys([min(counts), max(counts)]))) if len(counts) else "none"


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
    columns = {
        "trained (M)": ("trained parameters (M)", "{:.2f}"), "steps": ("steps", "{:.0f}"), "compute": ("compute", "{:.1%}"),
        "seconds": ("seconds", "{:.0f}"), "loss": ("loss", "{:.2f}"), "CER, %": (("CER", "CER low", "CER high"), ".1f"),
        f"against {REFERENCE}, points": (("difference", "difference low", "difference high"), "+.1f"),
        "heard right, %": (("heard right", "low", "high"), ".0f"), "runaways": ("runaways", "{:.0f}"),
        "sentences": ("sentences", "{:.0f}"), "seeds": ("seeds", "{:.0f}"),
    }  # fmt: skip
    lines = [["arm", *columns], ["---", *["---:"] * len(columns)]]
    for row in table.to_dict("records"):
        failed = "" if row["state"] == "done" else f" ({row['state'].partition(':')[0]})"
        best = " (best rate)" if row["best rate"] else ""
        cells = [_write_number(row, name, form) if isinstance(name, str) else _write_interval(row, *name, form)
                 for name, form in columns.values()]
        lines.append([row["model"] + failed + best, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
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


def write_report(trainings: list[Training], command: str) -> tuple[pd.DataFrame, list[Path]]:
    """Write ablation.md, .csv and .png of one language's arms; return (table, their paths).

    They lie in <runs_dir>/ablate/<language>/ and are written anew by each call.
    """
    language, stages = trainings[0].language, trainings[0].params
    params = stages[ADAPTER] | stages[JUDGING]
    folder = resolve_path(params["runs_dir"]) / "ablate" / language
    folder.mkdir(parents=True, exist_ok=True)
    table = build_table(trainings)
    table.to_csv(folder / "ablation.csv", index=False)
    name, base, cost = get_language(language).name, Path(params["base_model"]).name, max(part.cost for part in trainings)
    draw_ablation(table, f"{name}, {base}: arms at equal compute").savefig(folder / "ablation.png", dpi=150)
    corpus = params["corpus"] or "an espeak-ng voice that no stage before has used, standing in for a corpus (synthetic)"
    changed = "\n".join(f"- **{training.arm}**, seed {training.seed} ({training.state}): {_describe_changes(training)}"
                        for training in trainings)
    (folder / "ablation.md").write_text(f"""# {name}: the workbook with one thing changed at a time

{describe_model(params["base_model"])}

Speech: 01 and 02 train with espeak-ng (synthetic); 03 with {corpus}. Judges: {params["lid_model"]}, {params["asr_model"]}.

{format_table(table)}

![Character error rate and LID accuracy, by arm](ablation.png)

- **{_describe_seeds(trainings)}**
- Every stage keeps its last checkpoint: one that is chosen would compare the draws of the choice with each other.
- CER (of a clip, at most 100 %), heard right (LID accuracy) and runaways are over held-out sentences only, without probes.
  "Against {REFERENCE}" is paired by seed and sentence, + is worse.
- **Learning rates**: {REFERENCE} and full have {", ".join(f"{factor:g}" for factor in sorted(GRID))} times the rates of their own
  (full {FULL_LR:g} of LoRA's), the grid with one seed; "best rate" has the lowest held-out loss of that seed, and the
  two are compared over the seeds that both have. {describe_rates(table)}
- **Data**: "data 1/8" has an eighth of the clips of 02 and 03, and as many steps as the whole, which is {REFERENCE}.
- **Equal compute** is counted in FLOPs: {FROZEN} per position for a frozen weight (2 forward, 2 back to the activations),
  {TRAINED} for a trained one, the adapter's own weights included. A step of "full" costs {cost:.2f} of LoRA's, so it takes
  1/{cost:.2f} of the steps. Compute is relative to the profile's own steps with LoRA. Seconds are those of 01 to 03 with
  everything that they do besides training, and depend on how many arms ran side by side.
- "without anchor" gives the steps of 01 to 02, "without synthetic" those of 02 to 03: more epochs over the same corpus, at
  the learning rate of 03 ({stages[ADAPTER]["recipe"]["lr"]:g} instead of {stages[SYNTHETIC]["recipe"]["lr"]:g}). Loss is on
  03's held-out clips, at its end.
- `reference` is espeak-ng itself, the judges' ceiling; `base` is the model before any training.

What each arm changed, and its runs:

{changed}

Made by `{command}`.
""", encoding="utf-8")
    return table, [folder / f"ablation.{end}" for end in ("md", "csv", "png")]


def _describe_seeds(trainings):
    seeds = list(dict.fromkeys(training.seed for training in trainings))
    if len(seeds) == 1:
        return (f"One training per arm (seed {seeds[0]}): the intervals are over sentences, not over trainings. Another seed may "
                "move an arm by more than they say.")
    return (f"{len(seeds)} trainings per arm (seeds {', '.join(map(str, seeds))}), one at the other learning rates (seed "
            f"{seeds[0]}): the 95 % intervals are over seeds and sentences, both drawn anew (two-way bootstrap).")


def _describe_changes(training):
    """Say what an arm sets otherwise than the workbook would, stage by stage, and where its runs are."""
    own = ("runs_dir", "adapters_dir", "compare", "seed", "choice", "init_adapter", "recipe")  # of every arm, or told by stages
    parts = []
    for stage, task in training.tasks.items():
        before, params = (found | found.get("recipe", {}) for found in (training.params[stage], task.params))
        changed = [f"{key}={value}" for key, value in params.items() if key not in own and value != before[key]]
        run = f" (`{show_path(task.folder)}`)" if task.folder else " (no run)"
        parts.append(stage[:2] + (" with " if changed else "") + ", ".join(changed) + run)
    return "; ".join(parts)
