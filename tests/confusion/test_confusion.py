"""Verdicts of 04 and 05 follow from what was heard, and from nothing else."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from csm_nb.confusion.inputs import compare_inputs
from csm_nb.confusion.matrix import count_heard, judge_speech, list_confusions, pair_with_reference, share_right
from csm_nb.confusion.prompts import find_adapters, list_languages, list_prompts, list_sentences, speak_models
from csm_nb.confusion.verdict import describe_verdict, judge_verdict
from csm_nb.csm.adapters import AdapterError, start_training
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter, save_full
from csm_nb.languages import LANGUAGES
from csm_nb.runs.folders import find_inputs
from csm_nb.show.results import draw_confusions

SPEAKERS = [{"number": number, "corpus": "a", "content": "b", "speaker": str(number), "clips": number, "hours": 0.1,
             "own": number > 5} for number in (0, 6, 7)]


def make_rows(model, heard, language="no", on="held-out"):
    count = len(heard)
    return pd.DataFrame({"model": model, "language": language, "heard": heard, "cer": np.linspace(0, 0.2, count), "ended": True,
                         "on": on, "probe": on == "probes", "hallucinated": False})


REFERENCE = make_rows("reference", ["no"] * 40)


def test_an_adapter_heard_as_its_language_is_clear():
    verdict, metrics = judge_verdict(REFERENCE, make_rows("lora_no", ["no"] * 38 + ["sv"] * 2), "no")
    assert verdict == "clear"
    assert (metrics["heard_right"], metrics["sentences"]) == (0.95, 40)
    assert (metrics["low"], metrics["high"]) == pytest.approx((0.835, 0.986), abs=1e-3)
    assert "83 to 99 %" in describe_verdict(verdict, metrics, "no")


def test_an_adapter_heard_as_a_neighbour_bleeds_into_it():
    rows = make_rows("lora_no", ["no"] * 25 + ["sv"] * 10 + ["da"] * 5)
    assert judge_verdict(REFERENCE, rows, "no")[0] == "bleeds into sv"


def test_one_sentence_each_does_not_make_it_bleed():
    verdict, metrics = judge_verdict(REFERENCE, make_rows("lora_no", ["no"] * 14 + ["de", "sv"]), "no")
    assert verdict == "unclear: 14 of 16, 88 % (64 to 97 %) heard as no; some 554 sentences would decide"
    assert metrics["sentences_needed"] == 554


def test_what_is_no_language_is_nothing_to_bleed_into():
    rows = make_rows("lora_no", ["no"] * 10 + ["none"] * 20 + ["other"] * 8 + ["sv"] * 2)
    assert judge_verdict(REFERENCE, rows, "no")[0] == "bleeds into sv"
    rows = make_rows("lora_no", ["none"] * 40)
    assert judge_verdict(REFERENCE, rows, "no")[0] == "bleeds into no language that is told apart here"


def test_probes_decide_nothing():
    probes = make_rows("lora_no", ["sv"] * 40, on="probes")
    held_out = make_rows("lora_no", ["no"] * 40)
    assert judge_verdict(REFERENCE, pd.concat([probes, held_out]), "no")[0] == "clear"
    assert judge_verdict(REFERENCE, probes, "no")[0] == "unclear: no held-out sentence was read"


def test_probes_and_held_out_sentences_are_separate_rows():
    table = share_right(pd.concat([make_rows("base", ["en"] * 8, on="probes"), make_rows("base", ["no"] * 10)]))
    assert table.on.tolist() == ["probes", "held-out"]
    assert table["heard right"].tolist() == [0.0, 1.0] and table.sentences.tolist() == [8, 10]


@pytest.mark.parametrize(("heard", "said"), [
    (["no"] * 20 + ["da"] * 20, "unclear: the judge hears 20 of 40, 50 % (35 to 65 %) of the reference"),
    (["no"] * 36 + ["da"] * 4,
     "unclear: the judge hears 36 of 40, 90 % (77 to 96 %) of the reference; some 62 sentences would decide"),
])  # fmt: skip
def test_a_deaf_judge_makes_the_verdict_unclear_however_well_the_adapter_does(heard, said):
    verdict, metrics = judge_verdict(make_rows("reference", heard), make_rows("lora_no", ["no"] * 40), "no")
    assert verdict == said and metrics["ceiling"] == heard.count("no") / 40


def test_the_base_and_other_adapters_do_not_stand_in_for_a_missing_one():
    spoken = pd.concat([make_rows("base", ["no"] * 5), make_rows("lora_sv", ["no"] * 5)])
    assert judge_verdict(make_rows("reference", ["no"] * 5), spoken, "no")[0] == "unclear: no adapter"


def test_shares_carry_an_interval_around_them():
    row = share_right(make_rows("base", ["en"] * 15 + ["no"] * 5)).iloc[0]
    assert (row["low"], row["heard right"], row["high"]) == (0.112, 0.25, 0.469)  # Wilson's
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
    assert compare_inputs(rows((0.0, 1.0)), history, history)[0] == "no difference shown (n = 20)"
    few = rows((0.3, 0.0))
    assert compare_inputs(few[few.text.isin(texts[:2])], history, history)[0] == "unclear: 2 of 10 sentences"


def test_adapters_that_are_missing_are_named(tmp_path):
    (tmp_path / "lora_no").mkdir()
    (tmp_path / "lora_no/adapter_config.json").write_text("{}")
    (tmp_path / "lora_sv").mkdir()
    found, missing = find_adapters(str(tmp_path), {code: f"lora_{code}" for code in ("no", "sv", "da")})
    assert list(found) == ["no"] and missing == ["sv", "da"]
    (tmp_path / "full_da").mkdir()
    (tmp_path / "full_da/config.json").write_text("{}")
    assert list(find_adapters(str(tmp_path), {code: f"full_{code}" for code in ("no", "da")}, "full")[0]) == ["da"]


def test_an_adapter_under_the_name_of_another_language_is_refused(tmp_path):
    model, _ = load_base("models/csm-mini", "cpu")
    made = save_adapter(start_training(model, "lora", rank=2), tmp_path / "lora_da", {"language": "da"})
    assert find_adapters(tmp_path, {"da": "lora_da"}) == ({"da": made}, [])
    made.rename(tmp_path / "lora_sv")
    with pytest.raises(AdapterError, match="lora_sv is trained on da, .* rename it to lora_da, or run 03_adapter for sv"):
        find_adapters(tmp_path, {"sv": "lora_sv"})
    for broken in ('{"language": "s', "[]"):
        (tmp_path / "lora_sv/base.json").write_text(broken)
        with pytest.raises(AdapterError, match="base.json is half a file"):
            find_adapters(tmp_path, {"sv": "lora_sv"})


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


def test_a_sentence_counts_as_all_wrong_at_most():
    rows = make_rows("base", ["no"] * 4).assign(cer=[0.0, 0.0, 0.0, 57.0])
    row = share_right(rows).iloc[0]
    assert (row.CER, row["CER median"], row["CER over 50 %"]) == (0.25, 0.0, 0.25)


@pytest.mark.parametrize(("language", "compare", "languages"), [
    ("nl", ["nl", "de", "en"], ["nl", "de", "en"]), ("nl", ["en"], ["en", "nl"]), ("no", ["no"], ["no"]),
    ("no", ["sv", "da"], ["sv", "da", "no"]), ("sv", ["no", "sv", "sv", "no"], ["no", "sv"]), ("en", ["en", "nl"], ["en", "nl"]),
    ("pl", list(LANGUAGES), list(LANGUAGES)),
])  # fmt: skip
def test_any_list_of_languages_can_be_told_apart(language, compare, languages):
    assert list_languages(language, compare) == languages
    prompts = list_prompts(language, compare, 3)
    assert not prompts.duplicated(["language", "text"]).any()
    counts = prompts.groupby(["language", "on"]).size()
    assert all(counts[code, "probes"] == 8 for code in {*languages, "en"})
    assert {code for code, on in counts.index if on == "held-out"} == {language, "en"}
    assert set(prompts[prompts.cross].language) == set(languages) and prompts[prompts.cross].probe.all()
    said = [prompts.assign(model=name, heard=prompts.language, cer=0.1, ended=True, hallucinated=False, wav=None, transcript="")
            for name in ("reference", "base", f"lora_{language}")]
    reference, spoken = said[0], pd.concat(said[1:])
    assert judge_verdict(reference, spoken, language)[1]["sentences"] == 3
    for title, table in list_confusions(reference, spoken, languages):
        assert list(table.index) == languages
        assert table.sum(axis=1).tolist() == [8 if "own" not in title or code == language else 0 for code in languages]
    assert count_heard(reference, spoken, language).index.tolist() == ["reference", "base", f"lora_{language}"]
    draw_confusions(list_confusions(reference, spoken, languages))
    assert len(pair_with_reference(spoken.head(3), reference)) == 6


def test_a_number_that_the_recogniser_writes_in_digits_is_no_error(monkeypatch):
    monkeypatch.setattr("csm_nb.confusion.matrix.transcribe", lambda asr, wavs, keep: [asr] * len(wavs))
    monkeypatch.setattr("csm_nb.confusion.matrix.identify_languages", lambda lid, wavs, keep: [{"no": 1.0}] * len(wavs))
    rows = pd.DataFrame({"language": ["no", "da"], "text": ["Klokka er sju.", "Halvtreds æbler"], "wav": [np.ones(48_000)] * 2})
    judged = judge_speech(rows, None, {"no": "Klokka er 7", "da": "50 æbler"})
    assert judged.cer.tolist() == [0, 0] and not judged.hallucinated.any()


@pytest.mark.parametrize("compare", [["sv"], ["no", "sv"], ["sv", "sv"]])
def test_the_adapter_of_the_language_is_an_input_also_where_compare_leaves_it_out(compare, tmp_path):
    for code in ("no", "sv"):
        (tmp_path / f"lora_{code}").mkdir()
        (tmp_path / f"lora_{code}/adapter_config.json").write_text("{}")
    given = {"language": "no", "compare": compare, "adapters_dir": str(tmp_path), "method": "lora"}
    assert {"lora_no", "lora_sv"} <= find_inputs(given).keys()
