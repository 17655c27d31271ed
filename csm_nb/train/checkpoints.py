"""Checkpoints that are complete or ignored: a marker is written last, the newest marked one is resumed, old ones are pruned."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model, save_model

from csm_nb.csm.save import write_record
from csm_nb.provenance import read_json, write_json

MARKER = "complete.json"
WEIGHTS = "model.safetensors"


def save_weights(model, folder) -> None:
    """Write what a training changes: an adapter as a plain PEFT folder, a fully trained model as all its weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub; a trained table is saved anyway
    else:
        save_model(model, folder / WEIGHTS)
    write_record(model, folder)  # base and speakers, for a training that goes on from here


def load_weights(model, folder) -> None:
    """Put the weights of a checkpoint (save_weights) into `model`, which must have the same layers and the same adapter shape.

    Raises OSError, RuntimeError, ValueError or SafetensorError for weights that are missing, broken or of another shape.
    """
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device=str(model.device)))
    else:
        load_model(model, Path(folder) / WEIGHTS, device=str(model.device))


def mark_complete(folder, record: dict) -> None:
    """Mark a checkpoint as complete; it is the last thing written to it. `record` holds its step and losses."""
    write_json(Path(folder) / MARKER, record)


def list_checkpoints(out_dir) -> list[tuple[int, Path]]:
    """Return [(step, folder), ...] of the complete checkpoints in `out_dir`, oldest first; one without a marker is ignored."""
    found = [(read_json(marker)["step"], marker.parent) for marker in Path(out_dir).glob(f"checkpoint-*/{MARKER}")]
    return sorted(found)


def prune_checkpoints(out_dir, keep: int, always=()) -> None:
    """Delete the checkpoints in `out_dir` that were cut off, and old complete ones.

    The newest and those of the steps `always` stay in any case, then the newest others until there are `keep`.
    """
    found = list_checkpoints(out_dir)
    kept = {folder for step, folder in found if step in always} | {folder for _, folder in found[-1:]}
    for _, folder in found[::-1]:
        if len(kept) < keep:
            kept.add(folder)
    for folder in Path(out_dir).glob("checkpoint-*"):
        if folder not in kept:
            (folder / MARKER).unlink(missing_ok=True)  # first, so that one half deleted is never taken for whole
            shutil.rmtree(folder)


def has_finite_weights(model) -> bool:
    """Return whether every weight that is trained is finite."""
    return all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)
