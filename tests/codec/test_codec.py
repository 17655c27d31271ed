"""Codes in a batch are the codes of each clip alone, and the codec inside a CSM model is the codec."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig, MimiModel

from csm_nb.codec.mimi import BATCH_SECONDS, decode, encode, frame_rate, load_codec, round_trip
from csm_nb.hub import ModelError

SIZES = dict(
    sampling_rate=24_000, upsampling_ratios=[8, 6, 5, 4], num_filters=8, hidden_size=64, num_hidden_layers=1,
    intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_quantizers=8, codebook_size=64,
    codebook_dim=16, vector_quantization_hidden_dimension=16, upsample_groups=64, sliding_window=25,
)  # fmt: skip
FRAME = 1920  # samples


@pytest.fixture(scope="module")
def codec():
    """A random MimiModel that tells clips apart: PyTorch's own initial weights, codebooks of the latents' size."""
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**SIZES)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d | torch.nn.Linear):
            module.reset_parameters()
            module.weight.data *= 1.7
            if module.bias is not None:
                module.bias.data.zero_()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(0, 0.05)
        if name.endswith("cluster_usage"):
            buffer.fill_(1)
    return model


def make_clips(*lengths):
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.2, length).astype(np.float32) for length in lengths]


def test_codes_in_a_batch_are_the_codes_of_each_clip_alone(codec, monkeypatch):
    monkeypatch.setitem(BATCH_SECONDS, "cpu", 60)  # as on a GPU; a CPU would take them one by one
    wavs = make_clips(FRAME * 20, FRAME * 20, FRAME * 7 + 5, FRAME * 8 - 3, FRAME * 20, 17)
    together = encode(codec, wavs)
    for wav, codes in zip(wavs, together, strict=True):
        assert codes.dtype == np.uint16 and codes.shape == (-(-len(wav) // FRAME), 8)
        assert np.array_equal(codes, encode(codec, [wav])[0])
    assert len(np.unique(together[0])) > 30  # the codec tells sounds apart: equality is no accident
    assert (together[0] != together[1]).mean() > 0.5


def test_whole_frames_give_the_codes_of_transformers(codec):
    wav = make_clips(FRAME * 10)[0]
    with torch.inference_mode():
        expected = codec.encode(torch.from_numpy(wav)[None, None]).audio_codes[0].T.numpy()
    assert np.array_equal(encode(codec, [wav])[0], expected)


def test_a_partly_filled_last_frame_leaves_the_frames_before_it_alone(codec):
    wav = make_clips(FRAME * 10)[0]
    assert np.array_equal(encode(codec, [wav[: FRAME * 9 + 100]])[0][:9], encode(codec, [wav])[0][:9])


def test_decoding_in_a_batch_is_decoding_alone(codec, monkeypatch):
    monkeypatch.setitem(BATCH_SECONDS, "cpu", 60)
    codes = encode(codec, make_clips(FRAME * 5, FRAME * 5, FRAME * 9))
    for code, wav in zip(codes, decode(codec, codes), strict=True):
        assert wav.dtype == np.float32 and len(wav) == len(code) * FRAME
        assert np.allclose(wav, decode(codec, [code])[0], atol=1e-5)


def test_fewer_codebooks_are_the_first_ones(codec):
    wav = make_clips(FRAME * 6)[0]
    assert np.array_equal(encode(codec, [wav], 3)[0], encode(codec, [wav])[0][:, :3])
    assert not np.allclose(round_trip(codec, wav, 1), round_trip(codec, wav, 8))


@pytest.mark.parametrize("length", [1, FRAME - 1, FRAME, FRAME * 3 + 7])
def test_a_round_trip_keeps_the_length(codec, length):
    assert len(round_trip(codec, make_clips(length)[0])) == length


def test_frames_a_second(codec):
    assert frame_rate(codec) == 12.5
    assert len(encode(codec, make_clips(24_000 * 2))[0]) == 25


def test_no_frames_are_no_sound(codec):
    empty, one = decode(codec, [np.zeros((0, 8), np.uint16), np.zeros((1, 8), np.uint16)])
    assert len(empty) == 0 and len(one) == FRAME


@pytest.mark.parametrize(("call", "message"), [
    (lambda c: encode(c, [np.zeros(5), np.zeros(0)]), "clip 1"),
    (lambda c: encode(c, [np.array([np.nan, 0])]), "clip 0.*NaN"),
    (lambda c: encode(c, [np.zeros(5)], 9), "9.*1 to 8"),
    (lambda c: decode(c, [np.zeros((4, 8)), np.full((4, 8), 64)]), "codes 1.*64.*0 to 63"),
    (lambda c: decode(c, [np.zeros(8)]), "codes 0.*frames, codebooks"),
])
def test_what_is_no_clip_and_no_code_is_named(codec, call, message):
    with pytest.raises(ValueError, match=message):
        call(codec)


def make_csm(codec):
    return CsmForConditionalGeneration(CsmConfig(
        num_codebooks=8, vocab_size=67, text_vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, codebook_pad_token_id=66, bos_token_id=1,
        pad_token_id=2, eos_token_id=None, audio_token_id=2, audio_eos_token_id=3, codec_config=codec.config.to_dict(),
        depth_decoder_config={
            "num_codebooks": 8, "backbone_hidden_size": 32, "vocab_size": 67, "hidden_size": 32,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ))  # fmt: skip


def test_the_codec_of_a_csm_model_is_the_codec(codec, tmp_path):
    codec.save_pretrained(tmp_path / "mimi")
    csm = make_csm(codec)
    csm.codec_model.load_state_dict(codec.state_dict())
    csm.save_pretrained(tmp_path / "csm", max_shard_size="300KB")
    wav = make_clips(FRAME * 6)[0]
    for folder in ("mimi", "csm"):
        loaded = load_codec(tmp_path / folder)
        assert type(loaded) is MimiModel and not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert np.array_equal(encode(loaded, [wav])[0], encode(codec, [wav])[0])


def test_half_precision_checkpoints_load_in_float32(codec, tmp_path):
    make_csm(codec).to(torch.bfloat16).save_pretrained(tmp_path / "csm")
    assert {p.dtype for p in load_codec(tmp_path / "csm").parameters()} == {torch.float32}


def test_a_model_without_a_codec_is_named(codec, tmp_path, monkeypatch):
    csm = make_csm(codec)
    csm.save_pretrained(tmp_path, state_dict={k: v for k, v in csm.state_dict().items() if "quantizer" not in k})
    with pytest.raises(ModelError, match="codec weights.*quantizer"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="llama.*mimi.*csm"):
        load_codec(tmp_path)


def test_batches_are_bounded(codec, monkeypatch):
    monkeypatch.setitem(BATCH_SECONDS, "cpu", 60)
    seen = []
    encode_batch = codec.encode
    watched = SimpleNamespace(
        encode=lambda values, **options: seen.append(values.shape) or encode_batch(values, **options),
        config=codec.config, device=codec.device,
    )  # fmt: skip
    encode(watched, make_clips(*[24_000 * 12] * 7))
    assert [shape[0] for shape in seen] == [5, 2]
