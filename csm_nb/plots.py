"""Every figure of the notebooks. A function draws on the axes it is given, or makes a figure and returns it."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib_inline.backend_inline import set_matplotlib_formats

from csm_nb.audio import SAMPLE_RATE
from csm_nb.judge import bootstrap_interval
from csm_nb.prosody import ProsodyError, to_semitones, track_f0

INK, GREY, LIGHT = "#22303c", "#8a94a0", "#d7dce1"
COLOURS = ("#2f6db5", "#d9742b", "#3a8f5c", "#8e5aa8", "#b5485d", "#7a6a4f")
PASS = "#3a8f5c"
DYNAMICS = 70  # dB below the loudest point that a spectrogram shows
HIGHEST = 8000  # Hz, top of a spectrogram


def make_figure(rows: int = 1, columns: int = 1, width: float = 7, height: float = 3.2, **options):
    """Return (figure, axes as a flat list) in the workbook's style; the figure shows once, where it is returned."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), dpi=100, layout="constrained", squeeze=False, **options
    )
    style_axes(axes.flat)
    return _hand_over(figure), list(axes.flat)


def style_axes(axes) -> None:
    """Give axes the workbook's style: two spines, a light grid behind the data, small ticks."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(colors=INK, labelsize=9, length=3, color=GREY)
        ax.grid(True, color=LIGHT, linewidth=0.6)
        ax.set_axisbelow(True)


def _hand_over(figure):
    """`figure` out of pyplot's hands, else it shows twice; in a notebook as JPEG, a quarter of a spectrogram's PNG."""
    plt.close(figure)
    if get_ipython() is not None:
        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 90})
    return figure


def set_labels(ax, title: str = "", x: str = "", y: str = "") -> None:
    """Write an axes' title (left) and axis labels in the workbook's style."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, weight="bold")
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def write_note(ax, text: str) -> None:
    """Write in the middle of empty axes why there is nothing to see."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, fontsize=9, color=GREY, wrap=True)


# Sound


def compute_spectrogram(wav, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return levels in dB, shape (frequencies up to HIGHEST, frames of 5 ms), of windows of 25 ms: harmonics show."""
    size, hop = 2048, sample_rate // 200
    window = torch.zeros(size)
    length = sample_rate // 40
    window[(size - length) // 2 : (size + length) // 2] = torch.hann_window(length)
    samples = torch.nn.functional.pad(torch.as_tensor(np.asarray(wav, np.float32)), (size // 2, size // 2))
    power = torch.stft(samples, size, hop, window=window, center=False, return_complex=True).abs().square()
    return 10 * torch.log10(power.clamp(min=1e-12))[: HIGHEST * size // sample_rate].numpy()


def draw_spectrogram(levels, ax, loudest: float):
    """Draw one spectrogram (see compute_spectrogram) and return its image; `loudest` in dB is the top of the scale."""
    ax.grid(False)
    return ax.imshow(
        levels, origin="lower", aspect="auto", cmap="magma", vmin=loudest - DYNAMICS, vmax=loudest,
        extent=(0, levels.shape[1] / 200, 0, HIGHEST / 1000), interpolation="antialiased",
    )  # fmt: skip


def draw_spectrograms(clips, title: str = "", columns: int = 1, sample_rate: int = SAMPLE_RATE):
    """Return a figure of clips [(label, wav), ...] below each other, or `columns` side by side, on one scale of level.

    Level (dB below the loudest point of them all), frequency and time share their scales, so that two clips can be
    compared by eye. A clip without samples has an empty panel.
    """
    clips = [(label, np.asarray(wav, np.float32)) for label, wav in clips]
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    figure, axes = make_figure(
        rows, columns, 8.5 if columns == 1 else min(5.5 * columns, 12.5), 2.0 * rows + 0.6, sharex=True, sharey=True
    )
    levels = [compute_spectrogram(wav, sample_rate) if len(wav) else np.full((1, 1), -200.0) for _, wav in clips]
    loudest = max(level.max() for level in levels)
    longest = max([len(wav) / sample_rate for _, wav in clips] + [0.1])
    for ax, (label, wav), level in zip(axes, clips, levels, strict=False):
        image = draw_spectrogram(level, ax, loudest)
        set_labels(ax, label if len(wav) else f"{label}: no sound")
        ax.set_xlim(0, longest)
    for ax in axes[len(clips) :]:
        ax.set_visible(False)
    for i in range(len(clips)):
        if i % columns == 0:
            axes[i].set_ylabel("frequency (kHz)", fontsize=9, color=INK)
        if i + columns >= len(clips):
            axes[i].set_xlabel("time (s)", fontsize=9, color=INK)
            axes[i].tick_params(labelbottom=True)
    bar = figure.colorbar(image, ax=axes[: len(clips)], pad=0.01, aspect=30)
    bar.set_ticks(loudest - np.arange(0, DYNAMICS + 1, 20), labels=[f"{-d}" for d in range(0, DYNAMICS + 1, 20)])
    bar.set_label("level (dB)", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def draw_f0(track, ax, reference: float | None = None, colour: str = INK, label: str = "", **options) -> None:
    """Draw an F0Track in semitones about `reference` (Hz; its own median without one), broken where unvoiced."""
    ax.plot(track.times, to_semitones(track.f0, reference), color=colour, label=label, **options)


def draw_f0_pair(clip, condition: str, ax) -> None:
    """Draw the F0 of a coded clip (fidelity.CodedClip) and of one version of it, about the speaker's median."""
    try:
        before = track_f0(clip.original, pitch_range=clip.pitch_range)
        after = track_f0(clip.versions[condition], pitch_range=clip.pitch_range)
    except ProsodyError as error:
        write_note(ax, str(error))
        return
    draw_f0(before, ax, clip.median_f0, GREY, "original", linewidth=4.5, alpha=0.6, solid_capstyle="round")
    draw_f0(after, ax, clip.median_f0, COLOURS[1], condition, linewidth=1.6)
    if not (before.voiced.any() or after.voiced.any()):
        write_note(ax, "no voiced frame")
    ax.set_xlim(0, len(clip.original) / SAMPLE_RATE)


def draw_contours(clips, condition: str, columns: int = 3):
    """Return a figure of the F0 of coded clips (fidelity.CodedClip), a panel each: original and `condition`."""
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    figure, axes = make_figure(rows, columns, max(5, 3.8 * columns), 2.1 * rows + 0.5, sharey=True)
    for i, (ax, clip) in enumerate(zip(axes, clips, strict=False)):
        draw_f0_pair(clip, condition, ax)
        set_labels(ax, shorten(clip.title, 36), "time (s)" if i + columns >= len(clips) else "")
        if i % columns == 0:
            ax.set_ylabel("F0 (semitones about\nthe speaker's median)", fontsize=9, color=INK)
    for ax in axes[len(clips) :]:
        ax.set_visible(False)
    handles = [plt.Line2D([], [], color=c, linewidth=w) for c, w in ((GREY, 4.5), (COLOURS[1], 1.6))]
    figure.legend(handles, ["original", condition], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def draw_clip(clip, condition: str, title: str = ""):
    """Return a figure of one coded clip: F0 overlaid above, HNR below it, spectrograms of original and `condition` last.

    The clip's windows of stød, where it has any, are shaded in all of them.
    """
    figure = _hand_over(plt.figure(figsize=(9.5, 6.6), dpi=100, layout="constrained"))
    axes = figure.subplot_mosaic([["f0", "f0"], ["hnr", "hnr"], ["original", "decoded"]], height_ratios=[1.1, 0.7, 1.2])
    style_axes(axes.values())
    draw_f0_pair(clip, condition, axes["f0"])
    set_labels(axes["f0"], "melody", "", "F0 (semitones about\nthe speaker's median)")
    draw_hnr_pair(clip, condition, axes["hnr"])
    set_labels(axes["hnr"], "harmonics-to-noise ratio", "time (s)", "HNR (dB)")
    if axes["f0"].has_data():
        figure.legend(*axes["f0"].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    levels = {"original": compute_spectrogram(clip.original), "decoded": compute_spectrogram(clip.versions[condition])}
    loudest = max(level.max() for level in levels.values())
    for name, level in levels.items():
        draw_spectrogram(level, axes[name], loudest)
        set_labels(axes[name], "original" if name == "original" else condition, "time (s)", "frequency (kHz)")
    for start, end, stod in clip.row.get("windows") or []:
        for name, ax in axes.items():
            if stod and name in ("f0", "hnr"):
                ax.axvspan(start, end, color=COLOURS[3], alpha=0.13, linewidth=0)
            elif stod:  # on a dark ground edges are seen better than a shade
                ax.vlines([start, end], 0, HIGHEST / 1000, color="white", linewidth=0.9, linestyle="--")
    figure.suptitle(title or clip.title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def draw_hnr_pair(clip, condition: str, ax) -> None:
    """Draw the harmonics-to-noise ratio (dB, Praat) of a coded clip and of one version of it; a gap where unvoiced."""
    for wav, style in ((clip.original, {"color": GREY, "linewidth": 4.5, "alpha": 0.6}),
                       (clip.versions[condition], {"color": COLOURS[1], "linewidth": 1.6})):
        try:
            track = track_f0(wav, pitch_range=clip.pitch_range)
        except ProsodyError as error:
            write_note(ax, str(error))
            return
        ax.plot(track.times, track.hnr, **style)
    ax.set_xlim(0, len(clip.original) / SAMPLE_RATE)


def shorten(text: str, length: int) -> str:
    """Return text cut to `length` characters, with an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# Results


def draw_sweep(evidence):
    """Return a figure, a panel per criterion: figures with 95 % intervals at each number of codebooks, then the controls.

    `evidence` is a list of fidelity.Evidence; of those behind the first, only what was measured has panels. The shaded side
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
    """Draw one criterion's measure of one fidelity.Evidence at each number of codebooks, then its controls."""
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


def draw_losses(history):
    """Return a figure of a training's losses by step: thin for training, dots for the held-out sentences.

    `history` is what train.train_model returns, or {name: history} to compare several trainings on one scale.
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
    set_labels(ax, "Loss", "step", "loss (nats a code)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.has_data():
        ax.legend(frameon=False, fontsize=9, ncols=len(histories))
    else:
        write_note(ax, "no loss was logged")
    return figure


def draw_checkpoints(table):
    """Return a figure of choose.choose_checkpoint's table by step: the held-out loss, then what the judges heard.

    Points are checkpoints, whiskers 95 % intervals over clips; the dashed line is the chosen one, the dotted one what the
    loss would have chosen.
    """
    figure, axes = make_figure(1, 2, 9.5, 3.4, width_ratios=(2, 3))
    table = table.sort_values("step")
    measured = table[table["held-out loss"].notna()]
    axes[0].plot(measured.step, measured["held-out loss"], color=GREY, marker="o", markersize=6, linewidth=1.4)
    if measured.empty:
        write_note(axes[0], "no loss was logged")
    set_labels(axes[0], "Held-out loss", "step", "loss (nats a code)")
    first, last = table.step.min(), table.step.max()
    span = max(1, last - first)
    for place, (name, low, high) in enumerate((("CER", "CER low", "CER high"), ("heard right", "low", "high"))):
        figures = table[[name, low, high]].set_axis(["figure", "low", "high"], axis=1)
        # apart, or equal whiskers cover each other
        draw_figures(figures, table.step + (0.024 * place - 0.012) * span, axes[1], COLOURS[(1, 0)[place]])
        axes[1].plot([], [], color=COLOURS[(1, 0)[place]], marker="o", label=name)
    axes[1].plot(table.step, table.runaways, color=COLOURS[4], marker="s", markersize=5, linewidth=1.4, label="runaways")
    axes[1].set_ylim(-0.04, 1.04)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    set_labels(axes[1], "What the judges heard", "step", "share")
    for ax in axes:
        for name, style in (("chosen", {"color": PASS, "linestyle": "--"}), ("by loss", {"color": GREY, "linestyle": ":"})):
            for step in table.step[table[name]]:
                ax.axvline(step, linewidth=1.4, zorder=0, label=f"{name}: {step}" if ax is axes[1] else "", **style)
        ax.set_xticks(table.step)
        ax.set_xlim(first - 0.1 * span, last + 0.1 * span)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


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
    """Return a bar chart of the mean CER by model, a panel per language, whiskers the 95 % bootstrap interval over clips.

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
