"""Where a training is kept: in a folder that is named by all that moves its weights, so that it is done once."""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from csm_nb import paths
from csm_nb.claims import hold
from csm_nb.corpora.tokens import count_frames, read_column
from csm_nb.csm.load import inner_model
from csm_nb.csm.weights import hash_config, hash_weights
from csm_nb.device import has_fast_bfloat16
from csm_nb.hub import TOKENIZER
from csm_nb.provenance import hash_code, hash_file, hash_value, write_json
from csm_nb.text.sentences import VALIDATION_CLIPS

RECORD = "training.json"
# Fields of a recipe that move no weight: lines of the log, checkpoints, samples, who encodes, the choice between checkpoints.
MOVES_NOTHING = {"log_every", "log_seconds", "sample_every", "save_every", "save_minutes", "keep_checkpoints", "price_per_hour",
                 "choice", "workers"}
# Fields that the starting weights show: an adapter that is gone on from has its own, whatever the recipe says.
IN_WEIGHTS = {"rank", "alpha", "dropout", "train_mlp", "train_text", "four_bit", "backend", "dtype"}
# What the trainer imports and its key holds by content, or that moves no weight: texts, codes and weights as they come out of
# these rooms, and how files are found, written and claimed.
GIVEN = ("text", "corpora", "codec", "hub", "paths", "claims", "provenance", "csm.record", "csm.save",
         "csm.speakers", "csm.tags", "csm.weights")


def place_training(model, train_rows, valid_rows, recipe, data) -> Path:
    """Return the folder below `data` of this training, made if it is not there; give it to train_model as `out_dir`.

    The same training has the same folder, in whichever run: a finished one is not done again, a killed one goes on. It is
    named by the weights that `model` begins with, the clips on both sides (text, speaker, codes, in order), the recipe, what
    it is computed in and the code that moves weights. What is only said of a training, or chosen after it, does not count.
    training.json in it says what it was made of. `model` is left as it is.
    """
    made_of = describe_training(model, train_rows, valid_rows, recipe)
    place = Path(data) / "trainings" / hash_value(made_of)
    if not (place / RECORD).is_file():
        with hold(place / RECORD):  # the folder itself is held by who trains in it
            write_json(place / RECORD, made_of)
    return place


def describe_training(model, train_rows, valid_rows, recipe) -> dict:
    """Return all that moves the weights of a training, in words and hashes: what its folder is named by."""
    fields = {name: value for name, value in asdict(recipe).items() if name not in MOVES_NOTHING | IN_WEIGHTS}
    if not recipe.patience:
        fields.pop("eval_every", None)  # evaluations only look; with patience they end the training
    device = next(model.parameters()).device.type
    return {
        "starting weights": _describe_weights(model),
        "trained on": {"clips": len(train_rows), "hash": hash_rows(train_rows)},
        "held out": {"clips": len(valid_rows), "evaluated at most": VALIDATION_CLIPS, "hash": hash_rows(valid_rows)},
        "recipe": fields,
        "computed": {"device": device, "bfloat16": has_fast_bfloat16(device)},
        "code": hash_code("from csm_nb.train import trainer", paths.PACKAGE, GIVEN),
    }


def _describe_weights(model):
    inner = inner_model(model)
    base, folder = getattr(inner, "loaded_from", None), Path(str(inner.config._name_or_path))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad and "codec_model" not in name}
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {
        "base": hash_weights(base) if base else _hash_tensors(frozen),
        "config": hash_config(inner.config.to_dict()),
        "tokenizer": {name: hash_file(folder / name) for name in TOKENIZER if (folder / name).is_file()},
        "frozen in": sorted({str(value.dtype).removeprefix("torch.") for value in frozen.values()}),
        "attention and layers": type(inner.backbone_model).__module__,  # another backend's, where it replaces them
        "adapter": {name: getattr(adapter, name) for name in settings} if adapter else None,
        "trained": {"parameters": sum(value.numel() for value in trained.values()), "hash": _hash_tensors(trained)},
    }


def _hash_tensors(tensors):
    """Return a hash of names, shapes and values; floats in float32, as all that is trained is trained in (loss.prepare_model)."""
    digest = sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {list(value.shape)}".encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_rows(rows) -> str:
    """Return a hash of token rows, a list or a Dataset, in their order: texts, tags, speakers, frames and codes."""
    columns = [read_column(rows, "text"), read_column(rows, "speaker_id"), count_frames(rows)]
    columns += [tags] if any(tags := read_column(rows, "tag", "")) else []
    digest = sha256(hash_value(columns).encode())
    for codes in _read_codes(rows):
        digest.update(np.ascontiguousarray(codes, np.uint16).tobytes())
    return digest.hexdigest()[:16]


def _read_codes(rows):
    if isinstance(rows, list):
        yield from (row["codes"] for row in rows)
        return
    for batch in rows.with_format("arrow").iter(1024):  # flat: 50 h take a second, as arrays half a minute
        yield from (chunk.flatten().flatten().to_numpy(zero_copy_only=False) for chunk in batch["codes"].chunks)
