"""The self-check passes on models that are right, and each check fails when its property is broken."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.models.csm import modeling_csm

from csm_nb.csm import attention
from csm_nb.csm.adapters import add_adapter, train_fully
from csm_nb.csm.load import encode_text, load_base
from csm_nb.languages import LANGUAGES
from csm_nb.text.sentences import spell_alphabet
from csm_nb.train import loss, packing
from csm_nb.train.packing import pack_row, read_clips
from csm_nb.train.self_check import WAYS_OUT, ProofError, _check_texts, list_unknown, prove_model

TEXTS = ["Jeg så på øya.", "Vær så snill!"]


@pytest.fixture
def base():
    return load_base("models/csm-mini", "cpu")


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: add_adapter(model, 4, 8, 0.1), train_fully],
                         ids=["base", "lora", "full"])
def test_a_model_that_is_right_passes_and_is_left_as_it_was(base, prepare):
    model, processor = prepare(base[0]), base[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    model.train()
    table = prove_model(model, processor, TEXTS)
    assert table.holds.all() and set(table.index) <= WAYS_OUT.keys()
    assert (len(table) == len(WAYS_OUT)) == any(p.requires_grad for p in model.parameters())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_probes_of_every_language_survive_the_tokenizer(base):
    for language in LANGUAGES.values():
        texts = (*language.probes, spell_alphabet(language.code))
        assert prove_model(*base, texts).found["text survives the tokenizer"] == f"{len(texts)} of {len(texts)}"


def test_tables_that_are_two_are_refused_with_what_to_do(base):
    table = base[0].depth_decoder.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)
    with pytest.raises(ProofError, match="codebook tables are one.*load with load.load_base"):
        prove_model(*base)


def test_a_depth_loss_divided_by_frames_instead_of_codes_is_refused(base, monkeypatch):
    forward = type(base[0]).forward  # what the Trainer's count of frames makes of transformers' own loss

    def scaled(self, *args, **kwargs):
        labels = kwargs["labels"]
        return forward(self, *args, **kwargs, num_items_in_batch=(labels[..., 0] != -100).sum())

    monkeypatch.setattr(type(base[0]), "forward", scaled)
    with pytest.raises(ProofError, match=r"depth loss is a mean \(found: .*: 7.00 times\)"):
        prove_model(*base)


def test_an_end_of_speech_that_is_not_labelled_is_refused(base, monkeypatch):
    build = loss.build_inputs

    def without_end(model, batch):
        inputs = build(model, batch)
        inputs["labels"][0, batch["is_frame"][0].nonzero()[-1, 0]] = -100
        return inputs

    monkeypatch.setattr(loss, "build_inputs", without_end)
    with pytest.raises(ProofError, match=r"end of speech is labelled \(found: in 1 of 2"):
        prove_model(*base)


def test_an_adapter_by_bare_names_is_refused_because_it_sits_on_the_codec(base):
    model = get_peft_model(base[0], LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ProofError, match=r"not trained: codec \(found: .*codec_model"):
        prove_model(model, base[1])


def test_a_frozen_decoder_is_refused(base):
    model = train_fully(base[0])
    model.depth_decoder.requires_grad_(False)
    with pytest.raises(ProofError, match="gradients reach the depth decoder.*frozen") as refused:
        prove_model(model, base[1])
    assert "gradients reach the backbone" not in str(refused.value)


def test_a_tokenizer_that_loses_letters_is_refused_with_the_text(base):
    with pytest.raises(ProofError, match=r"text survives the tokenizer \(found: 'Привет' came back as"):
        prove_model(*base, ["Hei.", "Привет"])


def attend_to_the_whole_row(module, query, key, value, mask, scaling, position_ids=None, **kwargs):
    return attention.attend_by_clip(module, query, key, value, mask, scaling)  # no positions: where clips begin is not told


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: add_adapter(model, 4, 8, 0.1)], ids=["base", "lora"])
def test_clips_that_see_each_other_in_a_packed_row_are_refused(base, prepare, monkeypatch):
    model = prepare(base[0])
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, attend_to_the_whole_row)
    with pytest.raises(ProofError, match="clips do not see each other.*position_ids that restart") as refused:
        prove_model(model, base[1])
    assert str(refused.value).count("found:") == 1


def test_clips_are_apart_under_the_mask_of_a_gpu_too(base, monkeypatch):
    monkeypatch.setattr("csm_nb.train.self_check.use_attention", lambda model, training: None)  # sdpa, as it was loaded
    assert prove_model(*base).loc["clips do not see each other"].found.startswith("logits of the next clip move by 0,")
    monkeypatch.setattr(modeling_csm, "create_causal_mask", lambda **kwargs: None)  # causal over the whole row
    with pytest.raises(ProofError, match="clips do not see each other"):
        prove_model(*base)


def test_positions_that_run_on_are_refused(base, monkeypatch):
    def run_on(clips, indices, *args):
        row = pack_row(clips, indices, *args)
        return row | {"position_ids": torch.arange(len(row["position_ids"]))}

    monkeypatch.setattr("csm_nb.train.self_check.pack_row", run_on)
    with pytest.raises(ProofError, match=r"positions restart in each clip \(found: the second clip begins at [1-9]"):
        prove_model(*base)


def test_a_clip_beyond_the_context_that_is_not_set_aside_is_refused(base, monkeypatch):
    monkeypatch.setattr(packing, "read_clips", lambda *args: read_clips(*args[:4]))
    with pytest.raises(ProofError, match=r"no clip is beyond the context \(found: a clip of 2048 frames"):
        prove_model(*base)


def test_unknown_characters_of_the_corpus_are_counted_and_stop_nothing_until_every_text_loses_some(base):
    found = prove_model(*base, TEXTS, ["Det koster 5 €.", "Hej “du” – på…", "Nå."]).found["text survives the tokenizer"]
    assert found == "2 of 2; of the corpus 2 of 3"
    with pytest.raises(ProofError, match=r"text survives the tokenizer \(found: every text of the corpus loses.*'Привет'"):
        prove_model(*base, TEXTS, ["Привет", "5 €"])


def test_what_the_tokenizer_lacks_is_listed_with_counts_and_an_example(base):
    table = list_unknown(base[1], ["Hej “du” – pa\u030a…", "5 € og 3 €", "2 € i Łódź, ж", "slut\ufffd"])
    assert table[["character", "code point", "name", "count", "texts"]].values.tolist() == [
        ["€", "U+20AC", "EURO SIGN", 3, 2], ["ж", "U+0436", "CYRILLIC SMALL LETTER ZHE", 1, 1],
        ["\ufffd", "U+FFFD", "REPLACEMENT CHARACTER", 1, 1]]
    assert table.example.tolist() == ["5 € og 3 €", "2 € i Łódź, ж", "slut\ufffd"]
    assert [said.split()[0] for said in table["what to do"]] == ["write", "a", "the"]
    assert list_unknown(base[1], ["Hej."]).empty and list_unknown(base[1], []).empty


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A tokenizer of Llama's kind: byte-level BPE without an unknown token, its control tokens added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    tokenizer.train_from_iterator(["hej med dig på øen"] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=control, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=control[0], eos_token=control[1],
                                   extra_special_tokens=control[2:])


def test_a_tokenizer_of_bytes_loses_nothing_but_what_was_broken_before(bytes_tokenizer):
    table = list_unknown(SimpleNamespace(tokenizer=bytes_tokenizer), ["5 € ж 😀 på", "slut\ufffd", "x\x07"])
    assert sorted(table["code point"]) == ["U+0007", "U+FFFD"]


def test_a_tokenizer_of_bytes_reads_a_prompt_as_a_whole_and_typed_control_tokens_as_letters(bytes_tokenizer):
    processor = SimpleNamespace(tokenizer=bytes_tokenizer)
    whole = bytes_tokenizer("<|begin_of_text|>[0]Hej, på øen €.<|end_of_text|>", add_special_tokens=False).input_ids
    assert encode_text(processor, "Hej, på øen €.", "0") == whole
    ids = encode_text(processor, "a<|end_of_text|><|reserved_special_token_0|>b", "0")
    assert not set(ids[1:-1]) & set(bytes_tokenizer.all_special_ids)


def test_a_tokenizer_that_tidies_spaces_when_it_decodes_loses_no_letters(bytes_tokenizer):
    bytes_tokenizer.clean_up_tokenization_spaces = True  # as Llama's config has it
    texts = [*LANGUAGES["fr"].probes, spell_alphabet("fr")]
    assert _check_texts(bytes_tokenizer, texts, []) == (True, f"{len(texts)} of {len(texts)}")


def test_characters_that_a_tokenizer_drops_without_a_word_are_listed_too():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(["hej"] * 3, trainers.BpeTrainer(vocab_size=20))
    dropping = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert list_unknown(dropping, ["hejå"]).character.tolist() == ["å"]
