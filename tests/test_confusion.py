"""Verdicts of 04 and 05 follow from what was heard, and from nothing else."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from csm_nb.confusion import compare_inputs, find_adapters, judge_verdict, list_sentences, share_right, speak_models
from csm_nb.csm import AdapterError, load_base, save_adapter, save_full, start_training

SPEAKERS = [{"number": number, "corpus": "a", "content": "b", "speaker": str(number), "clips": number, "hours": 0.1,
             "own": number > 5} for number in (0, 6, 7)]


def make_rows(model, heard, language="no"):
    count = len(heard)
    return pd.DataFrame({"model": model, "language": language, "heard": heard, "cer": np.linspace(0, 0.2, count), "ended": True})


def test_an_adapter_heard_as_its_language_is_clear():
    verdict, metrics = judge_verdict(make_rows("reference", ["no"] * 10), make_rows("lora_no", ["no"] * 19 + ["sv"]), "no")
    assert verdict == "clear"
    assert metrics["heard_right"] == 0.95


def test_an_adapter_heard_as_a_neighbour_bleeds_into_it():
    rows = make_rows("lora_no", ["no"] * 4 + ["sv"] * 5 + ["da"])
    assert judge_verdict(make_rows("reference", ["no"] * 10), rows, "no")[0] == "bleeds into sv"


def test_a_deaf_judge_makes_the_verdict_unclear_however_well_the_adapter_does():
    verdict, metrics = judge_verdict(make_rows("reference", ["no"] * 8 + ["da"] * 2), make_rows("lora_no", ["no"] * 10), "no")
    assert verdict.startswith("unclear") and metrics["ceiling"] == 0.8


def test_the_base_and_other_adapters_do_not_stand_in_for_a_missing_one():
    spoken = pd.concat([make_rows("base", ["no"] * 5), make_rows("lora_sv", ["no"] * 5)])
    assert judge_verdict(make_rows("reference", ["no"] * 5), spoken, "no")[0] == "unclear: no adapter"


def test_shares_carry_an_interval_around_them():
    row = share_right(make_rows("base", ["en"] * 15 + ["no"] * 5)).iloc[0]
    assert row["low"] < row["heard right"] == 0.25 < row["high"]
    assert row["heard most"] == "en"


def test_phonemes_win_only_when_the_interval_leaves_out_zero():
    history = [{"step": 1, "eval_loss": 2.0}]
    texts = [f"t{i}" for i in range(20)]
    noise = np.random.default_rng(0).normal(0, 0.2, 20)

    def rows(gap):
        return pd.concat([pd.DataFrame({"text": texts, "model": name, "cer": cer})
                          for name, cer in (("spelling", 0.5 + noise * gap[1] + gap[0]), ("phonemes", np.full(20, 0.5)))])

    assert compare_inputs(rows((0.3, 0.1)), history, history)[0] == "phonemes"
    assert compare_inputs(rows((-0.3, 0.1)), history, history)[0] == "spelling"
    assert compare_inputs(rows((0.0, 1.0)), history, history)[0] == "no difference"


def test_adapters_that_are_missing_are_named(tmp_path):
    (tmp_path / "lora_no").mkdir()
    (tmp_path / "lora_no/adapter_config.json").write_text("{}")
    (tmp_path / "lora_sv").mkdir()
    found, missing = find_adapters(str(tmp_path), ["no", "sv", "da"])
    assert list(found) == ["no"] and missing == ["sv", "da"]
    (tmp_path / "full_da").mkdir()
    (tmp_path / "full_da/config.json").write_text("{}")
    assert list(find_adapters(str(tmp_path), ["no", "sv", "da"], "full")[0]) == ["da"]


def test_a_fully_trained_model_speaks_with_its_own_weights_and_the_base_with_the_base_s(tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    prompts = pd.DataFrame({"language": ["no"], "text": ["Nei."]})
    base = speak_models(model, processor, {}, prompts)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    folder = save_full(model, processor, tmp_path / "full_no")
    rows = speak_models(load_base("models/csm-mini", "cpu")[0], processor, {"no": folder}, prompts)
    assert list(rows.model) == ["base", "full_no"]
    np.testing.assert_array_equal(rows.wav[0], base.wav[0])
    assert len(rows.wav[1]) != len(rows.wav[0]) or not np.allclose(rows.wav[1], rows.wav[0])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters with text tables; that of Danish has speakers 6 and 7 of its own."""
    folders = {}
    for seed, (code, speakers) in enumerate({"no": [], "da": SPEAKERS}.items()):
        torch.manual_seed(seed)
        model, _ = load_base("models/csm-mini", "cpu")
        model = start_training(model, "lora", None, 4, 8, 0.0, text_embeddings=True, speakers=speakers)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    value.add_(0.05 * torch.randn_like(value))
        folders[code] = save_adapter(model, tmp_path_factory.mktemp("adapters") / f"lora_{code}", {}, "models/csm-mini")
    return folders


def test_base_says_the_same_before_and_after_adapters(adapters):
    model, processor = load_base("models/csm-mini", "cpu")
    prompts = pd.DataFrame({"language": ["en", "en"], "text": ["The weather was lovely yesterday.", "Where does she live now?"]})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = speak_models(model, processor, {}, prompts)
    with_adapters = speak_models(model, processor, adapters, prompts)
    after = speak_models(model, processor, {}, prompts)
    for said in (with_adapters[with_adapters.model == "base"], after):
        assert all(np.array_equal(a, b) for a, b in zip(before.wav, said.wav, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_an_adapter_says_the_same_in_any_order_and_alone(adapters):
    model, processor = load_base("models/csm-mini", "cpu")
    prompts = pd.DataFrame({"language": ["no", "da"], "text": ["Nei.", "Nej."]})
    orders = [adapters, dict(reversed(adapters.items())), {"no": adapters["no"]}, {"da": adapters["da"]}]
    said = pd.concat([speak_models(model, processor, order, prompts) for order in orders])
    for _, rows in said.groupby(["model", "text"]):
        assert len(rows) in (3, 4) and all(np.array_equal(wav, rows.wav.iloc[0]) for wav in rows.wav)


def test_each_model_reads_with_a_voice_of_its_own_corpus(adapters):
    model, processor = load_base("models/csm-mini", "cpu")
    rows = speak_models(model, processor, adapters, pd.DataFrame({"language": ["no"], "text": ["Nei."]}))
    assert dict(zip(rows.model, rows.speaker, strict=True)) == {"base": "0", "lora_no": "0", "lora_da": "7"}


def test_adapters_read_of_other_languages_only_what_is_marked_to_be_crossed(adapters):
    model, processor = load_base("models/csm-mini", "cpu")
    prompts = pd.DataFrame({"language": ["no", "no", "da", "da"], "text": ["En.", "To.", "Et.", "Syv."],
                            "cross": [True, False, False, False]})
    read = speak_models(model, processor, adapters, prompts).groupby("model", sort=False).text.agg(list)
    assert read.to_dict() == {"base": ["En.", "To.", "Et.", "Syv."], "lora_no": ["En.", "To."], "lora_da": ["En.", "Et.", "Syv."]}


def test_a_broken_adapter_stops_with_its_name_and_leaves_the_base_as_it_was(adapters, tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    keys = list(model.state_dict())
    broken = shutil.copytree(adapters["da"], tmp_path / "lora_da")
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterError, match="lora_da can not be read"):
        speak_models(model, processor, {"no": adapters["no"], "da": broken}, pd.DataFrame({"language": ["no"], "text": ["Nei."]}))
    assert list(model.state_dict()) == keys


def test_every_language_is_asked_its_probes_and_as_many_sentences():
    prompts = list_sentences(["no", "da"], 5)
    assert prompts.groupby("language").size().nunique() == 1
    assert prompts[~prompts.probe].groupby("language").size().tolist() == [5, 5]
    assert prompts.text.is_unique
