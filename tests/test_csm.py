"""A base model that is loaded right, and adapters that go where they belong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from csm_nb.csm import (
    BACKBONE_TABLE,
    DEPTH_TABLE,
    AdapterError,
    add_adapter,
    check_base,
    encode_text,
    load_adapter,
    load_base,
    save_adapter,
    start_adapter,
    tie_codebooks,
)
from csm_nb.params import ROOT

MINI = ROOT / "models/csm-mini"


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
    assert all(check_base(model, processor, ["Jeg så på øya."]).values())
    stored = load_file(MINI / "model.safetensors")[BACKBONE_TABLE].float()
    assert torch.equal(model.depth_decoder.model.embed_tokens.weight, stored)


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


def test_saved_adapter_loads_with_transformers_and_peft_alone_and_changes_what_is_said(adapter):
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoProcessor, CsmForConditionalGeneration
base = CsmForConditionalGeneration.from_pretrained({str(MINI)!r}, dtype=torch.float32)
base.depth_decoder.model.embed_tokens.weight = base.backbone_model.embed_tokens.embed_audio_tokens.weight
inputs = AutoProcessor.from_pretrained({str(MINI)!r})("<|begin_of_text|>[0]Hei du.<|end_of_text|>", return_tensors="pt")
say = lambda m: m.generate(**inputs, max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False)
before = say(base)
after = say(PeftModel.from_pretrained(base, {str(adapter)!r}))
print("changed" if before.shape != after.shape or not torch.equal(before, after) else "same")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.stdout.strip() == "changed", result.stderr[-2000:]


def test_a_loaded_adapter_is_the_one_that_was_saved(adapter):
    model, _ = load_base("models/csm-mini", "cpu")
    loaded = load_adapter(model, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    held = {k.replace(".default", "").replace(".weight", ""): v for k, v in loaded.state_dict().items() if "lora_B" in k}
    for name, value in stored.items():
        if "lora_B" in name:
            assert torch.equal(held[name.replace(".weight", "")], value)


def test_going_on_from_an_adapter_trains_it_and_none_starts_fresh(adapter):
    model, _ = load_base("models/csm-mini", "cpu")
    resumed = start_adapter(model, adapter, 4, 8, 0.0)
    assert any(p.requires_grad for p in resumed.parameters())
    model, _ = load_base("models/csm-mini", "cpu")
    fresh = start_adapter(model, None, 4, 8, 0.0)
    assert all(p.abs().max() == 0 for n, p in fresh.named_parameters() if "lora_B" in n)


def test_a_folder_without_an_adapter_is_an_error_that_says_what_to_run(tmp_path):
    model, _ = load_base("models/csm-mini", "cpu")
    with pytest.raises(AdapterError, match="03_adapter"):
        load_adapter(model, tmp_path)


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "lora_sv")
    shape = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps(shape | {"hidden_size": 2048}))
    model, _ = load_base("models/csm-mini", "cpu")
    with pytest.raises(AdapterError, match="trained on"):
        load_adapter(model, other)


def test_the_prompt_is_what_the_chat_template_makes():
    _, processor = load_base("models/csm-mini", "cpu")
    chat = [{"role": "2", "content": [{"type": "text", "text": "Kjøp tjue kjeks!"}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert encode_text(processor, "Kjøp tjue kjeks!", "2") == torch.as_tensor(ids).flatten().tolist()
