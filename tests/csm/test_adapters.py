"""Adapters on one base: each says its own, in any order and beside any other, and the base stays what it was."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm_nb.csm.adapters import AdapterError, add_adapter, describe_base, load_adapter, load_full, remove_adapters
from csm_nb.csm.load import BACKBONE_TABLE, load_base
from csm_nb.csm.record import set_record
from csm_nb.csm.save import save_adapter, save_base
from csm_nb.csm.weights import hash_weights, list_weights
from csm_nb.paths import ROOT

MINI = ROOT / "models/csm-mini"
KINDS = {"lora_no": (4, True), "lora_sv": (8, False), "lora_da": (2, True)}  # rank, with a text table


def make_adapter(folder, rank=4, text=True, seed=0, std=0.1, dtype="float32"):
    torch.manual_seed(seed)
    model, _ = load_base("models/csm-mini", "cpu", dtype)
    model = add_adapter(model, rank, 2 * rank, 0.0, mlp=text, text_embeddings=text)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=std)
            elif "modules_to_save" in name:
                value.add_(0.1 * torch.randn_like(value))
    return save_adapter(model, folder, {}, "models/csm-mini")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(place / name, rank, text, seed) for seed, (name, (rank, text)) in enumerate(KINDS.items())}


@pytest.fixture
def base():
    return load_base("models/csm-mini", "cpu")[0]


@torch.inference_mode()
def compute_logits(model):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([range(9, 20)])  # letters
    hidden = inner.backbone_model(inputs_embeds=inner.embed_text_tokens(ids).to(inner.lm_head.weight.dtype)).last_hidden_state
    depth = inner.depth_decoder(input_ids=torch.ones(1, 2, dtype=torch.long), backbone_last_hidden_state=hidden[:, -1]).logits
    return torch.cat([inner.lm_head(hidden).flatten(), depth.flatten()])


def test_an_adapter_says_the_same_alone_and_beside_others_in_any_order(adapters, base):
    own = {name: compute_logits(load_adapter(load_base("models/csm-mini", "cpu")[0], each)) for name, each in adapters.items()}
    before = compute_logits(base)
    for order in itertools.permutations(adapters):
        model = base
        for name in order:
            model = load_adapter(model, adapters[name], name=name)
            assert torch.equal(compute_logits(model), own[name])
        for name in (*order, *reversed(order)):
            model.set_adapter(name)
            assert torch.equal(compute_logits(model), own[name])
            with model.disable_adapter():
                assert torch.equal(compute_logits(model), before)
        base = remove_adapters(model)
        assert torch.equal(compute_logits(base), before)
    assert len({str(value[:50].tolist()) for value in (before, *own.values())}) == 4


def test_base_is_the_same_before_and_after_adapters_to_the_last_key_and_bit(adapters, base):
    state, modules = {name: value.clone() for name, value in base.state_dict().items()}, [type(m) for m in base.modules()]
    model = base
    for name, folder in adapters.items():
        model = load_adapter(model, folder, name=name)
    assert remove_adapters(model) is base
    assert list(base.state_dict()) == list(state) and [type(m) for m in base.modules()] == modules
    assert all(torch.equal(base.state_dict()[name], value) for name, value in state.items())
    assert not hasattr(base, "peft_config") and not any(p.requires_grad for p in base.parameters())


def test_a_name_that_is_taken_is_refused(adapters, base):
    model = load_adapter(base, adapters["lora_no"], name="no")
    with pytest.raises(AdapterError, match="name 'no' is on the model already"):
        load_adapter(model, adapters["lora_sv"], name="no")


def test_a_loaded_adapter_is_the_one_that_was_saved(adapters, base):
    stored = load_file(adapters["lora_no"] / "adapter_model.safetensors")
    held = load_adapter(base, adapters["lora_no"]).state_dict()
    for name, value in stored.items():
        name = name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
        assert torch.equal(held[name.replace("embed_text_tokens", "embed_text_tokens.modules_to_save.default")], value)


def break_keys(share):
    def change(folder):
        state = load_file(folder / "adapter_model.safetensors")
        state = {key.replace("layers", "blocks") if i < share * len(state) else key: value
                 for i, (key, value) in enumerate(sorted(state.items()))}
        save_file(state, folder / "adapter_model.safetensors")
    return change


def drop_table(folder):
    state = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in state.items() if "embed_text" not in key}, folder / "adapter_model.safetensors")


def change_tensor(function):
    def change(folder):
        state = load_file(folder / "adapter_model.safetensors")
        save_file({key: function(key, value) for key, value in state.items()}, folder / "adapter_model.safetensors")
    return change


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_json(name, **changes):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return change


@pytest.mark.parametrize(("change", "message"), {
    "keys renamed": (break_keys(1), r"112 of 113 keys match nothing in this base, such as base_model.*blocks"),
    "some keys renamed": (break_keys(0.5), r"57 of 113 keys match nothing"),
    "table missing": (drop_table, r"1 of 113 keys are missing in it, such as base_model.model.embed_text_tokens.weight"),
    "half a file": (cut, "can not be read .*half a file"),
    "a pointer": (lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs"), "can not be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "config of an adapter and no weights"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json.*03_adapter"),
    "broken record": (lambda f: (f / "base.json").write_text("{"), "can not be read"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "can not be read"),
    "another rank": (change_json("adapter_config.json", r=3), "can not be put on this base.*size mismatch"),
    "layers that are not there": (change_json("adapter_config.json", target_modules=["nothing"]), "can not be put on this base"),
    "a layer that breaks halfway": (change_json("adapter_config.json", rank_pattern={"depth_decoder.*": -1}),
                                    "can not be put on this base"),
    "another kind": (change_json("adapter_config.json", peft_type="IA3"), "type IA3; allowed is LORA"),
    "another shape": (change_json("base.json", hidden_size=2048), "trained on another base, models/csm-mini.*2048"),
    "other weights": (change_json("base.json", weights="0" * 16), "a base of the same shape with other weights"),
    "no numbers": (change_tensor(lambda k, v: v * float("nan") if "lora_B" in k else v), "weights that are no numbers"),
}.values(), ids=lambda value: "")
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(adapters, base, tmp_path, change, message):
    broken = shutil.copytree(adapters["lora_no"], tmp_path / "lora_no")
    change(broken)
    before, keys = compute_logits(base), list(base.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, broken)
    assert list(base.state_dict()) == keys and torch.equal(compute_logits(base), before)
    model = load_adapter(base, adapters["lora_sv"], name="sv")
    own = compute_logits(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, broken, name="no")
    assert model.active_adapter == "sv" and torch.equal(compute_logits(model), own)


def test_an_adapter_that_was_never_trained_is_refused(base, tmp_path):
    folder = save_adapter(add_adapter(base, 4, 8, 0.0), tmp_path / "lora_no")
    with pytest.raises(AdapterError, match="changes nothing"):
        load_adapter(load_base("models/csm-mini", "cpu")[0], folder)


def test_the_record_of_an_adapter_says_where_its_texts_were_read_out(base, tmp_path):
    model = add_adapter(base, 4, 8, 0.0)
    for read_out in (False, True):
        set_record(model, read_out=read_out)
        record = json.loads((save_adapter(model, tmp_path / "lora_no") / "base.json").read_text())
        assert record.get("read_out", False) == read_out


def test_an_adapter_whose_text_table_alone_was_trained_changes_something(base, tmp_path):
    model = add_adapter(base, 4, 8, 0.0, text_embeddings=True)
    letter = base_tokens("ø")
    with torch.no_grad():
        model.get_base_model().embed_text_tokens.modules_to_save["default"].weight[letter] += 1
    assert load_adapter(load_base("models/csm-mini", "cpu")[0], save_adapter(model, tmp_path / "lora_no"))


def base_tokens(text):
    return load_base("models/csm-mini", "cpu")[1].tokenizer(text, add_special_tokens=False).input_ids[0]


def test_an_adapter_on_one_decoder_alone_changes_something(base, tmp_path):
    model = add_adapter(base, 4, 8, 0.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "depth_decoder" in name and "lora_B" in name:
                value.normal_(std=0.1)
    assert load_adapter(load_base("models/csm-mini", "cpu")[0], save_adapter(model, tmp_path / "lora_no"))


def test_an_adapter_of_a_base_of_the_same_shape_is_refused(adapters, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    other, _ = load_base(save_base(model, processor, tmp_path / "csm-other"), "cpu")
    with pytest.raises(AdapterError, match="same shape with other weights, models/csm-mini"):
        load_adapter(other, adapters["lora_no"])


def test_the_hash_of_a_base_is_of_its_weights_alone(tmp_path):
    state = load_file(MINI / "model.safetensors")
    copy = shutil.copytree(MINI, tmp_path / "moved")
    (copy / "README.md").write_text("another card")
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[:100], names[100:])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, copy / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (copy / "model.safetensors").unlink()
    assert hash_weights(copy) == hash_weights(MINI) != ""
    for dtype in ("float32", "bfloat16"):
        assert describe_base(load_base(copy, "cpu", dtype)[0])["weights"] == hash_weights(MINI)
    save_file(state | {BACKBONE_TABLE: state[BACKBONE_TABLE] * 2}, tmp_path / "model.safetensors")
    shutil.copy(MINI / "config.json", tmp_path)
    assert hash_weights(tmp_path) != hash_weights(MINI)


def test_original_weights_beside_those_that_transformers_reads_do_not_count(tmp_path):
    copy = shutil.copytree(MINI, tmp_path / "csm-1b")
    (copy / "model.safetensors").rename(copy / "transformers.safetensors")
    save_file({"backbone.weight": torch.ones(3)}, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": "transformers.safetensors"}))
    assert list_weights(copy) == [copy / "transformers.safetensors"] and hash_weights(copy) == hash_weights(MINI)


def test_half_a_file_of_a_fully_trained_model_is_refused(base, tmp_path):
    data = (MINI / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="can not be read .*half a file"):
        load_full(base, tmp_path)


def test_a_fresh_adapter_begins_with_what_its_seed_draws_whatever_was_drawn_before():
    def draw(seed, before):
        model, _ = load_base("models/csm-mini", "cpu")
        torch.manual_seed(before)
        state = add_adapter(model, 4, 8, 0.0, seed=seed).state_dict()
        after = torch.rand(1)
        torch.manual_seed(before)
        assert torch.equal(after, torch.rand(1))  # and draws nothing from what goes on
        return torch.cat([value.flatten() for name, value in state.items() if "lora_A" in name])

    assert torch.equal(draw(0, before=1), draw(0, before=2)) and not torch.equal(draw(0, before=1), draw(1, before=1))
