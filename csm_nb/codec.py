"""The Mimi codec: speech to codes and back, in batches that give the same codes as one clip alone."""

import json
from collections import defaultdict

import numpy as np
import torch
from safetensors import safe_open
from transformers import MimiConfig, MimiModel

from csm_nb.hub import ModelError, fetch_model

# Seconds of audio in one batch at most; a longer clip is a batch of its own. A CPU works clip by clip: 16 clips of 2 s are
# encoded at 51 x real time together and 75 x one by one, decoded at 64 and 127 (csm-mini, one core: out of its cache).
BATCH_SECONDS = {"cpu": 2, "cuda": 60}
_INSIDE_CSM = "codec_model."


def pick_device(device: str = "auto") -> str:
    """"auto" becomes "cuda" where there is one, else "cpu"; anything else is passed through to torch."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_codec(model, device: str = "cpu") -> MimiModel:
    """Return the MimiModel of a folder or hub id, in float32 and eval mode; of a CSM model, the codec inside it.

    Of a CSM checkpoint only the codec's tensors are read, so that its language model takes no memory. `device` may be
    "auto". Raises hub.ModelError for a model that is not there, is neither Mimi nor CSM, or lacks codec weights.
    """
    path = fetch_model(model)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "mimi":
        codec = MimiModel.from_pretrained(path, dtype=torch.float32)
    elif kind == "csm":
        codec = MimiModel(MimiConfig.from_dict(config["codec_config"]))
        missing = codec.load_state_dict(_read_codec_weights(path), strict=False).missing_keys
        if missing:
            raise ModelError(
                f"{model}: {len(missing)} codec weights are not in {path}/*.safetensors, {_INSIDE_CSM}{missing[0]} "
                "first; fetch the model again, or set codec_model to kyutai/mimi"
            )
    else:
        raise ModelError(f"{model}: {path}/config.json says model_type {kind!r}; allowed are 'mimi' and 'csm'")
    return codec.float().to(pick_device(device)).eval().requires_grad_(False)


def _read_codec_weights(path):
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.startswith(_INSIDE_CSM):
                    weights[name.removeprefix(_INSIDE_CSM)] = tensors.get_tensor(name).float()
    return weights


def frame_rate(codec: MimiModel) -> float:
    """Return how many frames of codes a codec makes a second (12.5 for Mimi)."""
    return codec.config.sampling_rate / codec.config.frame_size


@torch.inference_mode()
def encode(codec: MimiModel, wavs, num_codebooks: int | None = None) -> list[np.ndarray]:
    """Return the codes of each clip: uint16 of shape (frames, codebooks); `wavs` are float32 mono at the codec's rate.

    Each clip is filled up with zeros to whole frames, as moshi's own `MimiModel.encode` does, and clips of equally many
    frames share a batch: there is no padding left that could change a code. (transformers pads inside each convolution
    instead; the last, partly filled frame can differ from this.) `num_codebooks` takes the first ones, default all.
    Raises ValueError for a clip without samples or with NaN, and for more codebooks than there are.
    """
    _check_codebooks(codec, num_codebooks)
    size = codec.config.frame_size
    wavs = [np.asarray(wav, dtype=np.float32) for wav in wavs]
    for number, wav in enumerate(wavs):
        if wav.ndim != 1 or len(wav) == 0 or not np.isfinite(wav).all():
            raise ValueError(f"clip {number}: shape {wav.shape}, or NaN in it; allowed is one row of finite samples")
    codes = [None] * len(wavs)
    for batch in _batch_equals(codec, [-(-len(wav) // size) for wav in wavs]):
        frames = -(-len(wavs[batch[0]]) // size)
        padded = np.stack([np.pad(wavs[i], (0, frames * size - len(wavs[i]))) for i in batch])
        values = torch.from_numpy(padded)[:, None].to(codec.device)
        encoded = codec.encode(values, num_quantizers=num_codebooks).audio_codes.cpu().numpy()
        for i, code in zip(batch, encoded, strict=True):
            codes[i] = code.T.astype(np.uint16)
    return codes


@torch.inference_mode()
def decode(codec: MimiModel, codes) -> list[np.ndarray]:
    """Return the speech of each array of codes (frames, codebooks): float32 mono, frames / frame_rate seconds long.

    Fewer codebooks than the codec has are allowed: the first ones, at lower quality. No frames give no samples. Raises
    ValueError for another shape or for a code that is not in the codebooks.
    """
    codes = [np.asarray(code).astype(np.int64) for code in codes]
    limit = codec.config.codebook_size
    for number, code in enumerate(codes):
        if code.ndim != 2:
            raise ValueError(f"codes {number}: shape {code.shape}; allowed is (frames, codebooks)")
        _check_codebooks(codec, code.shape[1])
        if code.size and not 0 <= code.min() <= code.max() < limit:
            raise ValueError(f"codes {number}: values from {code.min()} to {code.max()}; allowed are 0 to {limit - 1}")
    wavs = [np.zeros(0, np.float32)] * len(codes)
    for batch in _batch_equals(codec, [code.shape for code in codes]):
        if codes[batch[0]].size == 0:
            continue
        stacked = torch.from_numpy(np.stack([codes[i].T for i in batch])).to(codec.device)
        for i, wav in zip(batch, codec.decode(stacked).audio_values[:, 0].float().cpu().numpy(), strict=True):
            wavs[i] = wav
    return wavs


def round_trip(codec: MimiModel, wav, num_codebooks: int | None = None) -> np.ndarray:
    """Return what is left of a clip after the codec: float32, exactly as long as `wav`, to be compared with it."""
    return decode(codec, encode(codec, [wav], num_codebooks))[0][: len(wav)]


def _check_codebooks(codec, num_codebooks):
    least, most = codec.config.num_semantic_quantizers, codec.config.num_quantizers
    if num_codebooks is not None and not least <= num_codebooks <= most:
        raise ValueError(f"codebooks: found {num_codebooks}; this codec has {least} to {most}")


def _batch_equals(codec, shapes):
    """Indices in batches of equal shape (frames, or (frames, codebooks)), BATCH_SECONDS of audio each at most."""
    limit = frame_rate(codec) * BATCH_SECONDS.get(codec.device.type, 60)
    groups = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    for shape, group in groups.items():
        frames = shape[0] if isinstance(shape, tuple) else shape
        count = max(1, int(limit / max(1, frames)))
        yield from (group[start : start + count] for start in range(0, len(group), count))
