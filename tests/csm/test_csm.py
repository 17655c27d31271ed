"""A base model that is loaded right, and adapters that go where they belong."""

import importlib.machinery
import re
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CsmForConditionalGeneration
from transformers.utils import import_utils

from csm_nb.csm.adapters import AdapterError, add_adapter, describe_adapter, load_adapter, load_full, start_training, train_fully
from csm_nb.csm.load import BACKBONE_TABLE, DEPTH_TABLE, NOT_QUANTISED, BaseModelError, encode_text, load_base, tie_codebooks
from csm_nb.csm.save import save_adapter, save_base, save_full, save_trained
from csm_nb.paths import ROOT
from csm_nb.speak.generate import speak

MINI = ROOT / "models/csm-mini"


def is_tied(model):
    tables = model.backbone_model.embed_tokens.embed_audio_tokens.weight, model.depth_decoder.model.embed_tokens.weight
    return tables[0].data_ptr() == tables[1].data_ptr()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with weights that matter, in a folder."""
    torch.manual_seed(0)
    model, _ = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0, mlp=True, text_embeddings=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "lora_no", {"data": "noise"}, str(MINI))


def test_the_shipped_checkpoint_holds_one_codebook_table_and_loads_with_both_tied():
    names = load_file(MINI / "model.safetensors").keys()
    assert (BACKBONE_TABLE in names) != (DEPTH_TABLE in names)
    model, processor = load_base("models/csm-mini", "cpu")
    assert is_tied(model)
    stored = load_file(MINI / "model.safetensors")[BACKBONE_TABLE].float()
    assert torch.equal(model.depth_decoder.model.embed_tokens.weight, stored)


def test_the_codec_keeps_every_digit_where_the_language_model_is_bfloat16():
    model, _ = load_base("models/csm-mini", "cpu", torch.bfloat16)
    whole, _ = load_base("models/csm-mini", "cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name, value in whole.codec_model.state_dict().items():
        assert torch.equal(model.codec_model.state_dict()[name], value), name


def test_what_needs_a_gpu_is_refused_without_one_and_says_what_is_allowed():
    with pytest.raises(BaseModelError, match="four_bit was asked for on 'cpu'.*set four_bit to false"):
        load_base("models/csm-mini", "cpu", four_bit=True)
    with pytest.raises(BaseModelError, match="backend 'unsloth' was asked for on 'cpu'.*'transformers'"):
        load_base("models/csm-mini", "cpu", backend="unsloth")
    with pytest.raises(BaseModelError, match="backend is 'vllm'; allowed are 'transformers' and 'unsloth'"):
        load_base("models/csm-mini", "cpu", backend="vllm")


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU, and puts what should go there into its memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(CsmForConditionalGeneration, "to", lambda model, device: model)
    yield
    monkeypatch.undo()
    for remembered in vars(import_utils).values():  # transformers keeps its first answers: later tests would believe in a GPU
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


def test_four_bit_takes_the_layers_of_both_decoders_and_nothing_else(gpu, monkeypatch):
    load, asked = CsmForConditionalGeneration.from_pretrained, {}
    monkeypatch.setattr(CsmForConditionalGeneration, "from_pretrained", lambda path, **options: (
        asked.update(options), load(path, **options | {"device_map": {"": "cpu"}}))[1])  # bitsandbytes works on a CPU, slowly
    model, processor = load_base("models/csm-mini", four_bit=True)
    settings = asked["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and asked["device_map"] == {"": 0}
    assert settings.bnb_4bit_compute_dtype == asked["dtype"] == torch.bfloat16
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantised == {name for name in linear if re.match(r"(backbone_model|depth_decoder\.model)\.layers\.", name)}
    assert is_tied(model)
    with pytest.raises(BaseModelError, match="4 bits can not be trained fully"):
        train_fully(model)
    adapted = add_adapter(model, 4, 8, 0.0)
    embeds = torch.randn(1, 9, model.config.hidden_size, dtype=torch.bfloat16)
    labels = torch.ones(1, 9, model.config.num_codebooks, dtype=torch.long)
    adapted(inputs_embeds=embeds, labels=labels).loss.backward()
    assert all(value.grad is not None for name, value in adapted.named_parameters() if "lora_B" in name)


def test_what_is_kept_out_of_4_bits_is_named_as_the_model_names_it():
    model, _ = load_base("models/csm-mini", "cpu")
    assert set(NOT_QUANTISED) <= {name for name, _ in model.named_modules()}


def test_a_backend_that_is_not_installed_says_what_to_install(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(BaseModelError, match="needs the package unsloth.*make setup EXTRAS=gpu"):
        load_base("models/csm-mini", backend="unsloth")


class FastModel:
    """Unsloth's, as far as it was read (2026.10.9): float32, with float16 for these names, whatever is asked for."""

    asked = {}

    @classmethod
    def from_pretrained(cls, model_name, **options):
        cls.asked = options
        model = CsmForConditionalGeneration.from_pretrained(model_name, dtype=torch.float32)
        for name, module in model.named_modules():
            if name.endswith(("_proj", "fc", "head")) or "codebook" in name:
                module.half()
        model.backbone_model.embed_tokens.embed_audio_tokens.weight = model.depth_decoder.model.embed_tokens.weight
        return model, None  # tied as Unsloth ties them: here to the one that the checkpoint lacks


@pytest.fixture
def unsloth(gpu, monkeypatch):
    module = types.ModuleType("unsloth")
    module.__spec__, module.FastModel = importlib.machinery.ModuleSpec("unsloth", None), FastModel
    monkeypatch.setitem(sys.modules, "unsloth", module)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_unsloth_s_model_is_the_stored_one_in_the_dtype_asked_for_and_speaks(unsloth, dtype):
    model, processor = load_base("models/csm-mini", dtype=dtype, backend="unsloth")
    assert not FastModel.asked["load_in_4bit"] and FastModel.asked["offload_embedding"] is False
    assert FastModel.asked["auto_model"] is CsmForConditionalGeneration and FastModel.asked["max_seq_length"] == 2048
    ours, _ = load_base("models/csm-mini", "cpu", dtype)
    held, wanted = model.state_dict(), ours.state_dict()
    assert is_tied(model) and held.keys() == wanted.keys()
    for name, value in wanted.items():
        assert held[name].dtype == value.dtype and torch.equal(held[name], value), name
    assert {name: value.dtype for name, value in model.named_buffers()} == {
        name: value.dtype for name, value in ours.named_buffers()}
    (speech,) = speak(add_adapter(model, 4, 8, 0.0, text_embeddings=True), processor, ["Good morning."])
    assert speech.ended


def test_unsloth_in_4_bits_is_given_the_same_layers(unsloth):
    load_base("models/csm-mini", four_bit=True, backend="unsloth")
    assert FastModel.asked["load_in_4bit"] and FastModel.asked["quantization_config"].llm_int8_skip_modules == list(NOT_QUANTISED)


def test_full_training_starts_from_the_checkpoint_s_own_digits_whatever_dtype_says(gpu, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    with torch.no_grad():
        model.lm_head.weight.add_(1e-5)  # bfloat16 has no digits for this
    folder = save_base(model, processor, tmp_path / "base", dtype=None)
    for dtype in ("auto", "bfloat16"):
        loaded, _ = load_base(folder, "cuda", dtype, method="full")
        assert torch.equal(start_training(loaded, "full").lm_head.weight, model.lm_head.weight)
        rounded, _ = load_base(folder, "cuda", dtype)
        with pytest.raises(BaseModelError, match="torch.bfloat16, which rounded.*method='full'"):
            start_training(rounded, "full")


def test_a_checkpoint_without_codebook_tables_is_refused():
    model, _ = load_base("models/csm-mini", "cpu")
    with pytest.raises(ValueError, match="neither"):
        tie_codebooks(model, [BACKBONE_TABLE, DEPTH_TABLE])


def test_two_different_codebook_tables_are_refused():
    model, _ = load_base("models/csm-mini", "cpu")
    depth = model.depth_decoder.model.embed_tokens
    depth.weight = torch.nn.Parameter(torch.zeros_like(depth.weight))
    with pytest.raises(ValueError, match="different"):
        tie_codebooks(model)


def test_adapter_sits_on_both_decoders_and_leaves_the_codec_untouched(adapter):
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert any("backbone_model.layers" in name for name in names)
    assert any("depth_decoder.model.layers" in name for name in names)
    assert not any("codec_model" in name for name in names)
    assert any("embed_text_tokens" in name for name in names)  # a trained text table is saved with it


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A fully trained model in a folder, and the weights that it was trained to."""
    torch.manual_seed(0)
    model, processor = load_base("models/csm-mini", "cpu")
    train_fully(model)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * value.std() * torch.randn_like(value) if value.requires_grad else 0
    folder = tmp_path_factory.mktemp("full") / "csm-no"
    folder.mkdir()
    (folder / "stale.safetensors").write_bytes(b"of an earlier one")
    return save_full(model, processor, folder, {"data": "noise", "licence": "CC0"}, str(MINI)), model


def test_full_training_takes_everything_but_the_codec():
    model, _ = load_base("models/csm-mini", "cpu")
    trained = {name for name, value in train_fully(model).named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("codec_model.")}
    without = {name for name, value in train_fully(model, text_embeddings=False).named_parameters() if value.requires_grad}
    assert trained - without == {"embed_text_tokens.weight"}


def test_a_full_model_comes_back_as_it_was_trained_and_its_codec_to_the_last_digit(full):
    folder, trained = full
    names = load_file(folder / "model.safetensors").keys()
    assert BACKBONE_TABLE in names and DEPTH_TABLE not in names and not (folder / "stale.safetensors").exists()
    model, processor = load_base(folder, "cpu")
    assert is_tied(model)
    held = model.state_dict()
    for name, value in trained.state_dict().items():
        stored = value if name.startswith("codec_model.") or not value.is_floating_point() else value.bfloat16().float()
        assert torch.equal(held[name], stored), name


def test_full_training_goes_on_from_what_the_stage_before_learned_to_the_last_digit(tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    with torch.no_grad():
        for value in train_fully(model).lm_head.parameters():
            value.add_(1e-5)
    folder = save_trained(model, processor, tmp_path / "full_no")
    other = start_training(load_base("models/csm-mini", "cpu")[0], "full", folder, text_embeddings=True)
    assert is_tied(other) and other.lm_head.weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_weights_of_another_shape_or_none_are_refused(tmp_path):
    model, _ = load_base("models/csm-mini", "cpu")
    with pytest.raises(AdapterError, match="holds no fully trained model.*method=full"):
        load_full(model, tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != DEPTH_TABLE}
    save_file(state | {"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="another shape.*lm_head.weight"):
        load_full(model, tmp_path)


def test_an_unknown_method_or_dtype_is_refused_with_those_that_are_allowed():
    model, _ = load_base("models/csm-mini", "cpu")
    with pytest.raises(BaseModelError, match="'dora'; allowed are lora and full"):
        start_training(model, "dora")
    with pytest.raises(BaseModelError, match="'fp8'; allowed are auto, bfloat16, float32"):
        load_base("models/csm-mini", dtype="fp8")


def test_an_adapter_is_not_saved_as_a_whole_model_and_nothing_is_left_behind(adapter, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    whole = save_base(model, processor, tmp_path / "csm", dtype=None)
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(BaseModelError, match="adapter on it can not be saved whole.*save_adapter"):
        save_base(load_adapter(model, adapter), processor, whole)
    assert (whole / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["csm"]


def test_a_full_disk_leaves_the_adapter_that_was_there(adapter, tmp_path, monkeypatch):
    model, _ = load_base("models/csm-mini", "cpu")
    folder = shutil.copytree(adapter, tmp_path / "lora_no")
    loaded = load_adapter(model, adapter)

    def fail(place, **options):
        (place / "adapter_model.safetensors").write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(loaded, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["lora_no"] and load_adapter(load_base(device="cpu")[0], folder)


def test_going_on_from_an_adapter_trains_it_and_none_starts_fresh(adapter):
    model, _ = load_base("models/csm-mini", "cpu")
    resumed = start_training(model, "lora", adapter, 4, 8, 0.0)
    trained = {name for name, value in resumed.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in resumed.named_parameters() if "lora_" in name or "modules_to_save" in name}
    model, _ = load_base("models/csm-mini", "cpu")
    fresh = start_training(model, "lora", None, 4, 8, 0.0)
    assert all(p.abs().max() == 0 for n, p in fresh.named_parameters() if "lora_B" in n)


def test_an_adapter_that_is_gone_on_from_shows_its_own_rank_and_layers(adapter):
    table = describe_adapter(start_training(load_base(device="cpu")[0], "lora", adapter))
    assert (table["rank"], table["alpha"], table["dropout"]) == (4, 8, 0.0) and table["text embeddings trained"]
    assert "up_proj" in table["layers of backbone_model"] and "layers of codec_model" not in table
    fresh = describe_adapter(add_adapter(load_base(device="cpu")[0], 8, 16, 0.1))
    assert fresh["rank"] == 8 and fresh["layers of backbone_model"] == "k_proj, o_proj, q_proj, v_proj"
    assert not fresh["text embeddings trained"]


def test_trained_parameters_are_counted_as_torch_counts_them():
    model, _ = load_base(device="cpu")
    adapted = add_adapter(model, 4, 8, 0.0, text_embeddings=True)
    count = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    assert describe_adapter(adapted)["trained parameters (M)"] == pytest.approx(count / 1e6, abs=1e-3)
    whole = train_fully(load_base(device="cpu")[0])
    codec = sum(value.numel() for value in whole.codec_model.parameters())
    total = sum(value.numel() for value in whole.parameters())
    assert describe_adapter(whole)["share of all"] == pytest.approx(1 - codec / total, abs=1e-4)


def test_the_prompt_is_what_the_chat_template_makes():
    _, processor = load_base("models/csm-mini", "cpu")
    chat = [{"role": "2", "content": [{"type": "text", "text": "Kjøp tjue kjeks!"}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert encode_text(processor, "Kjøp tjue kjeks!", "2") == torch.as_tensor(ids).flatten().tolist()
