"""What an utterance is does not depend on what is spoken beside it, and is what transformers would say."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from csm_nb.csm.adapters import add_adapter, load_adapter
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter
from csm_nb.speak.batch import Batch, Sampling
from csm_nb.speak.decoders import BLOCK, STRIDE, Decoders
from csm_nb.speak.generate import make_utterance, say, speak
from csm_nb.text.sentences import make_sentences

TEXTS = make_sentences("en", 8, 0, "validation")
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


def stir(model, seed):
    """Give the active adapter weights that change what is said."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "trainable_tokens" in name:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.03)
    return model


@pytest.fixture(scope="module")
def worn(tmp_path_factory):
    """A base with three adapters on it side by side: on the attention alone, with MLP, and with a text table of its own."""
    folder, how = tmp_path_factory.mktemp("adapters"), ({}, {"mlp": True}, {"text_embeddings": True})
    for number, more in enumerate(how):
        model, _ = load_base("models/csm-mini", "cpu")
        save_adapter(stir(add_adapter(model, 8, 16, 0.0, seed=number, **more), number), folder / f"lora_{number}")
    model, processor = load_base("models/csm-mini", "cpu")
    for number in range(len(how)):
        model = load_adapter(model, folder / f"lora_{number}", name=f"a{number}")
    return model, processor


def ask(model, processor, texts, adapters, slots, seed=0, sampling=None):
    """What is said of each text by its adapter, all together in `slots` rows."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    with torch.inference_mode():
        decoders = Decoders(model, list(getattr(model, "peft_config", {})))
        waiting = [make_utterance(decoders, inner, processor, text, "0", adapter, "", seed, sampling, key=number)
                   for number, (text, adapter) in enumerate(zip(texts, adapters, strict=True))]
        return [one.codes for one in sorted(say(decoders, waiting, slots), key=lambda one: one.key)]


def generate(model, processor, texts):
    """Greedy frames of each text by transformers, up to its end of speech (all codebooks but the last at 0)."""
    prompts = [f"<|begin_of_text|>[0]{text}<|end_of_text|>" for text in texts]
    inputs = processor(prompts, return_tensors="pt", padding=True)
    frames = model.generate(**inputs, max_new_tokens=40, do_sample=False, depth_decoder_do_sample=False).numpy()
    ends = [np.flatnonzero((codes[:, :-1] == 0).all(-1)) for codes in frames]
    return [codes[: end[0] if len(end) else None] for codes, end in zip(frames, ends, strict=True)]


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("adapter", ["", "a0", "a1", "a2"])
def test_greedy_codes_are_those_of_transformers_generate(worn, adapter, count):
    model, processor = worn
    if adapter:
        model.set_adapter(adapter)
        theirs = generate(model, processor, TEXTS[:count])
    else:
        with model.disable_adapter():
            theirs = generate(model, processor, TEXTS[:count])
    ours = ask(model, processor, TEXTS[:count], [adapter] * count, count, sampling=GREEDY)
    for own, other in zip(ours, theirs, strict=True):
        shared = min(len(own), len(other))
        assert shared > 3 and np.array_equal(np.array(own[:shared]), other[:shared])


def test_nobody_hears_the_adapter_of_another_and_mixed_is_what_alone_is_to_the_last_code(worn):
    names = ["", "a0", "a1", "a2"]
    texts, adapters = TEXTS * 4, [names[number % 3 if number < 16 else 3 - number % 2] for number in range(32)]
    mixed = ask(*worn, texts, adapters, 32)
    few = ask(*worn, texts, adapters, 8)
    assert mixed == few
    for number in (0, 1, 2, 17, 18, 31):
        assert ask(*worn, texts[number : number + 1], adapters[number : number + 1], 1) == mixed[number : number + 1]
    said = [ask(*worn, TEXTS[:1], [name], 1) for name in names]
    assert all(said[a] != said[b] for a in range(4) for b in range(a))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_comes_out_the_same_to_the_last_bit_whatever_lies_beside_it(base, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            decoders = Decoders(base[0])
            generator = torch.Generator().manual_seed(0)
            count, width = 8 * BLOCK, decoders.audio.shape[1]
            hidden, cache = torch.randn(count, width, generator=generator), decoders.backbone.make_cache(count, 4 * STRIDE)
            cache.copy_(torch.randn(cache.shape, generator=generator))
            positions = torch.randint(STRIDE, (count,), generator=generator)
            depth = decoders.depth.make_cache(count, decoders.codebooks + 1)

            def run(rows, length):
                frame = decoders.say_frame(hidden[rows], [], depth, lambda codebook, logits: logits.argmax(-1))
                return frame, decoders.read_frame(frame, positions[rows], [], cache[:, :, rows].clone(), length)

            whole = run(torch.arange(count), STRIDE)
            for rows in (torch.arange(BLOCK), torch.arange(3 * BLOCK) + 5, torch.randperm(count, generator=generator)):
                for length in (STRIDE, 3 * STRIDE):
                    assert all(torch.equal(own, all_[rows]) for own, all_ in zip(run(rows, length), whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_rows_of_the_text_table_that_an_adapter_has_trained_are_its_own(base):
    model, processor = load_base("models/csm-mini", "cpu")
    ids = processor.tokenizer("the", add_special_tokens=False).input_ids
    plain = model.embed_text_tokens(torch.tensor(ids)).detach()
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_text_tokens": ids[:1]},
                        layers_to_transform=[0])
    from peft import get_peft_model

    model = stir(get_peft_model(model, config), 0)
    with torch.inference_mode():
        decoders, other = Decoders(model, ["default"]), ids[1:]
        assert torch.equal(decoders.embed_text(ids), plain) and torch.equal(decoders.embed_text(other, "default"), plain[1:])
        theirs = model.get_base_model().embed_text_tokens(torch.tensor(ids))
        assert torch.equal(decoders.embed_text(ids, "default"), theirs) and not torch.equal(theirs[0], plain[0])


def test_a_place_that_falls_free_is_taken_and_what_hangs_up_harms_nobody(base):
    model, processor = base
    texts = TEXTS * 2
    alone = ask(model, processor, texts, [""] * 16, 16)
    with torch.inference_mode():
        decoders = Decoders(model)
        waiting = [make_utterance(decoders, model, processor, text, "0", key=number) for number, text in enumerate(texts)]
        batch, done, steps = Batch(decoders, 4, 400), {}, 0
        while waiting or len(batch):
            while waiting and batch.free(""):
                batch.admit(waiting.pop(0))
            if steps == 3:
                batch.drop(next(row for row in batch.rows if row and row.key == 1))
            steps += 1
            done |= {one.key: one.codes for one in batch.step() if one.finish}
    assert sorted(done) == [0, *range(2, 16)] and all(done[key] == alone[key] for key in done)
    assert steps < sum(len(codes) + 1 for codes in alone) / 2  # four at a time, never waiting for the longest


def test_more_than_there_is_room_for_is_refused(base):
    model, processor = base
    with torch.inference_mode():
        decoders = Decoders(model)
        batch = Batch(decoders, 4, 64)
        one = make_utterance(decoders, model, processor, TEXTS[0], "0")
        with pytest.raises(ValueError, match=r"no room for an utterance of \d+ \+ \d+ positions: 0 of 4 rows .* a row has 64"):
            batch.admit(one)


def test_what_was_said_before_changes_what_is_said_and_is_read_as_in_training(base):
    first = speak(*base, TEXTS[:1])[0]
    after, again, without = (speak(*base, TEXTS[1:2], context=context)[0]
                             for context in ([(first.text, first.codes, "0")], [(first.text, first.codes, "0")], []))
    assert np.array_equal(after.codes, again.codes) and not np.array_equal(after.codes, without.codes)


def test_weights_are_read_once_and_what_a_training_does_later_changes_nothing():
    model, processor = load_base("models/csm-mini", "cpu")
    model = stir(add_adapter(model, 4, 8, 0.0), 0)
    with torch.inference_mode():
        decoders = Decoders(model, ["default"])
        before = decoders.backbone.layers[0][2].added["default"][1].clone()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].weight.zero_()
    assert torch.equal(decoders.backbone.layers[0][2].added["default"][1], before)
