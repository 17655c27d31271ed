"""How every figure looks: colours, axes, notes."""

import matplotlib.pyplot as plt
from IPython import get_ipython
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK, GREY, LIGHT = "#22303c", "#8a94a0", "#d7dce1"
COLOURS = ("#2f6db5", "#d9742b", "#3a8f5c", "#8e5aa8", "#b5485d", "#7a6a4f")


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


def shorten(text: str, length: int) -> str:
    """Return text cut to `length` characters, with an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
