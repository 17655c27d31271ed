"""A model by its name: a folder below the project's root, or a hub id; or an error that says how to get it."""

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from csm_nb.params import ROOT, resolve_path

WEIGHTS = ("*.safetensors", "*.bin")
# Copies of the weights in other formats, which from_pretrained does not read.
SKIPPED = ["*.pt", "*.pth", "*.onnx", "*.msgpack", "*.h5", "flax_model*", "tf_model*", "transformers/*"]


class ModelError(ValueError):
    """A model that is not there or not whole; the message says what was looked for and how to get it."""


def fetch_model(name) -> Path:
    """Return the folder of a model: `name` below the project's root (or absolute), else the hub's copy of that id.

    What from_pretrained needs must be in it: config.json and weights. Raises ModelError with the command that brings
    the model here when there is neither a folder nor a way to the hub.
    """
    folder = resolve_path(name)
    if folder.is_dir():
        return _check_folder(folder, name)
    if str(name).startswith(("models/", "/", ".", "~")) or str(name).count("/") != 1:
        there = ", ".join(sorted(p.name for p in (ROOT / "models").glob("*/"))) or "none"
        raise ModelError(f"{name}: no such folder ({folder}); under models/ there are: {there}")
    try:
        return _check_folder(Path(snapshot_download(str(name), ignore_patterns=SKIPPED, etag_timeout=5)), name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        place = f"models/{str(name).split('/')[-1]}"
        raise ModelError(
            f"{name} is a hub id, and the hub gave no copy of it ({type(error).__name__}). Where there is a network run\n"
            f"    hf download {name} --local-dir {place}\n"
            f"(accept the model's terms on its page first if it has any), copy the folder here and name {place} in the "
            "profile in params/ instead of the id"
        ) from error


def describe_model(name) -> str:
    """Return the name of a model and the first paragraph of its card, for the first lines of a report.

    What a reader has to know of a model before any figure (a miniature, synthetic speech, not for commercial use)
    stands in its card. A model without a card is named as such.
    """
    place = resolve_path(name)
    card = (place.parent if place.is_file() else place if place.is_dir() else _fetch_card(name)) / "README.md"
    text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.S) if card.is_file() else ""
    prose = [part for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith(("#", "<", "!", "|"))]
    return f"{name}: {' '.join(prose[0].replace('**', '').split()) if prose else 'has no model card'}"


def _fetch_card(name):
    """The folder of a hub id's card, without the model: a repository may hold more than what is used of it."""
    try:
        return Path(hf_hub_download(str(name), "README.md", etag_timeout=5)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
        return fetch_model(name)  # which says what is wrong


def _check_folder(folder, name):
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(os.path.getsize(path) for pattern in WEIGHTS for path in folder.glob(pattern)):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ModelError(f"{name}: {folder} lacks {' and '.join(missing)}; fetch or make the model again")
    return folder
