"""Mimi by moshi, its authors' own code: a checkpoint as a codec of the same face, or as weights for transformers."""

import json
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from moshi.models.loaders import MIMI_NAME, get_mimi
from moshi.modules.transformer import set_attention_context
from moshi.utils.compile import no_compile
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import MimiConfig, MimiModel

from csm_nb.hub import ModelError, fetch_model, find_fault, find_model, is_hub_id, place_model
from csm_nb.paths import resolve_path

_RENAMED = [  # a part of a name in moshi's checkpoint, in transformers'
    (r"(\.conv(tr)?)+\.", ".conv."), (r"^(en|de)coder\.model\.", r"\1coder.layers."),
    (r"_transformer\.transformer\.", "_transformer."),
    (r"\.rvq_first\.(vq\.)?", ".semantic_residual_vector_quantizer."),
    (r"\.rvq_rest\.(vq\.)?", ".acoustic_residual_vector_quantizer."),
    (r"\._codebook\._?", ".codebook."), (r"\.embedding_sum$", ".embed_sum"),
    (r"\.linear([12])\.", r".mlp.fc\1."), (r"\.out_proj(s\.0)?\.", ".o_proj."),
    (r"\.norm1\.", ".input_layernorm."), (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."), (r"\.layer_scale_2\.", ".mlp_layer_scale."),
]  # fmt: skip
_IN_PROJ = r"in_proj(s\.0\.|_|\.)weight$"


class MoshiCodec(nn.Module):
    """moshi's Mimi with what this package asks of a transformers.MimiModel: config, device, encode, decode, state_dict."""

    def __init__(self, mimi, config: MimiConfig):
        super().__init__()
        self.mimi, self.config = mimi, config

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next(self.mimi.parameters()).device

    def encode(self, values, num_quantizers: int | None = None):
        """Return an object with audio_codes (batch, codebooks, frames) of `values` (batch, 1, samples)."""
        self.mimi.set_num_codebooks(num_quantizers or self.config.num_quantizers)
        with no_compile():  # moshi compiles a few lines of its own: seconds at the first call, nothing gained after
            return SimpleNamespace(audio_codes=self.mimi.encode(values))

    def decode(self, codes):
        """Return an object with audio_values (batch, 1, samples) of `codes` (batch, codebooks, frames)."""
        with no_compile():
            return SimpleNamespace(audio_values=self.mimi.decode(codes))

    def open_stream(self) -> dict:
        """Return the state of a new stream of one clip, which encode_next or decode_next carries on.

        The state is put into the modules for each call only, so that streams and whole clips can go on side by side.
        """
        window = self.config.sliding_window
        # A frame is two steps of the transformers. With a cache of just the window the second would push out the oldest
        # step that the first one still attends to, and codes would differ from a whole clip's after 10 s.
        set_attention_context(self.mimi, window + 1)
        with self.mimi.streaming(1):
            state = self.mimi.get_streaming_state()
        set_attention_context(self.mimi, window)
        return state

    def encode_next(self, values, num_quantizers: int | None, state: dict):
        """Return the codes (1, codebooks, frames) of the next whole frames of samples (1, 1, samples) of a stream.

        They are worked through one by one: a CUDA graph, which moshi makes of them on a GPU, wants equal shapes.
        """
        self.mimi.set_num_codebooks(num_quantizers or self.config.num_quantizers)
        with self._resume(state):
            return torch.cat([self.mimi.encode(frame) for frame in values.split(self.config.frame_size, -1)], -1)

    def decode_next(self, codes, state: dict):
        """Return the samples (1, 1, samples) of the next frames of codes (1, codebooks, frames) of a stream."""
        with self._resume(state):
            return torch.cat([self.mimi.decode(frame) for frame in codes.split(1, -1)], -1)

    @contextmanager
    def _resume(self, state):
        self.mimi.set_streaming_state(state)
        try:
            with no_compile():
                yield
        finally:
            self.mimi.set_streaming_state(dict.fromkeys(state))


def load_moshi(model) -> MoshiCodec:
    """Return moshi's Mimi of a checkpoint (see `read_moshi`) with all its codebooks, on the CPU. Raises hub.ModelError."""
    path, state, sizes = read_moshi(model)
    mimi = get_mimi(None, sizes)
    _load_whole(mimi, state, path)
    return MoshiCodec(mimi, convert_config(sizes))


def load_converted(model) -> MimiModel:
    """Return the transformers.MimiModel of a moshi checkpoint (see `read_moshi`), on the CPU. Raises hub.ModelError."""
    path, state, sizes = read_moshi(model)
    codec = MimiModel(convert_config(sizes))
    _load_whole(codec, convert_moshi(state, codec.config.head_dim), path)
    return codec


def read_moshi(model) -> tuple[Path, dict, dict | None]:
    """Return path, state dict and sizes (moshi's mimi_config; None: those of the published Mimi) of a moshi checkpoint.

    `model` is a .safetensors file, a folder as of kyutai/moshiko-pytorch-bf16 (config.json may name other files by
    `mimi_name` and `mimi_config_name`), or a hub id, of which only the codec's files are fetched. Raises hub.ModelError
    for what is not there.
    """
    path = find_model(model) or resolve_path(model)
    folder = path.parent if path.is_file() else path if path.is_dir() else None
    names = _read_json(model, folder, "config.json") or {}
    weights = path if path.is_file() else _find_file(model, folder, names.get("mimi_name", MIMI_NAME))
    if weights is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ModelError(
            f"{model}: {folder} holds no {names.get('mimi_name', MIMI_NAME)}, moshi's Mimi; found are {found}. Name "
            "the file itself, or take the backend 'transformers' for a transformers folder"
        )
    sizes = _read_json(model, folder, names["mimi_config_name"]) if names.get("mimi_config_name") else None
    try:
        return weights, load_file(weights), sizes
    except SafetensorError as error:
        raise ModelError(f"{weights} is no safetensors file ({error}); fetch it again") from error


def _read_json(model, folder, name):
    path = _find_file(model, folder, name)
    if path and (fault := find_fault(path)):
        raise ModelError(f"{model}: {fault}; fetch it again")
    return json.loads(path.read_bytes()) if path else None


def _find_file(model, folder, name):
    """Return the file `name` of a folder, or of the hub's copy; None where the folder (or the hub's config.json) is not there."""
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    if not is_hub_id(model):
        fetch_model(model)  # says which folders there are
    try:
        return Path(hf_hub_download(str(model), name, etag_timeout=5))
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if name == "config.json" and isinstance(error, EntryNotFoundError):  # the first checkpoints have none
            return None
        place = place_model(model)
        raise ModelError(
            f"{model} is a hub id, and the hub gave no {name} of it ({type(error).__name__}). Where there is a network run\n"
            f'    hf download {model} --include "*.json" --include "{name}" --local-dir {place}\n'
            f"copy the folder here and name {place} instead of the id"
        ) from error


def _load_whole(module, state, path):
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ModelError(
            f"{path} is no Mimi of moshi's of the size in its config: {' '.join(lines)[:300]} ...; take another file, or "
            "the backend 'transformers' for a transformers folder"
        ) from error


def convert_config(sizes: dict | None) -> MimiConfig:
    """Return the MimiConfig of moshi's mimi_config; of None that of the published Mimi. Raises hub.ModelError."""
    if sizes is None:
        return MimiConfig()
    try:
        net, quantizer, layers = sizes["seanet"], sizes["quantizer"], sizes["transformer"]
        config = MimiConfig(
            sampling_rate=sizes["sample_rate"], audio_channels=sizes["channels"], hidden_size=net["dimension"],
            num_filters=net["n_filters"], num_residual_layers=net["n_residual_layers"], upsampling_ratios=net["ratios"],
            kernel_size=net["kernel_size"], last_kernel_size=net["last_kernel_size"],
            residual_kernel_size=net["residual_kernel_size"], dilation_growth_rate=net["dilation_base"],
            compress=net["compress"], pad_mode=net["pad_mode"], use_conv_shortcut=not net["true_skip"],
            codebook_size=quantizer["bins"], codebook_dim=quantizer["dimension"], num_quantizers=quantizer["n_q"],
            vector_quantization_hidden_dimension=quantizer["dimension"], upsample_groups=net["dimension"],
            num_hidden_layers=layers["num_layers"], intermediate_size=layers["dim_feedforward"],
            num_attention_heads=layers["num_heads"], num_key_value_heads=layers["num_heads"],
            sliding_window=layers["context"], rope_parameters={"rope_type": "default", "rope_theta": layers["max_period"]},
        )  # fmt: skip
    except KeyError as error:
        raise ModelError(f"the checkpoint's mimi_config has no {error}; see moshi.models.loaders for a whole one") from error
    if config.frame_rate != sizes["frame_rate"]:
        raise ModelError(
            f"mimi_config: frame_rate {sizes['frame_rate']}; {config.frame_rate} is allowed at these ratios: two steps per frame"
        )
    return config


def convert_sizes(config: MimiConfig) -> dict:
    """Return moshi's mimi_config of a MimiConfig: what convert_config reads, backwards."""
    layers = {
        "d_model": config.hidden_size, "num_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers,
        "causal": True, "layer_scale": config.layer_scale_initial_scale, "context": config.sliding_window, "conv_layout": True,
        "max_period": config.rope_parameters["rope_theta"], "gating": "none", "norm": "layer_norm",
        "positional_embedding": "rope", "dim_feedforward": config.intermediate_size, "input_dimension": config.hidden_size,
        "output_dimensions": [config.hidden_size],
    }  # fmt: skip
    net = {
        "channels": config.audio_channels, "dimension": config.hidden_size, "causal": True, "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers, "activation": "ELU", "compress": config.compress,
        "dilation_base": config.dilation_growth_rate, "disable_norm_outer_blocks": 0, "kernel_size": config.kernel_size,
        "residual_kernel_size": config.residual_kernel_size, "last_kernel_size": config.last_kernel_size, "norm": "none",
        "pad_mode": config.pad_mode, "ratios": list(config.upsampling_ratios), "true_skip": not config.use_conv_shortcut,
    }  # fmt: skip
    quantizer = {"dimension": config.codebook_dim, "n_q": config.num_quantizers, "bins": config.codebook_size,
                 "input_dimension": config.hidden_size, "output_dimension": config.hidden_size}
    return {"sample_rate": config.sampling_rate, "channels": config.audio_channels, "frame_rate": config.frame_rate,
            "seanet": net, "quantizer": quantizer, "transformer": layers}


def run_by_moshi(codec: MimiModel) -> MoshiCodec:
    """Return the codec of a transformers.MimiModel as moshi's code runs it."""
    mimi, given, state = get_mimi(None, convert_sizes(codec.config)), codec.state_dict(), {}
    for name in mimi.state_dict():
        if re.search(_IN_PROJ, name):
            parts = [given[re.sub(_IN_PROJ, f"{part}_proj.weight", _rename(name))] for part in "qkv"]
            half = codec.config.head_dim // 2
            turned = [rows.view(-1, 2, half, rows.shape[1]).transpose(1, 2).reshape(rows.shape) for rows in parts[:2]]
            state[name] = torch.cat([*turned, parts[2]])
        else:
            state[name] = given[_rename(name)]
    mimi.load_state_dict(state)
    return MoshiCodec(mimi, codec.config)


def read_kind(model) -> str | None:
    """Return the model_type in the config.json of a folder or hub id, None for a file and where there is none."""
    path = resolve_path(model)
    return None if path.is_file() else (_read_json(model, path if path.is_dir() else None, "config.json") or {}).get("model_type")


def _rename(name):
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def convert_moshi(state: dict, head_dim: int = 64) -> dict:
    """Return the state dict of a transformers.MimiModel from that of moshi's Mimi, of a module or of a published file.

    moshi keeps queries, keys and values in one matrix, and turns neighbouring rows of a head together where transformers
    turns one half of them with the other (rotary embedding): matrices are split, rows of queries and keys reordered.
    """
    converted = {}
    for name, value in state.items():
        name = _rename(name)
        if not re.search(_IN_PROJ, name):
            converted[name] = value
            continue
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            if part != "v":
                rows = rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
            converted[re.sub(_IN_PROJ, f"{part}_proj.weight", name)] = rows
    return converted
