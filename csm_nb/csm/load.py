"""The base model: load it, choose what is trained, save adapters and put them on one base, each under its name."""

import contextlib
import importlib.util

import torch
from peft import (
    PeftModel,
)
from safetensors import safe_open
from transformers import AutoProcessor, BitsAndBytesConfig, CsmForConditionalGeneration
from transformers.utils import logging

from csm_nb.clean import clean_text
from csm_nb.codec.mimi import load_codec
from csm_nb.csm.record import read_entries, set_record
from csm_nb.csm.tags import find_rows, is_row
from csm_nb.csm.weights import list_weights
from csm_nb.device import pick_device
from csm_nb.hub import fetch_model

BACKBONE_TABLE = "backbone_model.embed_tokens.embed_audio_tokens.weight"
DEPTH_TABLE = "depth_decoder.model.embed_tokens.weight"
BACKENDS = ("transformers", "unsloth")
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Not in 4 bits: the codec, which is not trained and whose every digit is heard, the heads, and the step between the decoders.
# Embeddings are not linear layers and stay as they are without being named.
NOT_QUANTISED = ("codec_model", "lm_head", "depth_decoder.codebooks_head", "depth_decoder.model.inputs_embeds_projector")
CONTEXT = 2048  # positions of CSM-1B


class BaseModelError(ValueError):
    """A base model that can not be loaded, trained or saved as asked; says what is allowed and what to do."""


def load_base(model_id: str = "models/csm-mini", device: str = "auto", dtype: str | torch.dtype | None = None,
              four_bit: bool = False, backend: str = "transformers", method: str = "lora"):
    """Return (model, processor) of a CSM folder or hub id, its codebook tables tied, in eval mode, nothing trainable yet.

    `dtype` ("auto": bfloat16 on a GPU, float32 on a CPU; "bfloat16"; "float32") is the language model's; the codec is
    float32 in any case. For `method` "full" all of it is float32 whatever `dtype` says, since what is trained has to start
    from the checkpoint's own digits. `four_bit` holds the layers' weights as bitsandbytes' NF4: room for LoRA on a small
    GPU, a little slower. `backend` "unsloth" loads through Unsloth's FastModel, with its patches; the adapter on it is
    peft's own all the same. Both need CUDA; Unsloth was not tried here, only written by its source (2026.10.9). Raises
    hub.ModelError when there is no such model here, and BaseModelError for what can not be had on this device, and when the
    checkpoint holds neither codebook table.
    """
    device = pick_device(device)
    _check_request(device, dtype, four_bit, backend)
    path = fetch_model(model_id, "base_model")
    dtype = DTYPES.get(dtype, dtype) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    dtype = torch.float32 if method == "full" else dtype
    options = {"dtype": dtype}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(NOT_QUANTISED),
        )
        number = torch.device(device).index
        options["device_map"] = {"": torch.cuda.current_device() if number is None else number}  # accelerate wants a number
    with quiet_transformers():  # what it warns of, the missing table above all, is mended here and shown by prove_model
        if backend == "unsloth":
            model, missing = _load_unsloth(path, options, four_bit), {DEPTH_TABLE}
        else:
            model, info = CsmForConditionalGeneration.from_pretrained(path, output_loading_info=True, **options)
            missing = info["missing_keys"]
    tie_codebooks(model, missing)
    model.codec_model.float()
    if dtype != torch.float32 or backend == "unsloth":  # the codec was rounded too, and .float() does not bring digits back
        model.codec_model.load_state_dict(load_codec(path).state_dict())
    model = model if four_bit else model.to(device)
    model.loaded_from = path
    set_record(model, **read_entries(path))
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
        use_gradient_checkpointing=False, offload_embedding=False, **options,
    )
    # It makes float32 of the model and float16 of its projections and heads whatever dtype is asked for, and ties the
    # backbone's table to the depth decoder's, even one filled at random: so dtype and digits are the checkpoint's again.
    held = dict(model.named_parameters())  # no buffers: the angles of the positions stay float32 in every dtype
    for name, value in held.items():
        if value.is_floating_point() and not name.startswith("codec_model."):
            value.data = value.data.to(options["dtype"])
    for file in list_weights(path):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stored = tensors.get_tensor(name)
                target = held.get(BACKBONE_TABLE if name == DEPTH_TABLE else name)
                if target is not None and target.shape == stored.shape and target.is_floating_point():  # 4 bits stay as they are
                    target.data.copy_(stored)
    return model


@contextlib.contextmanager
def quiet_transformers():
    """Keep transformers' warnings and progress bars away while open."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def tie_codebooks(model, missing_keys=()) -> str:
    """Make the backbone's and the depth decoder's codebook table one tensor again, and say which one was kept.

    transformers 5.17 leaves them two, and fills the one that a checkpoint does not hold with random numbers, without an
    error. `missing_keys` is what `from_pretrained(..., output_loading_info=True)` reports.
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


def inner_model(model):
    """Return the CSM model itself, without an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def encode_text(processor, text: str, speaker_id: str, tag: str = "") -> list[int]:
    """Return token ids of the prompt "[speaker]text" as CSM reads it, begin and end of text included.

    The text is cleaned (clean_text) for whoever did not, and what looks like a control token in it is spelled out letter by
    letter: it ends nothing. `tag` (tags.pick_tag) stands between speaker and text, as characters, or as the one token that
    it names. Raises TagError for a token that the tokenizer does not have.
    """
    tokenizer, head = processor.tokenizer, f"[{speaker_id}]"
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|end_of_text|>"])

    def encode(part):
        return tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids

    if is_row(tag):
        return [begin, *encode(head), *find_rows(tokenizer, {"": tag}), *encode(clean_text(text)), end]
    return [begin, *encode(f"{head}{tag}{clean_text(text)}"), end]
