"""Tags: what stands before a text so that a model knows which language to speak, as characters or as a row in reserve.

An adapter's tags are kept in its base.json and on the model, as its speakers are: {language: what stands before the text},
with "" for nothing. The first language is the adapter's own, which it speaks unless it is asked for another.

Rows in reserve are those of `<|reserved_special_token_N|>`, which Llama 3's tokenizer ships and no text uses. N of a language
is FIRST_ROW and its place in csm_nb.languages, which new ones join at the end; rows from PHONE_ROW on are left to phones.
"""

import re

from csm_nb.csm.record import get_record, read_record, set_record
from csm_nb.languages import LANGUAGES

KINDS = ("none", "text", "token")
FIRST_ROW = 2  # 0 and 1 are <|AUDIO|> and <|audio_eos|> in CSM's tokenizer (ids 128002 and 128003 of Llama 3)
PHONE_ROW = 32
ROW = "<|reserved_special_token_{}|>"


class TagError(ValueError):
    """A tag that is none, that the tokenizer has no row for, or that an adapter was not trained with; says what is allowed."""


def make_tags(kind: str, languages) -> dict[str, str]:
    """Return the tags of `languages`: "" by kind "none", "<lang:no>" by "text", a reserved token's name by "token".

    Raises TagError for another kind.
    """
    if kind not in KINDS:
        raise TagError(f"tag is {kind!r}; allowed are {', '.join(KINDS)}")
    order = list(LANGUAGES)
    return {code: {"none": "", "text": f"<lang:{code}>", "token": ROW.format(FIRST_ROW + order.index(code))}[kind]
            for code in languages}


def name_kind(tags: dict) -> str:
    """Return the kind of an adapter's tags, "none", "text" or "token"; "none" for {}."""
    tag = next(iter(tags.values()), "")
    return "token" if is_row(tag) else "text" if tag else "none"


def is_row(tag: str) -> bool:
    """Return whether a tag is one token, a row in reserve, and not characters."""
    return re.fullmatch(ROW.format(r"\d+").replace("|", r"\|"), tag) is not None


def find_rows(tokenizer, tags: dict) -> list[int]:
    """Return the rows of the text table that `tags` are; [] where they are characters or none.

    Raises TagError for a tokenizer that has no such tokens.
    """
    rows = {tag: tokenizer.get_vocab().get(tag) for tag in tags.values() if is_row(tag)}
    missing = [tag for tag, row in rows.items() if row is None]
    if missing:
        raise TagError(f"tag is 'token', and this base's tokenizer ({len(tokenizer)} tokens) has none in reserve: no "
                       f"{', '.join(missing)}, as Llama 3's has. Choose tag=text, which needs none, or tag=none")
    return sorted(rows.values())


def check_before(before: dict, tags: dict) -> None:
    """Raise TagError where a training with `tags` would go on from what was trained with others (`before`)."""
    if name_kind(before) != name_kind(tags):
        raise TagError(f"what is gone on from was trained with tag={name_kind(before)}, and tag is {name_kind(tags)!r}: give "
                       f"tag={name_kind(before)}, or run the stages before with tag={name_kind(tags)}, or begin anew "
                       "(init_adapter empty)")


def pick_tag(tags: dict, language: str = "") -> str:
    """Return what stands before a text in `language`; by default that of the adapter's own language.

    "" for one without tags, as the base. Raises TagError, which lists them, for a language that the tags do not have.
    """
    if language and language not in tags and name_kind(tags) != "none":
        raise TagError(f"this adapter was trained with tags for {', '.join(tags)}, and {language!r} is none of them; allowed are "
                       "these, or to name no language: then it speaks with the tag of the first")
    return tags.get(language, next(iter(tags.values()), ""))


def tag_rows(rows, tags: dict):
    """Return token rows (a list or Dataset) with the column `tag`: that of each row's language; as they are without tags."""
    if name_kind(tags) == "none":
        return rows
    if isinstance(rows, list):
        return [row | {"tag": pick_tag(tags, row["language"])} for row in rows]
    return rows.add_column("tag", [pick_tag(tags, code) for code in rows.with_format("arrow")["language"][:].to_pylist()])


def read_tags(folder) -> dict:
    """Return the tags kept in the base.json of an adapter or fully trained model; {} for None or a folder without."""
    return read_record(folder).get("tags", {})


def set_tags(model, tags: dict) -> None:
    """Let `model`, or the active adapter on it, have these tags: speak uses them, and saving writes them."""
    set_record(model, tags=tags)


def get_tags(model) -> dict:
    """Return the tags of `model` or of the adapter that is active on it; {} for a base, or one whose adapter is off."""
    return get_record(model).get("tags", {})
