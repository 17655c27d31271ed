"""Long texts are said whole, streams are what is said at once, and what is not understood is said again."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from transformers import CsmForConditionalGeneration

from csm_nb.codec.mimi import decode
from csm_nb.csm.__main__ import main as csm_main
from csm_nb.csm.adapters import add_adapter, load_adapter
from csm_nb.csm.load import load_base, tie_codebooks
from csm_nb.csm.record import set_record
from csm_nb.csm.save import save_adapter
from csm_nb.csm.speakers import get_speakers
from csm_nb.judge.judges import load_asr
from csm_nb.keep import Keep
from csm_nb.speak import attempts, generate
from csm_nb.speak.__main__ import main
from csm_nb.speak.generate import Speech, SpeechError, check_text, speak
from csm_nb.speak.long import PAUSE, join_speech, read_aloud
from csm_nb.speak.stream import RAMP, chunk_frames, stream_speech

STORY = "The cat is here. My brother buys a big red house. Where are you? Good morning!"


@pytest.fixture(scope="module")
def base():
    return load_base("models/csm-mini", "cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder lora_no of an adapter that changes what is said, with two voices."""
    model = add_adapter(load_base("models/csm-mini", "cpu")[0], 8, 16, 0.0, text_embeddings=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    voices = [{"number": str(n), "corpus": "espeak-ng", "speaker": f"v{n}", "clips": 9 - n, "hours": 0.1, "own": True}
              for n in (0, 1)]
    set_record(model, speakers=voices)
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "lora_no", {"language": "no"}, "models/csm-mini")


@pytest.mark.parametrize("frames", [0, 1, 2, 7, 40])
def test_chunks_grow_and_joined_are_what_is_decoded_at_once(base, frames):
    codes = np.random.default_rng(frames).integers(0, 512, (frames, 8)).astype(np.uint16)
    sizes = [len(chunk) for chunk in chunk_frames(codes)]
    assert sizes[:3] == [*RAMP[:3]][: len(sizes)] or frames < sum(RAMP[:3])
    assert sum(sizes) == frames and max([0, *sizes]) <= RAMP[-1]
    chunks = list(stream_speech(base[0], iter(codes)))
    joined = np.concatenate([np.zeros(0, np.float32), *chunks])
    if frames:
        whole = decode(base[0].codec_model, [codes])[0]
        assert len(joined) == len(whole) and np.abs(joined - whole).max() <= 1e-6
        as_16_bit = [np.round(wav * 32767).astype(int) for wav in (joined, whole)]
        assert np.abs(as_16_bit[0] - as_16_bit[1]).max() <= 1
    else:
        assert len(joined) == 0


def test_a_long_text_is_said_sentence_by_sentence_each_after_the_one_before(base):
    seen = []
    reading = read_aloud(*base, STORY, "en", on_sentence=lambda *at: seen.append(at))
    assert [one.text for one in reading.said] == ["The cat is here.", "My brother buys a big red house.", "Where are you?",
                                                  "Good morning!"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and reading.starts == sorted(reading.starts)
    first = speak(*base, [reading.said[0].text])[0]
    assert np.array_equal(first.codes, reading.said[0].codes)
    after = speak(*base, [reading.said[1].text], context=[(first.text, first.codes, "0")])[0]
    assert np.array_equal(after.codes, reading.said[1].codes)
    with pytest.raises(SpeechError, match="nothing to say"):
        read_aloud(*base, "… – !", "en")


def test_weights_are_read_once_for_all_sentences_and_not_where_all_was_said_before(base, tmp_path, monkeypatch):
    made, read = [], generate.Decoders
    monkeypatch.setattr(generate, "Decoders", lambda *given: made.append(given) or read(*given))
    read_aloud(*base, STORY, "en")
    assert len(made) == 1
    for _ in range(2):
        speak(*base, [STORY[:16]], keep=Keep(tmp_path))
    assert len(made) == 2


def test_pauses_are_even_levels_alike_and_no_sample_over_full_scale():
    tone = np.sin(np.arange(24_000) * 0.05).astype(np.float32)
    silence = np.zeros(6_000, np.float32)
    said = [Speech("", np.concatenate([silence * n, silence[: 1000 * n], tone * level, silence]), np.zeros((1, 8)), "end")
            for n, level in enumerate((0.2, 0.3, 0.25, 0.999))]
    reading = join_speech(said)
    gaps = np.diff(reading.starts) - 1.0
    assert np.abs(gaps - PAUSE).max() < 0.03 and np.abs(reading.wav).max() <= 1
    levels = [np.abs(reading.wav[round(start * 24_000) :][2_000:20_000]).max() for start in reading.starts]
    assert np.ptp(levels[:3]) < 0.01 and levels[3] == pytest.approx(0.999 / 10 ** (6 / 20), abs=0.01)


def test_what_is_not_understood_is_said_again_by_another_seed_and_the_best_is_kept(base, monkeypatch):
    heard = {0: ["the cat is here", "nothing of it"], 1_000_003: ["where are they"], 2_000_006: ["where were they all"]}
    asked = []

    def say(model, processor, texts, seed=0, **how):
        asked.append((list(texts), seed))
        return [Speech(text, np.full(9, seed, np.float32), np.zeros((1, 8)), "end") for text in texts]

    monkeypatch.setattr(attempts, "speak", say)
    monkeypatch.setattr(attempts, "transcribe", lambda asr, wavs: heard[int(wavs[0][0])])
    texts = ["The cat is here.", "Where are you?"]
    said, account = attempts.speak_again(None, None, texts, "en", None, attempts=3, most_cer=0.1)
    assert asked == [(texts, 0), (texts[1:], 1_000_003), (texts[1:], 2_000_006)]
    assert [one.finish for one in said] == ["end", "retry"] and said[1].wav[0] == 1_000_003
    assert account == {"texts": 2, "said again": 1, "clips": 4, "still over the bound": 1}


def test_a_real_recogniser_lets_what_is_clear_pass(base):
    said, account = attempts.speak_again(*base, ["The cat is here."], "en", load_asr("models/asr-mini", "cpu", "en"), 4, 0.5)
    assert account["still over the bound"] == 0 and said[0].ended


@pytest.mark.parametrize("adapted", [False, True])
def test_a_text_becomes_a_file_that_says_that_it_is_synthetic(adapted, adapter, tmp_path, capsys):
    more = ["--lang", "no", "--adapters", str(adapter.parent)] if adapted else []
    out = tmp_path / "hi.wav"
    assert main(["--text", "Hi there. Where are you?", "--out", str(out), "--device", "cpu", "--seed", "3", *more]) == 0
    said = capsys.readouterr().out
    assert f"by {'lora_no' if adapted else 'base'}, 2 sentences (2 end)" in said or "length" in said
    with soundfile.SoundFile(out) as file:
        assert file.samplerate == 24_000 and len(file) > 10_000
        assert file.comment == f"synthetic speech: csm-nb, csm-mini, {'lora_no' if adapted else 'base'}, seed 3"


def test_text_comes_from_a_pipe_and_a_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "t.txt").write_text("Good morning!", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Good morning!"))
    for number, more in enumerate((["--file", str(tmp_path / "t.txt")], [])):
        assert main([*more, "--out", str(tmp_path / f"{number}.wav"), "--device", "cpu"]) == 0
    wavs = [soundfile.read(tmp_path / f"{number}.wav")[0] for number in range(2)]
    assert np.array_equal(*wavs)


def test_an_adapter_of_several_languages_speaks_each_with_its_tag_alone_and_merged(adapter, tmp_path, capsys):
    model = load_adapter(load_base("models/csm-mini", "cpu")[0], adapter)
    processor, tags = load_base("models/csm-mini", "cpu")[1], {"no": "<lang:no>", "sv": "<lang:sv>"}
    set_record(model, tags=tags)
    expected = {code: speak(model, processor, ["Hej, du."], language=code)[0].wav for code in tags}
    card = {"language": "no", "licence": "of the data: CC BY-NC 4.0", "commercial use": "none"}
    shared = tmp_path / "all" / "lora_no+sv"
    model.peft_config["default"] = model.peft_config[model.active_adapter]
    save_adapter(model, shared, card, "models/csm-mini")
    assert csm_main(["merge", str(shared), "--out", str(tmp_path / "csm-both")]) == 0
    assert "| commercial use | none |" in (text := (tmp_path / "csm-both/README.md").read_text(encoding="utf-8"))
    assert "CC BY-NC 4.0" in text
    assert not np.array_equal(*(wav[:1000] for wav in expected.values()))
    for more in (["--adapters", str(shared.parent)], ["--base", str(tmp_path / "csm-both"), "--adapters", str(tmp_path)]):
        for code in tags:
            out = tmp_path / "said.wav"
            assert main(["--lang", code, "--text", "Hej, du.", "--out", str(out), "--device", "cpu", *more]) == 0, (
                capsys.readouterr().err)
            wav, whole = soundfile.read(out)[0], join_speech([Speech("", expected[code], np.zeros((1, 8)), "end")]).wav
            assert len(wav) == len(whole) and np.abs(wav - whole).max() < 1e-3


def test_a_sentence_of_more_digits_than_the_model_has_room_for_is_said_in_pieces(base, monkeypatch):
    given = []

    def speak_nothing(model, processor, texts, **how):
        given.extend(texts)
        return [Speech(texts[0], np.zeros(24_000, np.float32), np.zeros((25, 8), np.uint16), "end")]

    monkeypatch.setattr("csm_nb.speak.long.speak", speak_nothing)
    text = f"Ring: {', '.join(str(number) for number in range(20000000, 20000012))}."
    read_aloud(*base, text, "no")
    assert " ".join(given) == text and len(given) > 1
    for part in given:
        check_text(*base, part)


def test_what_was_said_before_is_read_out_as_well(base):
    model = base[0]
    try:
        set_record(model, read_out=True, language="en")
        reading = read_aloud(*base, "Take 5 kg. The cat is here.", "en")
        first, second = reading.said
        after = speak(*base, [second.text], context=[("Take five kilograms.", first.codes, "0")])[0]
    finally:
        set_record(model, read_out=False)
    assert [one.text for one in reading.said] == ["Take 5 kg.", "The cat is here."] and first.ended
    assert np.array_equal(after.codes, second.codes)


@pytest.mark.parametrize(("more", "words"), [
    (["--lang", "sv"], "there is no .*lora_sv; there: lora_no. `make run LANGS=sv` makes it"),
    (["--lang", "xx"], "unknown language 'xx'; one of"), (["--lang", "no", "--speaker", "77"], "77"),
    (["--text", " "], "nothing to say"), (["--base", "models/none"], "models/none"), (["--file", "none.txt"], "none.txt"),
    (["--out", "speech.xyz"], "xyz"),
])
def test_what_can_not_be_said_is_named_with_what_is_allowed(more, words, adapter, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    text = [] if "--file" in more or "--text" in more else ["--text", "Hei."]
    assert main(["--adapters", str(adapter.parent), "--device", "cpu", *text, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(words, error) and "Traceback" not in error


def test_a_merged_adapter_says_what_it_says_on_its_base_and_transformers_loads_it_alone(adapter, tmp_path, capsys):
    assert csm_main(["merge", str(adapter), "--out", str(tmp_path / "csm-no")]) == 0
    texts = ["Hei, hvor er du?", "Det er fint."]
    model, processor = load_base("models/csm-mini", "cpu")
    worn = speak(load_adapter(model, adapter), processor, texts, temperature=0)
    merged, processor = load_base(str(tmp_path / "csm-no"), "cpu")
    assert [voice["speaker"] for voice in get_speakers(merged)] == ["v0", "v1"]
    alone = speak(merged, processor, texts, temperature=0)
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(worn, alone, strict=True))
    theirs, info = CsmForConditionalGeneration.from_pretrained(tmp_path / "csm-no", output_loading_info=True)
    tie_codebooks(theirs, info["missing_keys"])
    assert torch.equal(theirs.lm_head.weight, merged.lm_head.weight) and not info["unexpected_keys"]
    assert "Norwegian" in (tmp_path / "csm-no/README.md").read_text(encoding="utf-8") or "lora_no" in (
        tmp_path / "csm-no/README.md").read_text(encoding="utf-8")


def test_merging_what_is_no_adapter_is_refused_in_words(tmp_path, capsys):
    assert csm_main(["merge", str(tmp_path), "--out", str(tmp_path / "m")]) == 2
    assert "names no base" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_the_command_line_answers_for_help():
    found = subprocess.run([sys.executable, "-m", "csm_nb.speak", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "--attempts" in found.stdout
