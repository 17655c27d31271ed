"""The base model: load it, prove that it is loaded right, attach, save and load adapters."""

import contextlib
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoProcessor, CsmForConditionalGeneration
from transformers.utils import logging

from csm_nb.codec import pick_device
from csm_nb.hub import fetch_model

BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
ATTENTION = "q_proj|k_proj|v_proj|o_proj"
MLP = "gate_proj|up_proj|down_proj"


class AdapterError(ValueError):
    """An adapter that is missing, or that was trained on another base model."""


def load_base(model_id: str = "models/csm-mini", device: str = "auto", dtype: torch.dtype | None = None):
    """Returns (model, processor) of a CSM folder or hub id, with its codebook tables tied, in eval mode.

    `dtype` defaults to bfloat16 on a GPU and float32 on a CPU. Raises hub.ModelError when there is no such model here,
    and ValueError when the checkpoint holds neither codebook table.
    """
    path, device = fetch_model(model_id), pick_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    with _quiet_transformers():  # what it warns of, the missing table above all, is mended here and shown by check_base
        model, info = CsmForConditionalGeneration.from_pretrained(path, dtype=dtype, output_loading_info=True)
    tie_codebooks(model, info["missing_keys"])
    model.codec_model.float()
    return model.to(device).eval(), AutoProcessor.from_pretrained(path)


@contextlib.contextmanager
def _quiet_transformers():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def tie_codebooks(model, missing_keys=()) -> str:
    """Makes the backbone's and the depth decoder's codebook table one tensor again, and says which one was kept.

    transformers 5.17 leaves them two, and fills the one that a checkpoint does not hold with random numbers, without an
    error (shared/facts/stack.md). `missing_keys` is what `from_pretrained(..., output_loading_info=True)` reports.
    """
    missing = set(missing_keys)
    if {BACKBONE_TABLE, DEPTH_TABLE} <= missing:
        raise ValueError(f"the checkpoint holds neither {BACKBONE_TABLE} nor {DEPTH_TABLE}: it is no trained CSM model")
    backbone, depth = model.backbone_model.embed_tokens.embed_audio_tokens, model.depth_decoder.model.embed_tokens
    kept, other = (depth, backbone) if BACKBONE_TABLE in missing else (backbone, depth)
    if not missing & {BACKBONE_TABLE, DEPTH_TABLE} and not torch.equal(backbone.weight, depth.weight):
        raise ValueError("the checkpoint holds two different codebook tables; was it saved by a version that unties them?")
    other.weight = kept.weight
    return "depth decoder" if kept is depth else "backbone"


def check_base(model, processor, texts=()) -> dict[str, bool]:
    """What must hold after loading, as {check: passed}: tied tables, a text of the language that survives the tokenizer.

    With an adapter on: that it sits on backbone and depth decoder and nowhere on the codec.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    tables = inner.backbone_model.embed_tokens.embed_audio_tokens.weight, inner.depth_decoder.model.embed_tokens.weight
    tokenizer = processor.tokenizer
    checks = {
        "codebook tables tied": tables[0].data_ptr() == tables[1].data_ptr(),
        "text survives the tokenizer": all(
            tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text for text in texts
        ),
    }
    if isinstance(model, PeftModel):
        adapted = [name for name, _ in inner.named_parameters() if "lora_" in name]
        checks["adapter on backbone"] = any(name.startswith("backbone_model") for name in adapted)
        checks["adapter on depth decoder"] = any(name.startswith("depth_decoder") for name in adapted)
        checks["codec untouched"] = not any(name.startswith("codec_model") for name in adapted)
    return checks


def add_adapter(model, rank: int = 64, alpha: int = 128, dropout: float = 0.05, mlp: bool = False,
                text_embeddings: bool = False) -> PeftModel:
    """A fresh LoRA adapter on the attention (and with `mlp` the MLP layers) of backbone and depth decoder.

    The targets are full paths: bare names such as q_proj would also match Mimi's transformer inside the model.
    `text_embeddings` trains the text table as well, for letters that the base has never seen.
    """
    layers = rf"(backbone_model|depth_decoder\.model)\.layers\.\d+\.(self_attn|mlp)\.({ATTENTION}{'|' + MLP if mlp else ''})"
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers,
        modules_to_save=["embed_text_tokens"] if text_embeddings else None,
    )
    return get_peft_model(model, config)


def load_adapter(model, folder, trainable: bool = False) -> PeftModel:
    """`model` with the adapter in `folder` on it. AdapterError when there is none, or when it belongs to another base."""
    folder = Path(folder)
    config = folder / "adapter_config.json"
    if not config.exists():
        raise AdapterError(f"{folder} holds no adapter (no adapter_config.json); run 03_adapter for its language first")
    trained_on = json.loads(config.read_text()).get("base_model_name_or_path")
    shape = (folder / "base.json").exists() and json.loads((folder / "base.json").read_text())
    if shape and shape != describe_base(model):
        raise AdapterError(f"{folder} was trained on {trained_on} ({shape}), this base is {describe_base(model)}; "
                           "choose the base model it was trained on, or train it again")
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def describe_base(model) -> dict:
    """The shape that an adapter depends on, written beside it as base.json: layers, widths, codebooks, vocabularies."""
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    return {
        "layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "codebooks": config.num_codebooks,
        "audio_vocabulary": config.vocab_size, "text_vocabulary": config.text_vocab_size,
        "depth_layers": config.depth_decoder_config.num_hidden_layers,
        "depth_hidden_size": config.depth_decoder_config.hidden_size,
    }


def save_adapter(model: PeftModel, folder, card: dict | None = None, base_id: str = "") -> Path:
    """Writes a plain PEFT folder with a model card (`card` is its table) and returns it; replaces what was there."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if base_id:
        model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(partial, save_embedding_layers=False)  # peft would ask the hub; a trained table is saved anyway
    (partial / "base.json").write_text(json.dumps(describe_base(model), indent=1))
    rows = "\n".join(f"| {key} | {value} |" for key, value in (card or {}).items())
    (partial / "README.md").write_text(f"""---
library_name: peft
base_model: {base_id or "unknown"}
tags: [text-to-speech, csm, lora]
---
# {folder.name}

| what | value |
| --- | --- |
{rows}

```python
from peft import PeftModel
from transformers import AutoProcessor, CsmForConditionalGeneration

base = CsmForConditionalGeneration.from_pretrained("{base_id}")
# transformers 5.17 does not tie the two codebook tables: do it after every load
base.depth_decoder.model.embed_tokens.weight = base.backbone_model.embed_tokens.embed_audio_tokens.weight
model = PeftModel.from_pretrained(base, "{folder.name}")
processor = AutoProcessor.from_pretrained("{base_id}")
inputs = processor("<|begin_of_text|>[0]Hei.<|end_of_text|>", return_tensors="pt")
audio = model.generate(**inputs, output_audio=True, max_new_tokens=100)
```
""")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def encode_text(processor, text: str, speaker_id: str) -> list[int]:
    """Token ids of the prompt "[speaker]text" as CSM reads it, begin and end of text included."""
    prompt = f"<|begin_of_text|>[{speaker_id}]{text}<|end_of_text|>"
    return processor.tokenizer(prompt, add_special_tokens=False).input_ids


def start_adapter(model, folder, rank: int, alpha: int, dropout: float, mlp: bool = False,
                  text_embeddings: bool = False) -> PeftModel:
    """The adapter in `folder` to train on, or a fresh one when `folder` is None."""
    if folder is None:
        return add_adapter(model, rank, alpha, dropout, mlp, text_embeddings)
    return load_adapter(model, folder, trainable=True)
