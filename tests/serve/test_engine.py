"""One engine for everybody: what it says is what speak says alone, whoever else asks, hangs up, fails, comes or goes."""

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import BASE, ask, hear, make_adapter, make_adapters, make_engine, step_until, wait_for

from csm_nb.csm.adapters import load_adapter, remove_adapters
from csm_nb.csm.load import load_base
from csm_nb.serve import engine as engine_module
from csm_nb.serve.engine import FullError
from csm_nb.speak.generate import SpeechError, speak
from csm_nb.text.sentences import make_sentences

TEXTS = sorted(make_sentences("en", 40, 0, "validation"), key=len)[:8]  # short ones are spoken soon
LANGUAGES = ["en", "no", "sv", "da"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def stopped(adapters):
    """An engine that is stepped by hand."""
    return make_engine(adapters)


@pytest.fixture
def engine(stopped):
    stopped.batches, stopped.ended = {}, False
    stopped.waiting.clear()
    with torch.inference_mode():
        yield stopped


@pytest.fixture(scope="module")
def alone(adapters):
    """What speak says of one request, and nothing beside it."""
    model, processor = load_base(BASE, "cpu")

    def say(text, language, seed):
        if language == "en":
            return speak(model, processor, [text], seed=seed)[0]
        worn = load_adapter(model, adapters / f"lora_{language}")
        said = speak(worn, processor, [text], seed=seed, language=language)[0]
        remove_adapters(worn)
        return said

    return say


def test_every_answer_is_what_speak_says_of_the_request_alone_with_its_seed(engine, alone):
    asked = [(text, LANGUAGES[number % 4], number // 4) for number, text in enumerate(TEXTS)]
    asked += [("Det var 12 katter.", language, 0) for language in ("no", "sv")]  # the Swedish one is read out
    jobs = [ask(engine, text, language, seed=seed) for text, language, seed in asked]
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    for (job, told), request in zip(jobs, asked, strict=True):
        wav, finish = hear(told)
        speech = alone(*request)
        assert np.array_equal(np.concatenate(job.codes), speech.codes) and finish == speech.finish
        assert len(wav) == len(speech.wav) and np.abs(np.array(wav) - speech.wav).max() * 2**15 < 1


def test_a_request_that_can_not_be_begun_is_told_so_and_harms_no_other(engine, alone, monkeypatch):
    make = engine_module.make_utterance

    def fail(decoders, inner, processor, text, *more):
        if text == TEXTS[1]:
            raise RuntimeError("a prompt that breaks")
        return make(decoders, inner, processor, text, *more)

    monkeypatch.setattr(engine_module, "make_utterance", fail)
    jobs = [ask(engine, text) for text in TEXTS[:3]]
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    assert "a prompt that breaks" in str(hear(jobs[1][1])[1])
    for number in (0, 2):
        assert hear(jobs[number][1])[1] == "end"
        assert np.array_equal(np.concatenate(jobs[number][0].codes), alone(TEXTS[number], "en", 0).codes)


def test_a_batch_that_breaks_tells_those_in_it_and_the_next_request_is_served(engine, monkeypatch):
    first = ask(engine, TEXTS[0])
    engine._admit()
    monkeypatch.setattr(engine.batches[engine.shelf], "step", lambda: 1 / 0)
    engine._step(engine.shelf)
    assert isinstance(hear(first[1])[1], ZeroDivisionError)
    second = ask(engine, TEXTS[0])
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    assert hear(second[1])[1] == "end"


def test_who_hangs_up_frees_the_row_with_the_next_frame_and_harms_nobody(engine, alone):
    stays, leaves = ask(engine, TEXTS[0]), ask(engine, TEXTS[1])
    engine._admit()
    for _ in range(3):
        engine._step(engine.shelf)
    engine.hang_up(leaves[0])
    engine._step(engine.shelf)
    assert engine.count_taken() == 1
    step_until(engine, lambda: not engine.count_taken())
    assert np.array_equal(np.concatenate(stays[0].codes), alone(TEXTS[0], "en", 0).codes)


def test_more_than_may_wait_are_turned_away_and_who_has_hung_up_does_not_wait(engine):
    jobs = [ask(engine, TEXTS[0]) for _ in range(16)]
    with pytest.raises(FullError, match="16 requests are waiting, which is as many as may"):
        ask(engine, TEXTS[0])
    engine.hang_up(jobs[3][0])
    ask(engine, TEXTS[0])


def test_rows_are_taken_by_those_that_came_first_across_languages(engine):
    jobs = [ask(engine, TEXTS[0], language)[0] for language in ("no", "sv", "da", "en", "no", "sv")]
    engine._admit()
    rows = {row.key.job for row in engine.batches[engine.shelf].rows if row}
    assert rows == set(jobs[:4])


def test_speech_ends_at_the_longest_that_was_asked_for_and_says_so(engine):
    job, told = ask(engine, TEXTS[0], seconds=0.4)
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    wav, finish = hear(told)
    assert finish == "length" and len(wav) == 0.4 * engine.rate


def test_chunks_grow_so_that_the_first_is_there_after_one_frame(engine):
    _, told = ask(engine, TEXTS[0])
    engine._admit()
    engine._step(engine.shelf)
    assert len(told.get_nowait()) == engine.rate / engine.frame_rate and told.empty()
    step_until(engine, lambda: not engine.count_taken())
    sizes = [len(event) * engine.frame_rate / engine.rate for event in told.queue if not isinstance(event, str)]
    assert sizes[:2] == [2, 4] and max(sizes) <= 12


def test_what_was_spoken_is_let_go_of_at_once(engine):
    gc.disable()  # which comes round late, and does not see how much the tensors of a codec's stream hold
    try:
        ask(engine, TEXTS[0], seconds=0.4)
        engine._admit()
        voice = weakref.ref(engine.batches[engine.shelf].rows[0].key)
        assert voice() is not None
        step_until(engine, lambda: not engine.count_taken())
        assert voice() is None
    finally:
        gc.enable()


def test_a_long_text_is_split_at_its_sentences_and_nothing_of_it_is_lost(engine):
    text = " ".join(make_sentences("en", 12, 0, "validation")) + " The number is 1234567890, and 9876543210 is the other one."
    assert len(text) > 300
    parts = engine.prepare(text, "en", "", 0, 30.0, print).parts
    assert "".join(" ".join(parts).split()) == "".join(text.split()) and len(parts) > 12
    assert engine.prepare(text[:300], "en", "", 0, 30.0, print).parts == [text[:300]]


def test_a_text_is_read_out_to_an_adapter_that_was_trained_so_before_it_is_measured(engine):
    assert engine.prepare("Vi har 12 katter.", "sv", "", 0, 30.0, print).parts == ["Vi har tolv katter."]
    assert engine.prepare("Vi har 12 katter.", "no", "", 0, 30.0, print).parts == ["Vi har 12 katter."]


def test_parts_are_said_one_after_the_other_with_a_pause_between_and_each_is_what_it_is_alone(engine, alone):
    job, told = ask(engine, TEXTS[0])
    job.parts = TEXTS[:3]
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    wav, finish = hear(told)
    speeches = [alone(text, "en", 0) for text in TEXTS[:3]]
    assert all(np.array_equal(codes, speech.codes) for codes, speech in zip(job.codes, speeches, strict=True))
    pause = int(0.3 * engine.rate)
    assert len(wav) == sum(len(speech.wav) for speech in speeches) + 2 * pause and finish == "end"
    place = len(speeches[0].wav)
    assert not np.any(wav[place : place + pause])


def test_of_parts_that_are_too_long_together_the_first_are_said_and_the_finish_tells(engine):
    job, told = ask(engine, TEXTS[0], seconds=1.5)
    job.parts = TEXTS[:3]
    step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    wav, finish = hear(told)
    assert finish == "length" and 0 < len(wav) <= 1.5 * engine.rate


def test_what_can_not_be_said_is_refused_at_the_door(engine):
    for text in ("  ", "?!", "🙂🙂", "\x00\x07"):
        with pytest.raises(SpeechError, match="nothing to say"):
            ask(engine, text)
    with pytest.raises(ValueError, match="unknown voice '1'; lora_no has 20, 5, for which OpenAI's names alloy, "):
        ask(engine, TEXTS[0], "no", "1")
    assert not engine.waiting


def test_openai_s_names_stand_for_the_voices_of_the_language_in_turn(engine):
    assert [ask(engine, TEXTS[0], "sv", name)[0].voice for name in ("", "alloy", "ash", "ballad")] == ["21", "21", "5", "21"]


@pytest.fixture(scope="module")
def folder(adapters, tmp_path_factory):
    """A folder of adapters that is changed."""
    return Path(shutil.copytree(adapters, tmp_path_factory.mktemp("changing") / "adapters"))


def test_an_adapter_that_goes_is_drained_and_one_that_comes_is_taken_up(folder, alone):
    engine = make_engine(folder)
    with torch.inference_mode():
        speaks = ask(engine, TEXTS[0], "no", seed=3)
        engine._admit()
        engine._step(engine.shelf)
        waits = ask(engine, TEXTS[1], "no", seed=3)
        before = engine.shelf
        shutil.rmtree(folder / "lora_no")
        assert engine.refresh() and not engine.refresh()
        assert list(engine.shelf.readers) == ["en", "sv", "da"]
        with pytest.raises(KeyError):
            ask(engine, TEXTS[0], "no")
        other = ask(engine, TEXTS[2], "sv", seed=3)
        step_until(engine, lambda: not engine.waiting and not engine.count_taken())
    for (job, told), text, language in zip((speaks, waits, other), TEXTS, ("no", "no", "sv"), strict=False):
        assert hear(told)[1] in ("end", "length")
        assert np.array_equal(np.concatenate(job.codes), alone(text, language, 3).codes)
    assert before not in engine.batches
    model, _ = load_base(BASE, "cpu")
    make_adapter(model, folder, "de+fr", 4)
    assert engine.refresh() and engine.shelf.readers["fr"].name == "lora_de+fr" and "no" not in engine.shelf.readers


def test_a_running_engine_looks_at_the_folder_by_itself(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "LOOK", 0.05)
    engine = make_engine(tmp_path)
    engine.start()
    try:
        shutil.copytree(adapters / "lora_no", tmp_path / "lora_no")
        wait_for(lambda: "no" in engine.shelf.readers)
        assert hear(ask(engine, TEXTS[0], "no", seconds=0.4)[1])[1] == "length"
        shutil.rmtree(tmp_path / "lora_no")
        wait_for(lambda: "no" not in engine.shelf.readers)
    finally:
        engine.stop()


def test_what_does_not_work_is_not_listed_and_says_why(tmp_path):
    model, _ = load_base(BASE, "cpu")
    make_adapter(model, tmp_path, "no", 0, weight=False)
    make_adapter(model, tmp_path, "sv", 1)
    make_adapter(model, tmp_path, "no+sv", 2)
    shutil.copytree(tmp_path / "lora_sv", tmp_path / "lora_da")  # of another language than its name says
    shutil.copytree(tmp_path / "lora_sv", tmp_path / "lora_xx")
    make_adapter(model, tmp_path, "fr", 3)
    (tmp_path / "lora_fr" / "adapter_model.safetensors").write_bytes(b"half")
    make_adapter(model, tmp_path, "pl", 4)
    (tmp_path / "lora_pl" / "adapter_model.safetensors").rename(tmp_path / "lora_pl" / "adapter_model.bin")
    (tmp_path / "lora_it").mkdir()
    make_adapter(model, tmp_path, "es", 5)
    (tmp_path / "lora_es" / "base.json").write_text('{"speakers": [{"number": 1}]}')
    shelf = make_engine(tmp_path).shelf
    assert {code: reader.name for code, reader in shelf.readers.items()} == {"en": "", "sv": "lora_sv", "no": "lora_no+sv"}
    reasons = {"lora_no": "changes nothing", "lora_da": "trained on sv", "lora_xx": "no language xx",
               "lora_fr": "can not be read", "lora_pl": "no adapter_model.safetensors", "lora_es": "train it again"}
    assert shelf.faults.keys() == reasons.keys() and all(text in shelf.faults[name] for name, text in reasons.items())


def test_at_the_end_whoever_waits_is_told(adapters):
    engine = make_engine(adapters, slots=1)
    engine.start()
    jobs = [ask(engine, " ".join(TEXTS[:2])) for _ in range(5)]
    engine.stop()
    assert isinstance(hear(jobs[-1][1])[1], FullError)
    with pytest.raises(FullError, match="going down"):
        ask(engine, TEXTS[0])
