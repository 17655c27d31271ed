"""Figures of a sound: spectrograms, F0, contours of a word."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from csm_nb.audio import SAMPLE_RATE
from csm_nb.prosody.f0 import ProsodyError, to_semitones, track_f0
from csm_nb.show.style import COLOURS, GREY, INK, _hand_over, make_figure, set_labels, shorten, style_axes, write_note

DYNAMICS = 70  # dB below the loudest point that a spectrogram shows
HIGHEST = 8000  # Hz, top of a spectrogram


# Sound


def compute_spectrogram(wav, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return levels in dB, shape (frequencies up to HIGHEST, frames of 5 ms), of windows of 25 ms: harmonics show."""
    size, length = 2048, sample_rate // 40
    levels = torch.stft(
        torch.as_tensor(np.asarray(wav, np.float32)), size, hop_length=sample_rate // 200, win_length=length,
        window=torch.hann_window(length), pad_mode="constant", return_complex=True,
    )  # fmt: skip
    power = levels.abs().square()
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
    """Draw the F0 of a coded clip (clips.CodedClip) and of one version of it, about the speaker's median."""
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
    """Return a figure of the F0 of coded clips (clips.CodedClip), one panel per clip: original and `condition`."""
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
