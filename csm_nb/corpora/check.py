"""Which clips can be used: bad ones are set aside with their reason."""

from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.manifest import CorpusError

TELEPHONE = 8000  # Hz; a sample rate up to which sounds are missing, not only brilliance
CLIPPING, CLIPPED_SHARE = 0.5, 0.005  # a clip is clipped where more of its samples than this lie at its peak
SILENCE = 1e-3  # peak below which a clip counts as silent (-60 dBFS)


def check_clips(rows, min_seconds: float = 0.3, max_seconds: float = 30.0, need_text: bool = True,
                need_one: bool = True) -> tuple[list, list]:
    """Return (good, set_aside): rows with their true `duration` in seconds, and rows with the `reason` against them.

    Reasons are missing or unreadable files, a text that can not be decoded, no text or none with a letter or digit in it
    (with `need_text`), silence, too short and too long. One bad clip stops nothing. Raises CorpusError, with the first reasons,
    when no clip is good (and `need_one`).
    """
    good, set_aside = [], []
    for row in rows:
        reason, duration = _find_fault(row, min_seconds, max_seconds, need_text)
        (set_aside.append(row | {"reason": reason}) if reason else good.append(row | {"duration": duration}))
    if need_one and not good:
        reasons = "; ".join(f"{Path(row['audio_path']).name}: {row['reason']}" for row in set_aside[:3])
        raise CorpusError(f"none of {len(set_aside)} clips can be used: {reasons or 'the corpus is empty'}")
    return good, set_aside


def check_enough(rows, min_seconds: float = 0.3, max_seconds: float = 30.0) -> None:
    """Raise CorpusError where no clip could be held out of `rows`: only one can be used, or all say the same in one voice.

    Only the files' headers are read, and no more of them than it takes, so that it can be asked before anything starts.
    """
    first, reasons = None, []
    for row in rows:
        reason = row.get("text_fault") or ("" if any(map(str.isalnum, row["text"])) else "no text")
        try:
            seconds = 0.0 if reason else soundfile.info(row["audio_path"]).duration
            if not reason and not min_seconds <= seconds <= max_seconds:
                reason = f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s"
        except (soundfile.LibsndfileError, OSError) as error:
            reason = str(error)
        if reason:
            reasons.append(f"{Path(row['audio_path']).name}: {reason}")
            continue
        said = row["text"].lower(), row["speaker_id"]
        if first not in (None, said):
            return
        first = said
    what = "none can be used" if first is None else f"those that can be used all say {first[0]!r:.60} in one voice"
    raise CorpusError(f"of the {len(rows)} clips that are drawn {what}, and one has to be held out that says something else, "
                      f"or in another voice{': ' * bool(reasons)}{'; '.join(reasons[:3])}")


def list_remarks(rows, set_aside) -> pd.DataFrame:
    """Return what a reader has to know of clips (check_clips): audio_path, used or not, and the reason or remark.

    Remarks on clips that are used: a sample rate that leaves nothing above 4 kHz, several channels, a level that was clipped.
    """
    bad = [{"audio_path": row["audio_path"], "used": False, "reason": row["reason"]} for row in set_aside]
    odd = [{"audio_path": row["audio_path"], "used": True, "reason": "; ".join(found)} for row in rows
           if (found := _find_flaws(row["audio_path"]))]
    return pd.DataFrame(bad + odd, columns=["audio_path", "used", "reason"])


def _find_flaws(path):
    info, wav, flaws = soundfile.info(path), read_audio(path), []
    if info.samplerate <= TELEPHONE:
        flaws.append(f"{info.samplerate} Hz: nothing above {info.samplerate / 2000:g} kHz")
    if info.channels > 1:
        flaws.append(f"{info.channels} channels, averaged")
    share = np.mean(np.abs(wav) >= 0.99 * max(np.abs(wav).max(), CLIPPING))
    if share > CLIPPED_SHARE:
        flaws.append(f"clipped: {share:.1%} of its samples at full scale")
    return flaws


def _find_fault(row, min_seconds, max_seconds, need_text):
    if row.get("text_fault"):
        return row["text_fault"], 0.0
    if need_text and not any(map(str.isalnum, row["text"])):
        return f"nothing to say in its text {row['text']!r}" if row["text"].strip() else "no text", 0.0
    try:
        wav = read_audio(row["audio_path"])
    except (AudioError, OSError) as error:
        return str(error).removeprefix(f"{row['audio_path']}: "), 0.0
    seconds = len(wav) / SAMPLE_RATE
    if np.abs(wav).max() < SILENCE:
        return "silent", seconds
    if not min_seconds <= seconds <= max_seconds:
        return f"{seconds:.2f} s long; allowed are {min_seconds:g} to {max_seconds:g} s", seconds
    return "", round(seconds, 3)
