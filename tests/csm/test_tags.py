"""What stands before a text is what an adapter was trained with: in training, in its folder, on the model, and nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from csm_nb.csm.adapters import AdapterError, describe_adapter, load_adapter, remove_adapters, start_training
from csm_nb.csm.load import encode_text, load_base
from csm_nb.csm.save import save_trained
from csm_nb.csm.tags import FIRST_ROW, KINDS, PHONE_ROW, TagError, find_rows, get_tags, make_tags, tag_rows
from csm_nb.keep import Keep
from csm_nb.languages import LANGUAGES
from csm_nb.recipe import Recipe
from csm_nb.runs.params import CHOICES
from csm_nb.speak import generate
from csm_nb.speak.voice import hash_model
from csm_nb.train.place import describe_training
from csm_nb.train.trainer import train_model

MINI = "models/csm-mini"
TOKEN = "<|reserved_special_token_3|>"
HOW = {"text": ("lora", "text", False), "row": ("lora", "token", False), "table": ("lora", "token", True),
       "full": ("full", "token", False), "none": ("lora", "none", False)}  # method, tag, train_text


def make_rows(tags, count=6):
    rng = np.random.default_rng(0)
    rows = [{"text": f"Setning {i}.", "codes": rng.integers(1, 512, (9, 8)).astype(np.uint16), "speaker_id": "0",
             "language": list(tags)[i % len(tags)], "duration": 0.4} for i in range(count)]
    return tag_rows(rows, tags)


def prepare(method="lora", kind="none", text=False, languages=("no",), before=None):
    """A model ready to be trained, as stage.start_training makes it, and its processor."""
    model, processor = load_base(MINI, "cpu")
    tags = make_tags(kind, languages)
    return start_training(model, method, before, 4, 8, 0.0, text_embeddings=text, tags=tags,
                          rows=find_rows(processor.tokenizer, tags)), processor


@pytest.fixture(scope="module")
def processor():
    return load_base(MINI, "cpu")[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of what two steps with each kind of tag made, by the names of HOW, and the models as they were saved."""
    folders = {}
    for name, how in HOW.items():
        model, processor = prepare(*how)
        place, rows = tmp_path_factory.mktemp(name), make_rows(make_tags(how[1], ["no"]))
        train_model(model, processor, rows, rows[:1], place / "training", Recipe(2, lr=0.01, max_tokens=128))
        folders[name] = save_trained(model, processor, place / f"{how[0]}_no", {"language": "no"}, MINI), model.eval()
    return folders


def load(folder):
    """What a folder of `trained` holds, as this project loads it."""
    full = not (folder / "adapter_config.json").exists()
    return load_base(folder, "cpu")[0] if full else load_adapter(load_base(MINI, "cpu")[0], folder)


@torch.inference_mode()
def compute_logits(model, ids):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.lm_head(inner.backbone_model(inputs_embeds=inner.embed_text_tokens(torch.tensor([ids]))).last_hidden_state)


def test_a_tag_stands_between_speaker_and_text_as_characters_or_as_one_row(processor):
    tokenizer = processor.tokenizer
    prompts = {kind: encode_text(processor, "Hei.", "0", make_tags(kind, ["no"])["no"]) for kind in KINDS}
    bare, row = prompts["none"], tokenizer.convert_tokens_to_ids(TOKEN)
    assert bare == encode_text(processor, "Hei.", "0")
    assert prompts["text"] == [*bare[:4], *tokenizer("<lang:no>", add_special_tokens=False).input_ids, *bare[4:]]
    assert prompts["token"] == [*bare[:4], row, *bare[4:]]
    assert prompts["token"] == tokenizer(f"<|begin_of_text|>[0]{TOKEN}Hei.<|end_of_text|>", add_special_tokens=False).input_ids
    assert row not in encode_text(processor, f"{TOKEN}Hei.", "0")  # in a text it is letters


def test_each_language_has_the_row_it_always_had_and_phones_have_room(processor):
    tags = make_tags("token", LANGUAGES)
    order = ("en", "no", "sv", "da", "de", "fr", "es", "nl", "it", "pl")
    assert tuple(tags)[: len(order)] == order  # the rows of adapters that are out there: new languages come last
    assert list(tags.values()) == [f"<|reserved_special_token_{FIRST_ROW + i}|>" for i in range(len(tags))]
    assert len(tags) <= PHONE_ROW - FIRST_ROW and len(set(find_rows(processor.tokenizer, tags))) == len(tags)
    assert CHOICES["tag"] == KINDS


def test_a_tokenizer_without_tokens_in_reserve_is_refused_with_what_else_is_allowed():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    assert find_rows(bare, make_tags("text", ["no"])) == []
    with pytest.raises(TagError, match=r"has none in reserve: no <\|reserved_special_token_3\|>.* Choose tag=text"):
        find_rows(bare, make_tags("token", ["no"]))


@pytest.mark.parametrize("name", ["text", "row", "table", "full"])
def test_what_was_trained_speaks_with_its_tag_by_itself_and_refuses_other_languages(trained, processor, monkeypatch, name):
    folder, model = trained[name]
    tag = make_tags(HOW[name][1], ["no"])
    loaded = load(folder)
    assert get_tags(loaded) == get_tags(model) == tag == json.loads((folder / "base.json").read_text())["tags"]
    prompt = encode_text(processor, "Hei du.", "0", tag["no"])
    assert torch.equal(compute_logits(loaded, prompt), compute_logits(model, prompt))
    prompts = []
    monkeypatch.setattr(generate, "encode_text", lambda *given: prompts.append(given[2:]) or encode_text(*given))
    said, = generate.speak(loaded, processor, ["Hei du."])
    again, = generate.speak(model, processor, ["Hei du."], language="no")
    assert np.array_equal(said.codes, again.codes) and set(prompts) == {("0", tag["no"])}
    with pytest.raises(TagError, match=r"trained with tags for no, and 'sv' is none of them; allowed are these"):
        generate.speak(loaded, processor, ["Hej."], language="sv")
    assert f"]{tag['no']}{{text}}" in (folder / "README.md").read_text()  # the card's example


@pytest.mark.parametrize("name", ["row", "table"])
def test_plain_peft_loads_an_adapter_with_its_tag_on_the_untouched_base(trained, name):
    folder, model = trained[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"<|begin_of_text|>[0]{TOKEN}Hei du.<|end_of_text|>", add_special_tokens=False).input_ids
    plain = PeftModel.from_pretrained(load_base(MINI, "cpu")[0], folder).eval()
    other = [tokenizer.convert_tokens_to_ids("<|reserved_special_token_4|>") if i == 4 else one for i, one in enumerate(ids)]
    assert torch.equal(compute_logits(plain, ids), compute_logits(model, ids))
    assert not torch.equal(compute_logits(plain, ids), compute_logits(plain, other))


def test_of_the_text_table_only_the_row_of_the_tag_is_trained(trained):
    folder, model = trained["row"]
    base, table = load_base(MINI, "cpu")[0].embed_text_tokens.weight, model.get_base_model().embed_text_tokens.weight
    row, = find_rows(AutoTokenizer.from_pretrained(folder), {"no": TOKEN})
    assert torch.nonzero((table != base).any(1)).flatten().tolist() == [row]
    assert describe_adapter(model)["text embeddings trained"] == "1 of its rows"
    assert describe_adapter(trained["table"][1])["text embeddings trained"] is True


@pytest.mark.parametrize("order", [("row", "text", "none"), ("none", "text", "row")], ids=" ".join)
def test_adapters_with_a_tag_and_without_switch_on_one_base(trained, processor, order):
    own = {name: generate.speak(load(trained[name][0]), processor, ["Hei du."])[0].codes for name in order}
    model = load_base(MINI, "cpu")[0]
    bare, base = generate.speak(model, processor, ["Hei du."])[0].codes, hash_model(model)
    for name in order:
        model = load_adapter(model, trained[name][0], name=name)
    for name in (*order, order[0]):
        model.set_adapter(name)
        assert np.array_equal(generate.speak(model, processor, ["Hei du."])[0].codes, own[name])
        assert get_tags(model) == make_tags(HOW[name][1], ["no"])
        with model.disable_adapter():
            assert get_tags(model) == {} and hash_model(model) == base
            assert np.array_equal(generate.speak(model, processor, ["Hei du."], language="sv")[0].codes, bare)
    with pytest.raises(AdapterError, match=r"trained all of the text table, and another adapter on the model rows of it"):
        load_adapter(model, trained["table"][0], name="table")
    assert np.array_equal(generate.speak(model, processor, ["Hei du."])[0].codes, own[order[0]])
    assert hash_model(remove_adapters(model)) == base


def test_a_stage_goes_on_only_with_the_tag_and_the_rows_that_it_was_begun_with(trained):
    assert get_tags(prepare(kind="token", before=trained["row"][0])[0]) == {"no": TOKEN}
    for method, name, kind in (("lora", "row", "none"), ("lora", "text", "token"), ("full", "full", "text")):
        with pytest.raises(TagError, match=f"was trained with tag={HOW[name][1]}, and tag is '{kind}': give tag={HOW[name][1]}"):
            prepare(method, kind, before=trained[name][0])
    with pytest.raises(TagError, match="trains rows .* give the languages that it was begun with"):
        prepare(kind="token", languages=["no", "sv"], before=trained["row"][0])
    prepare(kind="token", languages=["no", "sv"], before=trained["table"][0])  # has all rows


def test_another_tag_is_another_training_and_other_speech(tmp_path, trained, processor):
    model, _ = prepare()
    hashes = [describe_training(model, *[make_rows(make_tags(kind, ["no", "sv"]))] * 2, Recipe(2)) for kind in KINDS]
    assert len({json.dumps(one["trained on"]) for one in hashes}) == 3
    folder, one, found = trained["row"][0], tmp_path / "lora_no", []
    for tags in ({"no": TOKEN}, {"no": "<lang:no>"}, {"no": ""}):
        shutil.copytree(folder, one, dirs_exist_ok=True)
        record = json.loads((folder / "base.json").read_text())
        (one / "base.json").write_text(json.dumps(record | {"tags": tags}))
        generate.speak(load(one), processor, ["Hei du."], keep=Keep(tmp_path / "data"))
        found.append(len([*(tmp_path / "data/spoken").rglob("*.parquet")]))
    assert found == [1, 2, 3]


def test_an_adapter_of_several_languages_speaks_each_with_its_own_tag(processor, monkeypatch):
    model, _ = prepare(kind="token", languages=["no", "sv"])
    assert [row["tag"] for row in make_rows(get_tags(model), 3)] == [get_tags(model)[code] for code in ("no", "sv", "no")]
    prompts = []
    monkeypatch.setattr(generate, "encode_text", lambda *given: prompts.append(given[3]) or encode_text(*given))
    for language in ("", "no", "sv"):
        prompts.clear()
        generate.speak(model, processor, ["Hei."], language=language)
        assert set(prompts) == {get_tags(model)[language or "no"]}
