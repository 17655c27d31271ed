"""The base model: load it, prove that it is loaded right, choose what is trained, save and load adapters."""

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, BitsAndBytesConfig, CsmForConditionalGeneration
from transformers.utils import logging

from csm_nb.clean import clean_text
from csm_nb.codec import load_codec, pick_device
from csm_nb.hub import fetch_model, find_weights
from csm_nb.params import ROOT, TRAINED, show_path
from csm_nb.provenance import describe_commit

BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
ATTENTION = "q_proj|k_proj|v_proj|o_proj"
MLP = "gate_proj|up_proj|down_proj"
BACKENDS = ("transformers", "unsloth")
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Not in 4 bits: the codec, which is not trained and whose every digit is heard, the heads, and the step between the decoders.
# Embeddings are not linear layers and stay as they are without being named.
NOT_QUANTISED = ("codec_model", "lm_head", "depth_decoder.codebooks_head", "depth_decoder.model.inputs_embeds_projector")
CONTEXT = 2048  # positions of CSM-1B


class BaseModelError(ValueError):
    """A base model that can not be loaded, trained or saved as asked; says what is allowed and what to do."""


class AdapterError(ValueError):
    """An adapter that is missing, or that was trained on another base model."""


def load_base(model_id: str = "models/csm-mini", device: str = "auto", dtype: str | torch.dtype | None = None,
              four_bit: bool = False, backend: str = "transformers"):
    """Returns (model, processor) of a CSM folder or hub id, with its codebook tables tied, in eval mode, nothing trainable yet.

    `dtype` ("auto": bfloat16 on a GPU, float32 on a CPU; "bfloat16"; "float32") is the language model's; the codec is
    float32 in any case. `four_bit` holds the layers' weights as bitsandbytes' NF4: room for LoRA on a small GPU, a little
    slower. `backend` "unsloth" loads through Unsloth's FastModel, with its patches; the adapter on it is peft's own all the
    same. Both need CUDA; Unsloth was not tried here, only written by its source (2026.10.9). Raises hub.ModelError when
    there is no such model here, and BaseModelError for what can not be had on this device, and when the checkpoint holds
    neither codebook table.
    """
    device = pick_device(device)
    _check_request(device, dtype, four_bit, backend)
    path = fetch_model(model_id, "base_model")
    dtype = DTYPES.get(dtype, dtype) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    options = {"dtype": dtype}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(NOT_QUANTISED),
        )
        number = torch.device(device).index
        options["device_map"] = {"": torch.cuda.current_device() if number is None else number}  # accelerate wants a number
    with _quiet_transformers():  # what it warns of, the missing table above all, is mended here and shown by prove_model
        if backend == "unsloth":
            model, missing = _load_unsloth(path, options, four_bit), {DEPTH_TABLE}
        else:
            model, info = CsmForConditionalGeneration.from_pretrained(path, output_loading_info=True, **options)
            missing = info["missing_keys"]
    tie_codebooks(model, missing)
    model.codec_model.float()
    if dtype != torch.float32:  # from_pretrained rounded the codec too, and .float() does not bring its digits back
        model.codec_model.load_state_dict(load_codec(path).state_dict())
    model = model if four_bit else model.to(device)
    return model.eval().requires_grad_(False), AutoProcessor.from_pretrained(path)


def _check_request(device, dtype, four_bit, backend):
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise BaseModelError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    if backend not in BACKENDS:
        raise BaseModelError(f"backend is {backend!r}; allowed are {' and '.join(map(repr, BACKENDS))}")
    wanted = {"bitsandbytes": four_bit and "four_bit", "unsloth": backend == "unsloth" and "backend 'unsloth'"}
    for package, asked in wanted.items():
        if asked and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise BaseModelError(f"{asked} was asked for on {device!r} and needs a CUDA device that is there: set four_bit to "
                                 "false and backend to 'transformers', or run with an NVIDIA GPU (device: cuda)")
        if asked and importlib.util.find_spec(package) is None:
            raise BaseModelError(f"{asked} needs the package {package}, which is not installed: make setup EXTRAS=gpu")


def _load_unsloth(path, options, four_bit):
    from unsloth import FastModel

    model, _ = FastModel.from_pretrained(
        model_name=str(path), auto_model=CsmForConditionalGeneration, max_seq_length=CONTEXT, load_in_4bit=four_bit,
        use_gradient_checkpointing=False, **options,
    )
    for file in find_weights(path):  # it ties the backbone's table to the depth decoder's, even one filled at random
        with safe_open(file, "pt") as tensors:
            for name in {BACKBONE_TABLE, DEPTH_TABLE} & set(tensors.keys()):
                model.backbone_model.embed_tokens.embed_audio_tokens.weight.data.copy_(tensors.get_tensor(name))
    return model


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
        raise BaseModelError(f"the checkpoint holds neither {BACKBONE_TABLE} nor {DEPTH_TABLE}: it is no trained CSM model; "
                             "fetch it again")
    backbone, depth = model.backbone_model.embed_tokens.embed_audio_tokens, model.depth_decoder.model.embed_tokens
    kept, other = (depth, backbone) if BACKBONE_TABLE in missing else (backbone, depth)
    if not missing & {BACKBONE_TABLE, DEPTH_TABLE} and not torch.equal(backbone.weight, depth.weight):
        raise BaseModelError("the checkpoint holds two different codebook tables; was it saved by a version that unties them? "
                             "Fetch the published one again")
    other.weight = kept.weight
    return "depth decoder" if kept is depth else "backbone"


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


def train_fully(model, text_embeddings: bool = True):
    """`model` with everything to be trained but its codec (and, without `text_embeddings`, its text table).

    Load it in float32 for this: a bfloat16 weight takes no step that is smaller than 1/256 of it. 16 bytes a parameter
    with AdamW, 25 GB for CSM-1B. Raises BaseModelError for a model in 4 bits or with an adapter on it.
    """
    _check_whole(model, "trained fully")
    model.requires_grad_(True)
    model.codec_model.requires_grad_(False)
    model.embed_text_tokens.requires_grad_(text_embeddings)
    return model


def _check_whole(model, what):
    if isinstance(model, PeftModel):
        raise BaseModelError(f"a model with an adapter on it can not be {what}; use it without (load_base), or save_adapter")
    if getattr(model, "is_loaded_in_4bit", False):
        raise BaseModelError(f"a model in 4 bits can not be {what}; load it with four_bit=False, or train an adapter on it")


def describe_adapter(model) -> dict:
    """What is trained in `model`, for a table and the card: {what: value}, an adapter's rank, alpha and layers first.

    An adapter that was loaded keeps its own rank, alpha and layers, whatever the parameters say: this tells which. For a
    model without one (train_fully) only the last three rows. Parameters in millions, and as a share of all.
    """
    table = {}
    if isinstance(model, PeftModel):
        config, layers = model.peft_config[model.active_adapter], {}
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                layers.setdefault(name.split(".")[0], set()).add(name.split(".")[-1])
        table = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        table |= {f"layers of {part}": ", ".join(sorted(names)) for part, names in layers.items()}
        trained = {name: value for name, value in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
        total = model.get_nb_trainable_parameters()[1]  # counts weights in 4 bits right
    else:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        total = sum(value.numel() for value in model.parameters())
    count = sum(value.numel() for value in trained.values())
    return table | {
        "text embeddings trained": any("embed_text_tokens" in name for name in trained),
        "trained parameters (M)": round(count / 1e6, 3), "share of all": round(count / total, 4),
    }


def start_training(model, method: str, before=None, rank: int = 64, alpha: int = 128, dropout: float = 0.05,
                   mlp: bool = False, text_embeddings: bool = False):
    """`model` ready to be trained by `method`, "lora" or "full", from where the stage before left off (its folder) or anew.

    An adapter that is loaded keeps its own rank, alpha, dropout and layers: describe_adapter shows them. A model that was
    trained fully lends its weights. Raises BaseModelError for another method, AdapterError for a folder of another base.
    """
    if method not in TRAINED:
        raise BaseModelError(f"method is {method!r}; allowed are {' and '.join(TRAINED)}")
    if method == "full":
        return train_fully(model if before is None else load_full(model, before), text_embeddings)
    if before is None:
        return add_adapter(model, rank, alpha, dropout, mlp, text_embeddings)
    return load_adapter(model, before, trainable=True)


def load_full(model, folder):
    """`model` with all its weights from the folder of a fully trained one (save_full), tables tied again.

    AdapterError when the folder holds none, or one of another shape.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} holds no fully trained model (no *.safetensors); run the stage before it with method=full")
    state = {name: value for file in files for name, value in load_file(file).items()}
    held = model.state_dict()
    strange = [name for name, value in state.items() if name not in held or held[name].shape != value.shape]
    if strange or not held.keys() - state.keys() <= {DEPTH_TABLE, BACKBONE_TABLE}:
        raise AdapterError(f"{folder} is a model of another shape than this base ({describe_base(model)}), such as in "
                           f"{(strange or sorted(held.keys() - state.keys()))[0]}; choose the base model it was trained on")
    model.load_state_dict(state, strict=False)
    tie_codebooks(model, held.keys() - state.keys())
    return model


def save_trained(model, processor, folder, card: dict | None = None, base_id: str = "") -> Path:
    """Writes what was trained and returns its folder: an adapter (save_adapter), or the whole model as it is (save_full)."""
    if isinstance(model, PeftModel):
        return save_adapter(model, folder, card, base_id)
    return save_full(model, processor, folder, card, base_id, dtype=None)


def save_adapter(model: PeftModel, folder, card: dict | None = None, base_id: str = "") -> Path:
    """Writes a plain PEFT folder with a model card and returns it; replaces what was there when all is written.

    `card` is the card's table (data, licence, figures ...); what was trained and the git commit are added to it.
    """
    with _write_folder(folder) as partial:
        if base_id:
            model.peft_config["default"].base_model_name_or_path = show_path(base_id)
        model.save_pretrained(partial, save_embedding_layers=False)  # peft would ask the hub; a trained table is saved anyway
        (partial / "base.json").write_text(json.dumps(describe_base(model), indent=1))
        _write_card(partial, Path(folder).name, model, card, base_id)
    return Path(folder)


def save_full(model, processor, folder, card: dict | None = None, base_id: str = "",
              dtype: torch.dtype | None = torch.bfloat16) -> Path:
    """Writes a fully trained model as save_base does, with a model card as save_adapter does, and returns the folder."""
    with _write_folder(folder) as partial:
        _write_base(model, processor, partial, dtype)
        _write_card(partial, Path(folder).name, model, card, base_id)
    return Path(folder)


def save_base(model, processor, folder, dtype: torch.dtype | None = torch.bfloat16) -> Path:
    """Writes model and processor as a published CSM is laid out, with one of the two codebook tables, for load_base.

    The language model is written in `dtype` (None: as it is), the codec as it is: bfloat16 would round it. Replaces what
    was there when all is written. Raises BaseModelError for a model in 4 bits or with an adapter on it.
    """
    with _write_folder(folder) as partial:
        _write_base(model, processor, partial, dtype)
    return Path(folder)


def _write_base(model, processor, folder, dtype):
    _check_whole(model, "saved whole")
    tie_codebooks(model)  # or there is no leaving out one of the two
    state = {name: value.to("cpu", None if name.startswith("codec_model.") or not value.is_floating_point() else dtype)
             for name, value in model.state_dict().items() if name != DEPTH_TABLE}
    with _quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


@contextlib.contextmanager
def _write_folder(folder):
    """A folder beside `folder` to write to, which takes its place when all is written; a reader never finds a part."""
    folder = Path(folder)
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk above all
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_card(folder, name, model, card, base_id):
    table, commit = {"licence": "of the data: not stated"} | (card or {}) | describe_adapter(model), describe_commit(ROOT)
    table["csm-nb commit"] = f"{commit['commit'] or 'unknown'}{' and uncommitted changes' if commit['dirty'] else ''}"
    rows = "\n".join(f"| {key} | {show_path(value) if isinstance(value, Path) else value} |" for key, value in table.items())
    base, adapter = show_path(base_id) if base_id else "unknown", isinstance(model, PeftModel)
    loaded, start, attach = name, "", ""
    if adapter:
        loaded, start = base, "from peft import PeftModel\n"
        attach = f'\nmodel = PeftModel.from_pretrained(model, "{name}")'
    (folder / "README.md").write_text(f"""---
library_name: {"peft" if adapter else "transformers"}
base_model: {base}
tags: [text-to-speech, csm{", lora" if adapter else ""}]
---
# {name}

| what | value |
| --- | --- |
{rows}

```python
{start}from transformers import AutoProcessor, CsmForConditionalGeneration

model = CsmForConditionalGeneration.from_pretrained("{loaded}")
# transformers 5.17 does not tie the two codebook tables: do it after every load
model.depth_decoder.model.embed_tokens.weight = model.backbone_model.embed_tokens.embed_audio_tokens.weight{attach}
processor = AutoProcessor.from_pretrained("{loaded}")
inputs = processor("<|begin_of_text|>[0]Hei.<|end_of_text|>", return_tensors="pt")
audio = model.generate(**inputs, output_audio=True, max_new_tokens=100)
```
""", encoding="utf-8")


def encode_text(processor, text: str, speaker_id: str) -> list[int]:
    """Token ids of the prompt "[speaker]text" as CSM reads it, begin and end of text included.

    The text is cleaned (clean_text) for whoever did not, and what looks like a control token in it is spelled out letter by
    letter: it ends nothing.
    """
    tokenizer, prompt = processor.tokenizer, f"[{speaker_id}]{clean_text(text)}"
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|end_of_text|>"])
    return [begin, *tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids, end]
