"""moshi's Mimi and transformers' are one codec: same codes, same sound, whole, in batches and streamed."""

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from moshi.models.loaders import MIMI_NAME, get_mimi
from safetensors.torch import save_file
from transformers import MimiModel

from csm_nb.codec import moshi
from csm_nb.codec.mimi import BATCH_SECONDS, decode, encode, fingerprint_codec, frame_rate, load_codec, round_trip
from csm_nb.codec.moshi import MoshiCodec, convert_config, convert_moshi
from csm_nb.codec.stream import decode_stream, encode_stream
from csm_nb.hub import ModelError
from csm_nb.synth.espeak import speak_text

FRAME = 1920  # samples
SMALL = {
    "sample_rate": 24_000, "channels": 1, "frame_rate": 12.5,
    "seanet": {
        "channels": 1, "dimension": 64, "causal": True, "n_filters": 8, "n_residual_layers": 1, "activation": "ELU",
        "compress": 2, "dilation_base": 2, "disable_norm_outer_blocks": 0, "kernel_size": 7, "residual_kernel_size": 3,
        "last_kernel_size": 3, "norm": "none", "pad_mode": "constant", "ratios": [8, 6, 5, 4], "true_skip": True,
    },
    "quantizer": {"dimension": 16, "n_q": 8, "bins": 64, "input_dimension": 64, "output_dimension": 64},
    "transformer": {
        "d_model": 64, "num_heads": 2, "num_layers": 2, "causal": True, "layer_scale": 0.01, "context": 20,
        "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope",
        "dim_feedforward": 128, "input_dimension": 64, "output_dimensions": [64],
    },
}  # fmt: skip


def make_mimi(sizes=None):
    """A random Mimi of moshi's in which every weight matters: attention is peaked, no norm or scale is like another."""
    torch.manual_seed(0)
    mimi = get_mimi(None, sizes).requires_grad_(False)
    for name, value in mimi.named_parameters():
        if name.endswith(".scale"):
            value.uniform_(0.1, 0.5)
        elif ".norm" in name:
            value.add_(torch.randn_like(value), alpha=0.2)
        elif value.ndim > 1:
            value.mul_(3 if "in_proj" in name else 1.7)
    for name, value in mimi.named_buffers():
        if name.endswith("cluster_usage"):
            usage = value.uniform_(0.5, 2)
        elif name.endswith("embedding_sum"):  # of a size at which the residual shrinks from codebook to codebook
            value.normal_(0, 0.4).mul_(usage[:, None])
    return mimi


def make_clips(*frames):
    # In these clips the nearest code wins over the next by 5e-6 of its distance or more; float32 rounds that to 3e-7.
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.2, int(count * FRAME)).astype(np.float32) for count in frames]


@pytest.fixture(scope="module")
def full():
    """One full-size random Mimi: by moshi, and converted to transformers."""
    mimi = make_mimi()
    codec = MimiModel(convert_config(None)).eval().requires_grad_(False)
    codec.load_state_dict(convert_moshi(mimi.state_dict()))
    return {"moshi": MoshiCodec(mimi, convert_config(None)), "transformers": codec}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Mimi in a folder laid out as kyutai/moshiko-pytorch-bf16, its weights named as in the published file."""
    folder = tmp_path_factory.mktemp("moshiko")
    config = {"model_type": "moshi", "mimi_name": MIMI_NAME, "mimi_config_name": "mimi.json", "n_q": 16}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mimi.json").write_text(json.dumps(SMALL))
    state = make_mimi(SMALL).state_dict()
    renamed = {re.sub(r"out_projs\.0\.", "out_proj.", k): v for k, v in state.items()}
    renamed = {re.sub(r"in_projs\.0\.weight", "in_proj_weight", k): v for k, v in renamed.items()}
    save_file(renamed, folder / MIMI_NAME)
    return folder


@pytest.fixture(params=["transformers", "moshi"])
def small(request, folder):
    return load_codec(folder / MIMI_NAME, backend=request.param)


@pytest.mark.parametrize("codebooks", [1, 8, 32])
def test_a_full_size_mimi_gives_the_same_codes_and_sound_by_moshi_and_by_transformers(full, codebooks):
    (wav,) = make_clips(12.5)
    codes = {name: encode(codec, [wav], codebooks)[0] for name, codec in full.items()}
    assert codes["moshi"].shape == (13, codebooks)
    assert len(np.unique(codes["moshi"][:, 0])) >= 5  # it tells frames apart
    assert (codes["moshi"] == codes["transformers"]).mean() >= 0.99
    sound = {name: decode(codec, [codes["moshi"]])[0] for name, codec in full.items()}
    assert sound["moshi"].std() > 0.01
    np.testing.assert_allclose(sound["moshi"], sound["transformers"], atol=1e-4 * sound["moshi"].std())


@pytest.mark.parametrize("backend", ["transformers", "moshi"])
def test_a_full_size_mimi_gives_a_batch_of_equal_clips_the_codes_of_each_alone(full, backend, monkeypatch):
    monkeypatch.setitem(BATCH_SECONDS, "cpu", 60)
    wavs = make_clips(6, 6, 5)
    for wav, codes in zip(wavs, encode(full[backend], wavs), strict=True):
        assert np.array_equal(codes, encode(full[backend], [wav])[0])


def test_a_moshi_file_loads_by_either_backend_and_is_one_codec(folder):
    by_moshi, by_transformers = load_codec(folder, backend="moshi"), load_codec(folder / MIMI_NAME)
    assert type(by_moshi) is MoshiCodec and type(by_transformers) is MimiModel
    assert frame_rate(by_moshi) == frame_rate(by_transformers) == 12.5 and not by_moshi.training
    (wav,) = make_clips(40)
    codes = encode(by_moshi, [wav])[0]
    assert codes.dtype == np.uint16 and len(np.unique(codes)) > 30
    assert np.array_equal(codes, encode(by_transformers, [wav])[0])
    assert np.array_equal(codes[:, :3], encode(by_moshi, [wav], 3)[0])
    np.testing.assert_allclose(round_trip(by_moshi, wav, 3), round_trip(by_transformers, wav, 3), atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 25])
def test_a_stream_of_whole_frames_gives_codes_and_sound_of_the_whole_clip(small, size):
    (wav,) = make_clips(45)  # attention looks back over 10 frames: much is forgotten on the way
    codes = list(encode_stream(small, np.split(wav, range(size * FRAME, len(wav), size * FRAME))))
    assert [len(code) for code in codes[:-1]] == [size] * (len(codes) - 1)
    whole = encode(small, [wav])[0]
    assert np.array_equal(np.concatenate(codes), whole)
    sound = list(decode_stream(small, np.split(whole, range(size, len(whole), size))))
    assert [len(part) for part in sound] == [len(code) * FRAME for code in codes]
    np.testing.assert_allclose(np.concatenate(sound), decode(small, [whole])[0], atol=1e-5)


def test_chunks_of_any_length_give_the_codes_of_the_whole_clip(small):
    (wav,) = make_clips(6.3)
    codes = list(encode_stream(small, np.split(wav, [100, 3 * FRAME, 3 * FRAME + 7, len(wav) - 1]), 3))
    assert [len(code) for code in codes] == [0, 3, 0, 3, 0, 1]
    assert np.array_equal(np.concatenate(codes), encode(small, [wav], 3)[0])


def test_streams_and_whole_clips_go_on_side_by_side(small):
    wavs = make_clips(6, 6)
    streams = [encode_stream(small, np.split(wav, 3)) for wav in wavs]
    whole = encode(small, wavs)
    codes = []
    for pair in zip(*streams, strict=True):
        codes.append(pair)
        assert np.array_equal(encode(small, wavs[:1])[0], whole[0])
    for stream, expected in zip(zip(*codes, strict=True), whole, strict=True):
        assert np.array_equal(np.concatenate(stream), expected)
    pairs = list(zip(*(decode_stream(small, np.split(code, 3)) for code in whole), strict=True))
    for parts, code in zip(zip(*pairs, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(parts), decode(small, [code])[0], atol=1e-5)


def test_a_stream_that_is_left_leaves_the_codec_as_it_was(small):
    (wav,) = make_clips(4)
    before = encode(small, [wav])[0], round_trip(small, wav)
    next(encode_stream(small, [wav[: FRAME * 2]]))
    next(decode_stream(small, [before[0][:2]]))
    assert np.array_equal(encode(small, [wav])[0], before[0])
    np.testing.assert_allclose(round_trip(small, wav), before[1], atol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda c: encode_stream(c, [np.ones(5), np.full(5, np.nan)]), "chunk 1.*NaN"),
    (lambda c: encode_stream(c, [np.ones(5)], 9), "9.*1 to 8"),
    (lambda c: decode_stream(c, [np.zeros((2, 8)), np.full((2, 8), 64)]), "chunk 1.*64.*0 to 63"),
])
def test_what_is_no_chunk_of_a_stream_is_named(small, call, message):
    with pytest.raises(ValueError, match=message):
        list(call(small))


def test_a_codec_that_looks_ahead_is_not_streamed(small, monkeypatch):
    monkeypatch.setattr(small.config, "use_causal_conv", False)
    with pytest.raises(ValueError, match="look ahead"):
        list(encode_stream(small, make_clips(1)))


def test_of_a_hub_id_only_the_files_of_the_codec_are_fetched(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(moshi, "hf_hub_download", lambda repo, name, **_: asked.append((repo, name)) or folder / name)
    assert type(load_codec("kyutai/moshiko", backend="moshi")) is MoshiCodec
    assert list(dict.fromkeys(asked)) == [("kyutai/moshiko", name) for name in ("config.json", MIMI_NAME, "mimi.json")]


def test_a_hub_id_without_a_config_is_of_the_published_size(full, tmp_path, monkeypatch):
    save_file(full["moshi"].mimi.state_dict(), tmp_path / MIMI_NAME)

    def download(repo, name, **_):
        if name == "config.json":
            raise EntryNotFoundError("404")
        return tmp_path / name

    monkeypatch.setattr(moshi, "hf_hub_download", download)
    (wav,) = make_clips(2)
    loaded = load_codec("kyutai/moshiko", backend="moshi")
    assert np.array_equal(encode(loaded, [wav])[0], encode(full["moshi"], [wav])[0])


def test_a_hub_id_while_offline_says_how_to_download_the_codec_alone():
    with pytest.raises(ModelError, match=f"(?s)hf download kyutai/moshiko .*--include .{MIMI_NAME}.*--local-dir models/moshiko"):
        load_codec("kyutai/moshiko", backend="moshi")


def test_what_is_no_moshi_checkpoint_is_named(folder, tmp_path):
    with pytest.raises(ModelError, match="'mimi'; allowed are 'transformers' and 'moshi'"):
        load_codec(folder, backend="mimi")
    with pytest.raises(ModelError, match="no such folder.*csm-mini"):
        load_codec("models/mimi", backend="moshi")
    with pytest.raises(ModelError, match=f"(?s)asr-mini holds no {MIMI_NAME}.*config.json.*backend 'transformers'"):
        load_codec("models/asr-mini", backend="moshi")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ModelError, match="no safetensors file"):
        load_codec(tmp_path / "text.safetensors", backend="moshi")
    save_file({"encoder.layers.0.conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for backend in ("moshi", "transformers"):
        with pytest.raises(ModelError, match="other.safetensors is no Mimi.*Missing key"):
            load_codec(tmp_path / "other.safetensors", backend=backend)


def test_a_size_that_the_config_lacks_or_that_is_no_mimi_is_named():
    with pytest.raises(ModelError, match="no 'dim_feedforward'"):
        convert_config(SMALL | {"transformer": {k: v for k, v in SMALL["transformer"].items() if k != "dim_feedforward"}})
    with pytest.raises(ModelError, match="frame_rate 25.*12.5"):
        convert_config(SMALL | {"frame_rate": 25})


def test_moshi_runs_the_codec_inside_a_csm_as_transformers_does():
    by_moshi, by_transformers = (load_codec("models/csm-mini", backend=name) for name in ("moshi", "transformers"))
    assert type(by_moshi) is MoshiCodec
    wav = speak_text("Hun kommer hjem i aften.", "da")
    codes = encode(by_transformers, [wav])[0]
    assert len(np.unique(codes[:, 0])) >= 5 and (encode(by_moshi, [wav])[0] == codes).mean() >= 0.99
    sound, other = (decode(codec, [codes])[0] for codec in (by_transformers, by_moshi))
    np.testing.assert_allclose(other, sound, atol=1e-4 * sound.std())
    assert fingerprint_codec(by_moshi) == fingerprint_codec(by_transformers)
