"""What base.json says of an adapter beside its base, speakers and tags: read from its folder, held on the model by adapter."""

import json
from pathlib import Path

from peft import PeftModel


def read_record(folder) -> dict:
    """Return the base.json of an adapter or fully trained model; {} for None or a folder without."""
    path = Path(folder) / "base.json" if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def read_entries(folder) -> dict:
    """Return the entries of a folder's record that speaking needs: speakers, tags, language, whether texts are read out."""
    record = read_record(folder)
    return {"speakers": record.get("speakers", []), "tags": record.get("tags", {}), "language": record.get("language", ""),
            "read_out": record.get("read_out", False)}


def set_record(model, **entries) -> None:
    """Let `model`, or the active adapter on it, have these entries (read_entries), beside those that it has."""
    inner, name = _find_place(model)
    records = getattr(inner, "records", {})
    inner.records = records | {name: records.get(name, {}) | entries}


def get_record(model) -> dict:
    """Return the entries of `model` or of the adapter that is active on it; {} for a base, or one whose adapter is off."""
    if isinstance(model, PeftModel) and model.get_model_status().enabled is False:
        return {}
    inner, name = _find_place(model)
    return getattr(inner, "records", {}).get(name, {})


def drop_records(base) -> None:
    """Forget the entries of adapters that were taken off `base`; it keeps its own, if it was trained fully."""
    base.records = {name: entries for name, entries in getattr(base, "records", {}).items() if not name}


def _find_place(model):
    return (model.get_base_model(), model.active_adapter) if isinstance(model, PeftModel) else (model, "")
