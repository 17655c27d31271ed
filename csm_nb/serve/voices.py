"""Who can speak: the base, and the adapters in the server's own folder, which come and go while it runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from csm_nb.confusion.prompts import HOME, find_adapters
from csm_nb.csm.adapters import AdapterError, load_adapter, remove_adapters
from csm_nb.csm.load import inner_model
from csm_nb.csm.record import read_entries
from csm_nb.csm.speakers import pick_voice
from csm_nb.hub import read_card
from csm_nb.languages import LANGUAGES
from csm_nb.paths import resolve_path
from csm_nb.speak.decoders import Decoders

NAME = re.compile(r"lora_([a-z]{2}(?:\+[a-z]{2})*)")  # runs.folders.name_trained
UNLISTED = ("0", "1", "2", "3")  # where nobody says which speakers there are: CSM counts those of a conversation from 0 on
# OpenAI's names, which programs written for it ask for: the first is a language's first voice, and so on, round and round
OPENAI = ("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar")


@dataclass(frozen=True)
class Reader:
    """What reads a language: the base (`name` "") or an adapter by its folder's name and the one that it has on the model."""

    name: str
    worn: str
    languages: tuple[str, ...]
    licence: str
    tags: dict
    speakers: list[dict]
    read_out: bool

    @property
    def voices(self) -> list[str]:
        """The speakers that it may have: those of its own corpus, the one with the most clips first."""
        own = sorted((one for one in self.speakers if one["own"]), key=lambda one: (-one["clips"], one["number"]))
        return [str(one["number"]) for one in own] or list(UNLISTED)

    def pick(self, voice: str) -> str:
        """Return the speaker of a request: its number, the default for "", OpenAI's names by their places.

        Raises ValueError that lists what there is.
        """
        if voice in OPENAI:
            return self.voices[OPENAI.index(voice) % len(self.voices)]
        if voice and voice not in self.voices:
            raise ValueError(f"unknown voice {voice[:40]!r}; {self.name or 'the base'} has {', '.join(self.voices)}, for which "
                             f"OpenAI's names {', '.join(OPENAI)} stand in turn")
        return pick_voice(self.speakers, voice)

    def describe(self) -> dict:
        """Return its adapter, voices and licence, and whose voices they are: "6: of nst/manifest.jsonl (120 clips)".

        Names and ids of people stay in base.json.
        """
        whose = [f"{one['number']}: of {one['corpus']} ({one['clips']} clips)" for one in self.speakers if one["own"]]
        whose = whose or [f"{UNLISTED[0]} to {UNLISTED[-1]}: the speakers that its card tells of"]
        return {"adapter": self.name or None, "voices": self.voices, "whose": whose, "licence": self.licence}


@dataclass(frozen=True, eq=False)
class Shelf:
    """What can be read at a time: readers by language, decoders with all of their adapters, and folders that do not work."""

    model: object
    decoders: Decoders
    readers: dict[str, Reader]
    seen: dict = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def list_folders(folder) -> dict[str, tuple]:
    """Return {name: (file, time, size) of its files} of the adapters in a folder, those of few languages first."""
    found = {}
    for path in sorted(resolve_path(folder).glob("lora_*"), key=lambda one: (one.name.count("+"), one.name)):
        try:
            if NAME.fullmatch(path.name) and (path / "adapter_config.json").exists():
                files = [(one.name, one.stat()) for one in sorted(path.iterdir()) if one.is_file()]
                found[path.name] = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
        except OSError:  # it is being taken away
            continue
    return found


def fill_shelf(model, folder, base_licence: str = "") -> Shelf:
    """Return what can be read with the base under `model` and the adapters that lie in `folder` now; others are taken off.

    An adapter that can not be put on, that changes no logit (load_adapter), is of other languages than its name says, or holds
    no safetensors is not served: `faults` says why. Decoders made before go on as they were.
    """
    seen, faults = list_folders(folder), {}
    model = remove_adapters(model) if isinstance(model, PeftModel) else model
    readers = {HOME: make_reader("", "", (HOME,), base_licence, getattr(model, "loaded_from", None))}
    for number, name in enumerate(seen):
        codes, place = NAME.fullmatch(name)[1].split("+"), resolve_path(folder) / name
        try:
            if strange := [code for code in codes if code not in LANGUAGES]:
                raise AdapterError(f"no language {', '.join(strange)}; one of {', '.join(LANGUAGES)}")
            if not (place / "adapter_model.safetensors").is_file():
                raise AdapterError("no adapter_model.safetensors; other kinds of weights are not read here")
            find_adapters(folder, dict.fromkeys(codes, name))
            reader = make_reader(name, f"a{number}", tuple(codes), read_licence(place), place)
            reader.describe()
            model = load_adapter(model, place, name=reader.worn)
        except Exception as error:  # whatever is wrong with a folder is wrong with that one alone
            what = f"its files are none that 03_adapter writes ({type(error).__name__}: {error}); train it again"
            faults[name] = str(error) if isinstance(error, ValueError) else what
            continue
        for code in codes:
            readers.setdefault(code, reader)  # the base's own stays; before an adapter of several goes one of its own
    readers = {code: readers[code] for code in LANGUAGES if code in readers}
    worn = sorted({reader.worn for reader in readers.values() if reader.worn})
    return Shelf(model, Decoders(model, worn), readers, seen, faults)


def make_reader(name: str, worn: str, languages, licence: str, folder) -> Reader:
    """Return what reads by the record in a folder (csm.record): its tags, speakers, and whether texts are read out to it."""
    entries = read_entries(folder)
    return Reader(name, worn, languages, licence, entries["tags"], entries["speakers"], entries["read_out"])


def read_licence(folder) -> str:
    """Return the licence that an adapter's card states, of its data where it says that; "not stated" where it does not."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    row = re.search(r"^\| licence \| (.*) \|$", text, re.M)
    return row[1] if row else _read_header(text)


def read_base_licence(base_id) -> str:
    """Return the licence in a base model's card; "not stated" where there is none."""
    return _read_header(read_card(base_id))


def _read_header(text):
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.license or "not stated"
    except ValueError:
        return "not stated"


def count_positions(shelf: Shelf) -> int:
    """Return the positions that the model has for a prompt and its frames."""
    return inner_model(shelf.model).config.max_position_embeddings
