"""The Mimi codec: speech to codes and back, clips in batches or a stream in chunks, the codes of each clip alone."""

import contextlib
import hashlib
import json
from collections import defaultdict

import numpy as np
import torch
from safetensors import safe_open
from transformers import MimiConfig, MimiModel

from csm_nb.device import one_thread, pick_device
from csm_nb.hub import ModelError, fetch_model, find_weights
from csm_nb.paths import resolve_path
from csm_nb.provenance import hash_value

# Seconds of audio in one batch at most; a longer clip is a batch of its own. A CPU works clip by clip: 16 clips of 2 s are
# encoded at 51 x real time together and 75 x one by one, decoded at 64 and 127 (csm-mini, one core: out of its cache).
# So does a full-size Mimi, by either backend: 8 clips of 2 s encoded at 11 together and 13 one by one, decoded at 11 and 16.
BATCH_SECONDS = {"cpu": 2, "cuda": 60}
BACKENDS = ("transformers", "moshi")
_INSIDE_CSM = "codec_model."


def load_codec(model, device: str = "cpu", backend: str = "transformers"):
    """Return the Mimi of a folder, file or hub id, in float32 and eval mode; of a CSM model, the codec inside it.

    By transformers (a MimiModel): a folder or hub id of Mimi or CSM, of which only the codec's tensors are read, so that
    its language model takes no memory; a .safetensors file is taken for moshi's checkpoint and converted. By moshi (a
    moshi.MoshiCodec; a check on the other, no quicker): the same, converted the other way; that file as it is, a
    folder that holds one, or a hub id as kyutai/moshiko-pytorch-bf16. Every function here takes either codec. `device` may
    be "auto". Raises hub.ModelError for a model that is not there, is neither Mimi nor CSM, or lacks codec weights.
    """
    if backend not in BACKENDS:
        raise ModelError(f"backend: found {backend!r}; allowed are {' and '.join(map(repr, BACKENDS))}")
    if backend == "moshi" or resolve_path(model).is_file():
        from csm_nb.codec.moshi import load_converted, load_moshi, read_kind, run_by_moshi

        if backend == "transformers":
            codec = load_converted(model)
        else:
            codec = run_by_moshi(_load_transformers(model)) if read_kind(model) in ("mimi", "csm") else load_moshi(model)
    else:
        codec = _load_transformers(model)
    return codec.float().to(pick_device(device)).eval().requires_grad_(False)


def _load_transformers(model):
    path = fetch_model(model)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "mimi":
        return MimiModel.from_pretrained(path, dtype=torch.float32)
    if kind != "csm":
        raise ModelError(f"{model}: {path}/config.json says model_type {kind!r}; allowed are 'mimi' and 'csm'")
    codec = MimiModel(MimiConfig.from_dict(config["codec_config"]))
    missing = codec.load_state_dict(_read_codec_weights(path), strict=False).missing_keys
    if missing:
        raise ModelError(
            f"{model}: {len(missing)} codec weights are not in {path}/*.safetensors, {_INSIDE_CSM}{missing[0]} "
            "first; fetch the model again, or set codec_model to kyutai/mimi"
        )
    return codec


def _read_codec_weights(path):
    weights = {}
    for file in (file for file in find_weights(path) if file.suffix == ".safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.startswith(_INSIDE_CSM):
                    weights[name.removeprefix(_INSIDE_CSM)] = tensors.get_tensor(name).float()
    return weights


def fingerprint_codec(codec) -> str:
    """Return 12 hex digits that name a codec's weights: of a Mimi alone, inside a CSM, of moshi's or in bfloat16 the same.

    Made of its convolutions and codebooks, which all of these store alike, rounded to bfloat16, whatever their names.
    """
    state = getattr(codec, "mimi", codec).state_dict()
    kept = [value for name, value in state.items() if value.ndim == 3 or name.endswith(("embed_sum", "embedding_sum"))]
    kept = [value.cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy() for value in kept]
    return hash_value(sorted(hashlib.sha256(value.tobytes()).hexdigest() for value in kept))


def frame_rate(codec) -> float:
    """Return how many frames of codes a codec makes per second (12.5 for Mimi)."""
    return codec.config.sampling_rate / codec.config.frame_size


@torch.inference_mode()
def encode(codec, wavs, num_codebooks: int | None = None) -> list[np.ndarray]:
    """Return the codes of each clip: uint16 of shape (frames, codebooks); `wavs` are float32 mono at the codec's rate.

    Each clip is filled up with zeros to whole frames, as moshi's own `MimiModel.encode` does, and clips of equally many
    frames share a batch: there is no padding left that could change a code. (transformers pads inside each convolution
    instead; the last, partly filled frame can differ from this.) A CPU computes on one thread, so that a clip's codes are the
    same whatever it is given: who has several cores encodes in several processes. `num_codebooks` takes the first ones,
    default all. Raises ValueError for a clip without samples or with NaN, and for more codebooks than there are.
    """
    check_codebooks(codec, num_codebooks)
    size = codec.config.frame_size
    wavs = [check_samples(f"clip {number}", wav) for number, wav in enumerate(wavs)]
    codes = [None] * len(wavs)
    for batch in _batch_equals(codec, [-(-len(wav) // size) for wav in wavs]):
        frames = -(-len(wavs[batch[0]]) // size)
        padded = np.stack([np.pad(wavs[i], (0, frames * size - len(wavs[i]))) for i in batch])
        values = torch.from_numpy(padded)[:, None].to(codec.device)
        with one_thread() if codec.device.type == "cpu" else contextlib.nullcontext():
            encoded = codec.encode(values, num_quantizers=num_codebooks).audio_codes.cpu().numpy()
        for i, code in zip(batch, encoded, strict=True):
            codes[i] = code.T.astype(np.uint16)
    return codes


@torch.inference_mode()
def decode(codec, codes) -> list[np.ndarray]:
    """Return the speech of each array of codes (frames, codebooks): float32 mono, frames / frame_rate seconds long.

    Fewer codebooks than the codec has are allowed: the first ones, at lower quality. No frames give no samples. Raises
    ValueError for another shape or for a code that is not in the codebooks.
    """
    codes = [check_codes(codec, f"codes {number}", code) for number, code in enumerate(codes)]
    wavs = [np.zeros(0, np.float32)] * len(codes)
    for batch in _batch_equals(codec, [code.shape for code in codes]):
        if codes[batch[0]].size == 0:
            continue
        stacked = torch.from_numpy(np.stack([codes[i].T for i in batch])).to(codec.device)
        for i, wav in zip(batch, codec.decode(stacked).audio_values[:, 0].float().cpu().numpy(), strict=True):
            wavs[i] = wav
    return wavs


def round_trip(codec, wav, num_codebooks: int | None = None) -> np.ndarray:
    """Return what is left of a clip after the codec: float32, exactly as long as `wav`, to be compared with it."""
    return decode(codec, encode(codec, [wav], num_codebooks))[0][: len(wav)]


def check_samples(name: str, wav) -> np.ndarray:
    """Return samples as float32; raise ValueError, with their `name`, unless they are one row of finite numbers."""
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or len(wav) == 0 or not np.isfinite(wav).all():
        raise ValueError(f"{name}: shape {wav.shape}, or NaN in it; allowed is one row of finite samples")
    return wav


def check_codes(codec, name: str, codes) -> np.ndarray:
    """Return codes (frames, codebooks) as int64; raise ValueError, with their `name`, for another shape or values."""
    codes, limit = np.asarray(codes).astype(np.int64), codec.config.codebook_size
    if codes.ndim != 2:
        raise ValueError(f"{name}: shape {codes.shape}; allowed is (frames, codebooks)")
    check_codebooks(codec, codes.shape[1])
    if codes.size and not 0 <= codes.min() <= codes.max() < limit:
        raise ValueError(f"{name}: values from {codes.min()} to {codes.max()}; allowed are 0 to {limit - 1}")
    return codes


def check_causal(codec) -> None:
    """Raise ValueError for a codec that looks ahead, and so can not be streamed."""
    if not codec.config.use_causal_conv or codec.config.trim_right_ratio != 1:
        raise ValueError("this codec's convolutions look ahead (use_causal_conv, trim_right_ratio); it can not be streamed")


def check_codebooks(codec, num_codebooks: int | None) -> None:
    """Raise ValueError for a number of codebooks that the codec does not have; None is all of them."""
    least, most = codec.config.num_semantic_quantizers, codec.config.num_quantizers
    if num_codebooks is not None and not least <= num_codebooks <= most:
        raise ValueError(f"codebooks: found {num_codebooks}; this codec has {least} to {most}")


def _batch_equals(codec, shapes):
    """Return indices in batches of equal shape (frames, or (frames, codebooks)), BATCH_SECONDS of audio each at most."""
    limit = frame_rate(codec) * BATCH_SECONDS.get(codec.device.type, 60)
    groups = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    for shape, group in groups.items():
        frames = shape[0] if isinstance(shape, tuple) else shape
        count = max(1, int(limit / max(1, frames)))
        yield from (group[start : start + count] for start in range(0, len(group), count))
