"""Figures of results: sweeps, criteria, losses, checkpoints, confusions, error rates."""

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from csm_nb.judge.intervals import bootstrap_interval
from csm_nb.show.style import COLOURS, GREY, INK, LIGHT, make_figure, set_labels, write_note

PASS = "#3a8f5c"
LOSS = "backbone + depth loss (nats)"  # the sum of two means: over frames, and over the codes that the depth decoder learns


# Results


def draw_sweep(evidence):
    """Return a figure with one panel per criterion: figures with 95 % intervals at each number of codebooks, then the controls.

    `evidence` is a list of verdict.Evidence; of those behind the first, only what was measured has panels. The shaded side
    of the dashed line passes; where no line is drawn, nothing could be measured.
    """
    shown = [*evidence[:1], *(part for part in evidence[1:] if part.summary.measured.any())]
    panels = [(part, criterion) for part in shown for criterion in part.criteria]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = make_figure(rows, columns, 5.8 * columns, 2.7 * rows)
    for ax, (part, criterion) in zip(axes, panels, strict=False):
        draw_criterion(part, criterion, ax)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[len(panels) - columns : len(panels)]:
        ax.set_xlabel("number of codebooks, and controls", fontsize=9, color=INK)
    return figure


def draw_criterion(part, criterion, ax) -> None:
    """Draw one criterion's measure of one verdict.Evidence at each number of codebooks, then its controls."""
    conditions = [c for c in part.summary.condition.unique() if c in part.controls or "codebook" in c]
    swept, controls = [c for c in conditions if c not in part.controls], [c for c in conditions if c in part.controls]
    places = [*range(len(swept)), *(len(swept) + 0.4 + i for i in range(len(controls)))]
    figures = part.summary[part.summary.measure == criterion.measure].set_index("condition")
    for group, colour, line in ((swept, COLOURS[0], "-"), (controls, GREY, "")):
        if group:
            draw_figures(figures.loc[group], [places[(swept + controls).index(c)] for c in group], ax, colour, line)
    low, high = ax.get_ylim()
    low = min(0, low) if criterion.measure != "f0_correlation" else low
    low, high = min(low, criterion.limit), max(high, criterion.limit * 1.15)
    passing = (criterion.limit, high) if criterion.sign == ">=" else (low, criterion.limit)
    ax.axhspan(*passing, color=PASS, alpha=0.1, linewidth=0)
    ax.axhline(criterion.limit, color=PASS, linestyle="--", linewidth=1)
    ax.set_ylim(low, high)
    ax.set_xticks(places, [*(c.split()[0] for c in swept), *(c.replace(" ", "\n") for c in controls)])
    ax.axvline(len(swept) - 0.3, color=LIGHT)
    ax.grid(False, axis="x")
    wanted = str(criterion).replace(">=", "≥").replace("<=", "≤")
    set_labels(ax, f"{criterion.label}, wanted {wanted}" + (f"\n({part.name})" if part.name != "clips" else ""))


def draw_figures(part, x, ax, colour: str, line: str = "-") -> None:
    """Draw figures with whiskers (columns figure, low, high) at positions `x`; what was not measured is left out."""
    figure, low, high = (part[name].to_numpy(float) for name in ("figure", "low", "high"))
    x, measured = np.asarray(x, float), np.isfinite(figure)
    whiskers = np.nan_to_num(np.stack([figure - low, high - figure]))[:, measured].clip(min=0)
    ax.errorbar(
        x[measured], figure[measured], yerr=whiskers, color=colour, marker="o", markersize=6, capsize=4, linewidth=1.4,
        linestyle=line or "none",
    )  # fmt: skip


def draw_hours(hours):
    """Return a small figure of hours per voice, the one with the most first, and no names; the line is an equal share."""
    figure, (ax,) = make_figure(width=5, height=2.2)
    hours = np.sort(np.asarray(hours, float))[::-1]
    unit, factor = ("hours", 1) if hours.max() >= 1 else ("minutes", 60)
    ax.bar(np.arange(1, len(hours) + 1), factor * hours, width=0.8 if len(hours) < 60 else 1.0, color=COLOURS[0])
    ax.axhline(factor * hours.mean(), color=GREY, linestyle="--", linewidth=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    set_labels(ax, f"{unit.capitalize()} per voice", "voices, by how much they say", unit)
    return figure


def draw_losses(history):
    """Return a figure of a training's losses by step: thin for training, dots for the held-out sentences.

    `history` is what trainer.train_model returns, or {name: history} to compare several trainings on one scale.
    """
    histories = history if isinstance(history, dict) else {"": history}
    figure, (ax,) = make_figure(width=7, height=3.4)
    for colour, (name, rows) in zip(COLOURS, histories.items(), strict=False):
        for key, label, style in (
            ("loss", "training", {"linewidth": 1.2, "alpha": 0.55}),
            ("eval_loss", "held out", {"linewidth": 1.8, "marker": "o", "markersize": 5}),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, label=f"{name} {label}".strip(), **style)
    set_labels(ax, "Loss", "step", LOSS)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.has_data():
        ax.legend(frameon=False, fontsize=9, ncols=len(histories))
    else:
        write_note(ax, "no loss was logged")
    return figure


def draw_checkpoints(table):
    """Return a figure of select.select_checkpoint's table by step: the held-out loss, and what the judges heard if asked.

    Points are checkpoints, whiskers 95 % intervals over sentences; the dashed line is the chosen one, the dotted one what
    the loss alone would have chosen.
    """
    heard = "score" in table
    figure, axes = make_figure(1, 1 + heard, 9.5 if heard else 5, 3.4, width_ratios=(2, 3) if heard else None)
    table = table.sort_values("step")
    axes[0].plot(table.step, table["held-out loss"], color=GREY, marker="o", markersize=6, linewidth=1.4)
    set_labels(axes[0], "Held-out loss", "step", LOSS)
    first, last = table.step.min(), table.step.max()
    span = max(1, last - first)
    if heard:
        draw_heard(table, axes[1], 0.012 * span)
    for ax in axes:
        for name, style in (("chosen", {"color": PASS, "linestyle": "--"}), ("by loss", {"color": GREY, "linestyle": ":"})):
            for step in table.step[table[name]]:
                ax.axvline(step, linewidth=1.4, zorder=0, label=f"{name}: {step}" if ax is axes[-1] else "", **style)
        ax.set_xticks(table.step)
        ax.set_xlim(first - 0.1 * span, last + 0.1 * span)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def draw_heard(table, ax, shift: float) -> None:
    """Draw CER, LID accuracy and runaways by step; the first two `shift` steps apart, or equal whiskers hide each other."""
    for side, colour, (name, low, high) in ((1, COLOURS[1], ("CER", "CER low", "CER high")),
                                            (-1, COLOURS[0], ("heard right", "low", "high"))):
        figures = table[[name, low, high]].set_axis(["figure", "low", "high"], axis=1)
        draw_figures(figures, table.step - side * shift, ax, colour)
        ax.plot([], [], color=colour, marker="o", label=name)
    ax.plot(table.step, table.runaways, color=COLOURS[4], marker="s", markersize=5, linewidth=1.4, label="runaways")
    ax.set_ylim(-0.04, 1.04)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    set_labels(ax, "What the judges heard", "step", "share")


def draw_confusions(matrices):
    """Return heat maps of counts side by side, for [(title, DataFrame of counts), ...]; rows are the truth.

    Each cell has its count and its share of the row, which is its colour: one scale for all, 0 to 100 %. The axes are
    labelled with the names of the frame's index and columns. An empty row has no share.
    """
    sizes = [max(1.2, 0.75 * table.shape[1]) for _, table in matrices]
    height = 1.5 + 0.62 * max(len(table) for _, table in matrices)
    figure, axes = make_figure(1, len(matrices), sum(sizes) + 1.4 * len(matrices), height, width_ratios=sizes)
    for ax, (title, table) in zip(axes, matrices, strict=True):
        counts = table.to_numpy(float)
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), count in np.ndenumerate(counts):
            text = f"{count:.0f}\n{shares[i, j]:.0%}" if totals[i] else "0\n–"
            colour = "white" if shares[i, j] > 0.55 else INK if count else GREY
            ax.text(j, i, text, ha="center", va="center", fontsize=9, color=colour, linespacing=1.1)
        ax.set_xticks(range(table.shape[1]), table.columns)
        ax.set_yticks(range(len(table)), table.index)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        set_labels(ax, title, table.columns.name or "heard as", table.index.name or "read as")
    return figure


def draw_error_rates(rows):
    """Return a bar chart of the mean CER by model, one panel per language, whiskers the 95 % bootstrap interval over clips.

    `rows` has the columns model, language and cer (1 is 100 %, and a clip counts as no more); bars are in the order in
    which the models come.
    """
    rows = rows[np.isfinite(rows.cer)]
    languages = list(dict.fromkeys(rows.language))
    parts = {code: rows[rows.language == code] for code in languages}
    counts = [part.model.nunique() for part in parts.values()]
    figure, axes = make_figure(
        max(1, len(languages)), 1, 7.5, 0.42 * sum(counts) + 0.4 * len(counts) + 0.8, sharex=True,
        height_ratios=counts or None,
    )  # fmt: skip
    for ax, (code, part) in zip(axes, parts.items(), strict=False):
        for place, (model, clips) in enumerate(part.groupby("model", sort=False)):
            cer = clips.cer.to_numpy(float).clip(max=1)
            low, high = bootstrap_interval(cer)
            colour = GREY if model == "reference" else COLOURS[1] if model == "base" else COLOURS[0]
            ax.barh(place, cer.mean(), color=colour, height=0.66, alpha=0.85)
            whiskers = np.nan_to_num([[cer.mean() - low], [high - cer.mean()]]).clip(min=0)
            ax.errorbar(cer.mean(), place, xerr=whiskers, color=INK, capsize=3, linewidth=1.2)
            end = max(cer.mean(), np.nan_to_num(high))
            ax.annotate(f"{cer.mean():.0%} (n = {len(cer)})", (end, place), (6, 0), textcoords="offset points",
                        va="center", fontsize=8.5, color=INK)
        ax.set_yticks(range(part.model.nunique()), part.model.unique())
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        set_labels(ax, code)
    axes[-1].set_xlabel("character error rate, with 95 % interval", fontsize=9, color=INK)
    axes[-1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[-1].set_xlim(0, axes[-1].get_xlim()[1] * 1.18)
    return figure
