"""Players of clips, inside the page."""

import base64
import io
from html import escape

import numpy as np
import soundfile
from IPython.display import HTML

from csm_nb.audio import SAMPLE_RATE, AudioError, check_wav, resample


def player(wav, label: str = "", sample_rate: int = SAMPLE_RATE) -> HTML:
    """Return an audio player for a notebook, the sound inside as MP3 at its true level, so that levels can be compared.

    IPython.display.Audio scales every clip to its peak and embeds PCM, eleven times the size. What has no sound (an
    empty array, or NaN from a model that diverged) is shown as that. Samples beyond -1 to 1 are clipped; it says so.
    """
    return HTML(_player_html(label, wav, sample_rate))


def players(clips, columns: int = 2, sample_rate: int = SAMPLE_RATE) -> HTML:
    """Return players side by side, `columns` in a row where there is room, for clips [(label, wav), ...] at their true levels."""
    cells = "".join(_player_html(label, wav, sample_rate) for label, wav in clips)
    style = "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:10px 16px"  # one below 640 px
    return HTML(f'<div style="{style};max-width:{columns * 340}px">{cells}</div>')


def _player_html(label, wav, sample_rate):
    note = ""
    try:
        wav = check_wav(wav, "no sound")
        peak = np.abs(wav).max()
        note = f" (clipped: peak {peak:.2f})" if peak > 1 else ""
        buffer = io.BytesIO()
        soundfile.write(buffer, np.clip(resample(wav, sample_rate, SAMPLE_RATE), -1, 1), SAMPLE_RATE, format="MP3")
        source = f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        sound = f'<audio controls preload="metadata" src="{source}" style="width:100%;height:36px"></audio>'
    except AudioError as error:
        sound = f'<div style="opacity:.7">{escape(str(error))}</div>'
    label = f'<div style="font-size:13px;margin-bottom:2px">{escape(str(label) + note)}</div>'
    return f"<div>{label}{sound}</div>"
