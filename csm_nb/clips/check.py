"""Which clips can be used: bad ones are set aside with their reason."""

import re
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.clips import faults
from csm_nb.clips.level import find_kept, measure_loudness
from csm_nb.corpora.cut import measure_seconds
from csm_nb.languages import LANGUAGES
from csm_nb.manifest import CorpusError
from csm_nb.text.normalise import normalise_text
from csm_nb.text.sentences import spell_alphabet


def check_clips(rows, min_seconds: float = 0.3, max_seconds: float = 30.0, need_text: bool = True,
                need_one: bool = True, keep_repeats: bool = True, margin: float = 0.0) -> tuple[list, list]:
    """Return (good, set_aside): rows with their true `duration` in seconds, and rows with `kind` and `reason` against them.

    Kinds are "unreadable" (also a text that can not be decoded), "silent", "too short", "too long"; and, of clips to learn
    from (`need_text`), "no text", "foreign letters", "other language", "pace" (letters per second), "clipped", "cut short" and
    "same audio". What is odd and leaves a clip of use is in its `remarks`, {kind: sentence}: "band-limited", "channels",
    "clipped", "codes alone", and a text that its speaker said before, "same text", which sets it aside where not
    `keep_repeats`. With a `margin` in s, silence beyond it at the ends counts for nothing, and `kept` of a row says what is
    left, in s, for level.level_clips to cut. Each file is read once, and one bad clip stops nothing. Raises CorpusError, with
    the first reasons, when no clip is good (and `need_one`).
    """
    good, set_aside, audio, said = [], [], {}, {}
    for row in rows:
        fault, duration, remarks, kept = _look_at(row, min_seconds, max_seconds, need_text, audio, margin)
        if need_text and not fault:
            key = row["speaker_id"], row["language"], normalise_text(row["text"])
            if key in said:
                repeat = "same text", f"its speaker says the same text in {_name(said[key])}"
                fault, remarks = (None, remarks | dict([repeat])) if keep_repeats else (repeat, remarks)
            said.setdefault(key, row)
        if fault:
            set_aside.append(row | {"kind": fault[0], "reason": fault[1]})
        else:
            good.append(row | {"duration": duration} | kept | ({"remarks": remarks} if remarks else {}))
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
            seconds = 0.0 if reason else measure_seconds(row)
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
    """Return what a reader has to know of clips (check_clips): audio_path, used or not, kind, and the reason or remark."""
    bad = [(row["audio_path"], False, row.get("kind", ""), row["reason"]) for row in set_aside]
    odd = [(row["audio_path"], True, ", ".join(row["remarks"]), "; ".join(row["remarks"].values())) for row in rows
           if row.get("remarks")]
    return pd.DataFrame(bad + odd, columns=["audio_path", "used", "kind", "reason"])


def count_kinds(rows, set_aside) -> pd.DataFrame:
    """Return how many clips (check_clips) were set aside or remarked on for what: kind, used or not, clips, the first reason."""
    found = [(row.get("kind", ""), False, row["reason"]) for row in set_aside]
    found += [(kind, True, remark) for row in rows for kind, remark in row.get("remarks", {}).items()]
    table = pd.DataFrame(found, columns=["kind", "used", "for example"])
    counts = table.groupby(["used", "kind"], sort=False)["for example"].agg(clips="size", example="first").reset_index()
    return counts.rename(columns={"example": "for example"})[["kind", "used", "clips", "for example"]]


def count_clips(rows, set_aside) -> dict[str, int]:
    """Return the counts of a run's metrics, where there are any: `set_aside_<kind>` of each kind, and `pseudo_labelled`."""
    kinds = Counter(f"set_aside_{row['kind'].replace(' ', '_')}" for row in set_aside)
    pseudo = sum("pseudo" in row for row in rows)
    return dict(sorted(kinds.items())) | ({"pseudo_labelled": pseudo} if pseudo else {})


def describe_texts(rows, language: str) -> dict[str, str]:
    """Return what the card of a corpus says of the texts of clips: distinct characters, those beyond the alphabet, and pace."""
    found = Counter("".join(row["text"] for row in rows))
    alphabet = {letter for code in {language, *(row["language"] for row in rows)} & LANGUAGES.keys()
                for letter in spell_alphabet(code)}
    beyond = {sign: count for sign, count in found.most_common() if sign.isalpha() and sign not in alphabet}
    pace = np.percentile([len(row["text"]) / row["duration"] for row in rows], [5, 50, 95])
    others = " ".join(f"{sign} ({count})" for sign, count in list(beyond.items())[:12]) + " ..." * (len(beyond) > 12)
    return {"distinct characters": str(len(found)), "letters beyond the alphabet": others or "none",
            "characters per second": f"{pace[1]:.1f} ({pace[0]:.1f} to {pace[2]:.1f})"}


def describe_sound(rows, most: int = 200) -> dict[str, str]:
    """Return what the card of a corpus says of the sound of clips: loudness of `most` of them, evenly drawn, and their band."""
    audible = [row for row in rows if "codes_row" not in row]
    drawn = [audible[i] for i in np.unique(np.linspace(0, len(audible) - 1, min(most, len(audible))).astype(int))]
    loud = np.array([measure_loudness(read_audio(row["audio_path"])) for row in drawn])
    low, middle, high = np.percentile(loud[np.isfinite(loud)], [5, 50, 95]) if np.isfinite(loud).any() else [np.nan] * 3
    narrow = Counter(match[1] for row in rows if (match := re.search(r"above ([\d.]+) kHz", row.get("remarks", {}).get(
        "band-limited", ""))))
    bands = ", ".join(f"{count / len(rows):.0%} at {limit} kHz" for limit, count in sorted(narrow.items()))
    of = f", of {len(drawn)} clips" * (len(drawn) < len(rows))
    loudness = f"{middle:.1f} ({low:.1f} to {high:.1f}{of})" if drawn else "not known of codes alone"
    return {"loudness, LUFS": loudness, "band-limited": bands or "none"}


def describe_provenance(rows, set_aside, settings: dict) -> dict:
    """Return what an adapter's card says of its clips: hours, how many were set aside for what, labelled, and what was done.

    Codes alone have no sound that anything could be done to, and that is said.
    """
    deaf = sum("codes_row" in row for row in rows)
    kinds = Counter(row["kind"] for row in set_aside)
    pseudo = sum("pseudo" in row for row in rows)
    named = {"margin": " s", "loudness": " LUFS", "max_cer": "", "min_dnsmos": ""}
    done = [f"{name} {settings[name]:g}{unit}" for name, unit in named.items() if settings.get(name) and deaf < len(rows)]
    done += [f"not of {deaf} clips that are codes alone"] * bool(done and deaf) + ["read_out"] * bool(settings.get("read_out"))
    return {"hours": f"{sum(row['duration'] for row in rows) / 3600:.2f}",
            "set aside": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"} | (
        {"pseudo-labelled": f"{pseudo / len(rows):.1%} of the clips"} if pseudo else {}) | (
        {"processing": ", ".join(done)} if done else {})


def _name(row):
    """Return a clip's file with its folder: names repeat from speaker to speaker."""
    return "/".join(Path(row["audio_path"]).parts[-2:])


def _look_at(row, min_seconds, max_seconds, need_text, heard, margin):
    """Return (fault, seconds, remarks, {"kept": s}) of a clip; `heard` keeps {hash of the samples: row} of usable ones before."""
    if row.get("text_fault"):
        return ("unreadable", row["text_fault"]), 0.0, {}, {}
    if need_text and (fault := faults.find_text_fault(row)):
        return fault, 0.0, {}, {}
    if "codes_row" in row:
        return *_look_at_codes(row, min_seconds, max_seconds, need_text), {}
    try:
        wav, header = read_audio(row["audio_path"]), soundfile.info(row["audio_path"])
    except (AudioError, OSError) as error:
        return ("unreadable", str(error).removeprefix(f"{row['audio_path']}: ")), 0.0, {}, {}
    first, last = find_kept(wav, margin)
    kept = {"kept": [first / SAMPLE_RATE, last / SAMPLE_RATE]} if last - first < len(wav) else {}
    wav = wav[first:last]
    seconds = round(len(wav) / SAMPLE_RATE, 3)
    if fault := faults.find_level_fault(wav, min_seconds, max_seconds):
        return fault, seconds, {}, {}
    fault, remarks = faults.find_sound_fault(wav), faults.find_flaws(wav, header.samplerate, header.channels)
    if not need_text:  # nothing is learned from it
        return None, seconds, remarks | dict([fault] if fault else []), kept
    if fault := fault or faults.find_pace_fault(row, seconds):
        return fault, seconds, {}, {}
    mark = blake2b(wav.tobytes(), digest_size=16).digest()
    if before := heard.get(mark):
        text = "" if before["text"] == row["text"] else f", whose text is {before['text']!r:.60}"
        return ("same audio", f"the same audio as {_name(before)}{text}"), seconds, {}, {}
    heard[mark] = row
    return None, seconds, remarks, kept


def _look_at_codes(row, min_seconds, max_seconds, need_text):
    """Return (fault, seconds, remarks) of a clip that is codes alone: its sound can not be looked at, and that is said."""
    if not need_text:
        return ("unreadable", "codes without audio: nothing of its sound can be measured"), row["duration"], {}
    fault = faults.find_length_fault(row["duration"], min_seconds, max_seconds) or faults.find_pace_fault(row, row["duration"])
    codec = f"of codec {row['codec']}" if row["codec"] else "of a codec that its data set does not state"
    return fault, row["duration"], {} if fault else {"codes alone": f"codes {codec}, without audio: its sound was not checked"}
