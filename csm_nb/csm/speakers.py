"""Speakers: the small numbers that CSM knows voices by. A number means one voice, over all corpora and stages of an adapter.

The list of an adapter's speakers is kept in its base.json: one dict for each, with number, corpus (its name), content (a hash
that tells corpora apart), speaker (its id there), clips and hours (of the last stage that trained it), and own (whether that
was the stage that the adapter is of). A voice that is not its own it has half forgotten, or never learned.
"""

from dataclasses import asdict

import pandas as pd

from csm_nb.clean import compose
from csm_nb.csm.record import get_record, read_record, set_record
from csm_nb.paths import resolve_path
from csm_nb.provenance import hash_recordings, hash_value
from csm_nb.synth.corpus import HELD_OUT_VOICES
from csm_nb.synth.espeak import VOICES

BASE_VOICE = "0"  # of a model without an adapter: CSM's examples speak with it, and the miniature base was trained with it
ENGINE = "espeak-ng (synthetic)"  # the source of what corpus.make_corpus writes
ESPEAK = {voice.speaker_id: asdict(voice) for voice in (*VOICES, *HELD_OUT_VOICES)}  # they have their numbers in every adapter
FIRST = max(map(int, ESPEAK)) + 1  # of the numbers that voices of a corpus get
LISTED = 20  # speakers that an error or a card lists


class SpeakerError(ValueError):
    """A speaker that an adapter was not trained with, or rows of no corpus; lists the speakers that are allowed."""


def number_speakers(rows, corpus: str = "", before=None) -> tuple[list[dict], list[dict]]:
    """Return (rows with the number as their speaker_id, the adapter's speakers with those of `rows` added).

    `corpus` is the manifest or folder that the rows are from; espeak-ng's voices need none, and keep the numbers that the
    miniature base knows them by. `before` is the folder of the adapter that is gone on from: what has a number there keeps
    it. The same id in two corpora is two voices. A corpus is known by its content, wherever it lies; one that was changed
    counts as another, whose voices get new numbers, since nothing tells that they are still the same.
    """
    known = [speaker | {"own": False} for speaker in read_speakers(before)]
    numbers = {(speaker["content"], speaker["speaker"]): speaker["number"] for speaker in known}
    corpora = {place: _identify(place) for place in {row.get("of_corpus", corpus) for row in rows}}  # of a list each row's own
    names = {content: name for name, content in corpora.values()}
    voices = [(ENGINE if _is_espeak(row) else corpora[row.get("of_corpus", corpus)][1], _name(row))
              for row in rows]
    if any(not place for place, _ in voices) and any(place != ENGINE for place, _ in voices):
        raise SpeakerError("rows of speakers that are none of espeak-ng's voices need the corpus that they are from, so that "
                           "its speakers are told from those of others: give its manifest.jsonl or folder as `corpus`")
    taken = {*numbers.values(), *range(FIRST)}
    for place, speaker in sorted(set(voices) - numbers.keys()):
        number = int(speaker) if place == ENGINE else next(n for n in range(FIRST, len(taken) + FIRST + 1) if n not in taken)
        taken.add(number)
        numbers[place, speaker] = number
        known.append({"number": number, "corpus": ENGINE if place == ENGINE else names[place], "content": place,
                      "speaker": speaker, "clips": 0, "hours": 0.0, "own": False})
    return [row | {"speaker_id": str(numbers[voice])} for row, voice in zip(rows, voices, strict=True)], known


def _identify(corpus):
    """(name without a folder of this machine, hash of the content) of a corpus."""
    if not corpus:
        return "", ""
    path = resolve_path(corpus).resolve()
    if not path.exists():  # a data set of the hub, by its id
        return corpus, hash_value(corpus)
    path = path / "manifest.jsonl" if (path / "manifest.jsonl").is_file() else path
    return "/".join(path.parts[-2:]).lstrip("/"), hash_recordings(path)


def _name(row):
    return compose(str(row["speaker_id"]))


def _is_espeak(row):
    voice = ESPEAK.get(_name(row))
    return voice is not None and row.get("source") == ENGINE and row.get("voice", voice) == voice


def count_speakers(speakers: list[dict], train_rows) -> list[dict]:
    """Return `speakers` with clips and hours of the rows that are trained on (a list or Dataset); who has some is `own`.

    A speaker whose clips were all held out is not: the adapter never learns that voice.
    """
    columns = ["speaker_id", "duration"]
    rows = pd.DataFrame(train_rows) if isinstance(train_rows, list) else (
        train_rows.with_format(None).select_columns(columns).to_pandas())
    clips, seconds = rows.groupby("speaker_id").size(), rows.groupby("speaker_id").duration.sum()
    counted = []
    for speaker in speakers:
        number = str(speaker["number"])
        found = {"clips": int(clips[number]), "hours": round(seconds[number] / 3600, 3)} if number in clips else {}
        counted.append(speaker | found | {"own": bool(found)})
    return counted


def pick_voice(speakers: list[dict], wanted: str = "") -> str:
    """Return the voice to speak with: `wanted`, or the one of the adapter's own corpus with the most clips (the base's: "0").

    Raises SpeakerError, which lists them, for one that is not of the adapter's own corpus. Without a list, as for the base
    or an adapter from elsewhere, nothing is known and every voice is allowed.
    """
    own = sorted((speaker for speaker in speakers if speaker["own"]), key=lambda one: (-one["clips"], one["number"]))
    if not own:
        return wanted or BASE_VOICE
    if wanted and wanted not in {str(speaker["number"]) for speaker in own}:
        raise SpeakerError(f"speaker {wanted!r} is no voice of the corpus that this adapter was last trained on; allowed are "
                           f"{list_speakers(speakers)}. Its base.json says who they are")
    return wanted or str(own[0]["number"])


def list_speakers(speakers: list[dict]) -> str:
    """Return the voices of the adapter's own corpus in words, by number and without names: "6 (12 clips, 0.01 h), ..."."""
    own = [f"{one['number']} ({one['clips']} clips, {one['hours']:.2f} h)" for one in speakers if one["own"]]
    return ", ".join(own[:LISTED]) + (f" and {len(own) - LISTED} more" if len(own) > LISTED else "")


def find_clip(rows, voice: str) -> dict:
    """Return one of `rows` (number_speakers) by `voice` to hold the adapter's speech against: a text of about 40 letters."""
    return min((row for row in rows if row["speaker_id"] == voice), key=lambda row: abs(len(row["text"]) - 40))


def read_speakers(folder) -> list[dict]:
    """Return the speakers kept in the base.json of an adapter or fully trained model; [] for None or a folder without."""
    return read_record(folder).get("speakers", [])


def set_speakers(model, speakers: list[dict]) -> None:
    """Let `model`, or the active adapter on it, have these speakers: speak takes no other, and saving writes them."""
    set_record(model, speakers=speakers)


def get_speakers(model) -> list[dict]:
    """Return the speakers of `model` or of the adapter that is active on it; [] for a base, or one whose adapter is off."""
    return get_record(model).get("speakers", [])
