"""Numbers of speakers: one voice each, kept over stages, and nobody speaks with a voice that was not trained."""

import ast
import json

import datasets
import pytest
import torch

from csm_nb.csm.adapters import add_adapter, load_adapter, start_training
from csm_nb.csm.load import load_base
from csm_nb.csm.save import save_adapter, save_full
from csm_nb.csm.speakers import (
    SpeakerError,
    count_speakers,
    find_clip,
    get_speakers,
    list_speakers,
    number_speakers,
    pick_voice,
    read_speakers,
)
from csm_nb.manifest import read_manifest, write_manifest
from csm_nb.paths import ROOT
from csm_nb.speak.generate import speak
from csm_nb.synth.corpus import HELD_OUT_VOICES, make_corpus
from csm_nb.synth.espeak import VOICES

FOREIGN = ("p0042", "0", "æ ø", 7)


def make_foreign(folder, speakers=FOREIGN, text="Hej."):
    rows = [{"text": text, "audio_path": str(folder / f"{i}.wav"), "speaker_id": speaker, "language": "da", "duration": 2.0}
            for i, speaker in enumerate(speakers)]
    return write_manifest(rows, folder / "manifest.jsonl"), rows


def keep(folder, speakers, rows):
    """The folder of an adapter that was trained on `rows`."""
    folder.mkdir()
    (folder / "base.json").write_text(json.dumps({"speakers": count_speakers(speakers, rows)}))
    return folder


def numbers(rows):
    return [row["speaker_id"] for row in rows]


def test_espeak_s_voices_keep_the_numbers_that_the_base_knows(tmp_path):
    voices = (*VOICES, *HELD_OUT_VOICES)
    texts = [f"Hej {word}." for word in ("du", "igen", "mor", "far", "bo", "ole")]
    rows = read_manifest(make_corpus(texts, "da", tmp_path, voices))
    numbered, speakers = number_speakers(rows)
    assert numbers(numbered) == ["0", "1", "2", "3", "4", "5"]
    assert {one["corpus"] for one in speakers} == {"espeak-ng (synthetic)"}


def test_a_corpus_s_speakers_become_small_integers_that_are_none_of_espeak_s(tmp_path):
    corpus, rows = make_foreign(tmp_path)
    numbered, speakers = number_speakers(rows, corpus)
    assert sorted(numbers(numbered)) == ["6", "7", "8", "9"]
    assert {one["speaker"]: str(one["number"]) for one in speakers} == {
        str(row["speaker_id"]): number for row, number in zip(rows, numbers(numbered), strict=True)}
    assert [row["speaker_id"] for row in rows] == list(FOREIGN)  # what was given stays as it is


def test_no_number_means_two_voices_over_stages_and_corpora(tmp_path):
    for name, text in (("a", "Hej."), ("b", "Nej.")):
        (tmp_path / name).mkdir()
        make_foreign(tmp_path / name, text=text)
    first, second = (make_foreign(tmp_path / name, text=text) for name, text in (("a", "Hej."), ("b", "Nej.")))
    espeak = [{"speaker_id": "0", "source": "espeak-ng (synthetic)", "duration": 1.0}]
    numbered, speakers = number_speakers(espeak)
    before = keep(tmp_path / "01", speakers, numbered)
    numbered, speakers = number_speakers(first[1], first[0], before)
    before = keep(tmp_path / "02", speakers, numbered)
    assert numbers(numbered) == ["8", "6", "9", "7"]
    again, same = number_speakers(first[1][::-1], tmp_path / "a", before)  # the folder for the manifest in it
    assert numbers(again) == ["7", "9", "6", "8"] and len(same) == 5
    other, speakers = number_speakers(second[1], second[0], before)
    assert sorted(map(int, numbers(other))) == [10, 11, 12, 13]
    assert len({one["number"] for one in speakers}) == len(speakers) == 9


def test_a_corpus_that_was_moved_keeps_its_numbers_and_one_that_was_changed_gets_new_ones(tmp_path):
    (tmp_path / "a").mkdir()
    corpus, rows = make_foreign(tmp_path / "a")
    numbered, speakers = number_speakers(rows, corpus)
    before = keep(tmp_path / "03", speakers, numbered)
    (tmp_path / "a").rename(tmp_path / "b")
    assert numbers(number_speakers(rows, tmp_path / "b/manifest.jsonl", before)[0]) == numbers(numbered)
    (tmp_path / "b/manifest.jsonl").write_text(json.dumps({"text": "other people"}))
    assert not set(numbers(number_speakers(rows, tmp_path / "b", before)[0])) & set(numbers(numbered))


def test_a_row_that_only_calls_itself_0_is_not_espeak_s_voice(tmp_path):
    corpus, rows = make_foreign(tmp_path, ("0",))
    rows += [rows[0] | {"source": "espeak-ng (synthetic)", "voice": {"speaker_id": "0", "variant": "f1"}}]
    assert numbers(number_speakers(rows, corpus)[0]) == ["6", "6"]
    with pytest.raises(SpeakerError, match="need the corpus"):
        number_speakers(rows)


def test_the_same_id_composed_and_decomposed_is_one_speaker(tmp_path):
    corpus, rows = make_foreign(tmp_path, ("p\u00e5l", "pa\u030al"))
    assert len(set(numbers(number_speakers(rows, corpus)[0]))) == 1


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_a_speaker_whose_clips_are_all_held_out_does_not_speak(kind, tmp_path):
    corpus, rows = make_foreign(tmp_path)
    numbered, speakers = number_speakers(rows * 3, corpus)
    train = [row for row in numbered if row["speaker_id"] != "6"] + [row for row in numbered if row["speaker_id"] == "9"]
    if kind == "dataset":
        train = datasets.Dataset.from_list([{key: row[key] for key in ("speaker_id", "duration")} for row in train])
    speakers = count_speakers(speakers, train)
    assert [(one["number"], one["clips"], one["own"]) for one in speakers] == [
        (6, 0, False), (7, 3, True), (8, 3, True), (9, 6, True)]
    assert speakers[3]["hours"] == pytest.approx(12 / 3600, abs=5e-4) and pick_voice(speakers) == "9"
    with pytest.raises(SpeakerError, match=r"speaker '6' is no voice .* allowed are 7 \(3 clips, 0.00 h\), 8 .*, 9"):
        pick_voice(speakers, "6")


def test_the_clip_to_compare_with_is_the_voice_s_own():
    rows = [{"speaker_id": "6", "text": "a" * n} for n in (400, 35, 3)] + [{"speaker_id": "7", "text": "b" * 40}]
    assert find_clip(rows, "6")["text"] == "a" * 35


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter of three stages: espeak-ng's voices, then a corpus with the speakers 6 to 9."""
    place = tmp_path_factory.mktemp("trained")
    corpus, rows = make_foreign(place)
    spoken, speakers = number_speakers([{"speaker_id": "0", "source": "espeak-ng (synthetic)", "duration": 1.0}])
    espeak = keep(place / "02", speakers, spoken)
    numbered, speakers = number_speakers(rows + rows[:1], corpus, espeak)
    model, _ = load_base("models/csm-mini", "cpu")
    torch.manual_seed(0)
    model = start_training(model, "lora", None, 4, 8, 0.0, speakers=count_speakers(speakers, numbered))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02)
    return model, save_adapter(model, place / "lora_da", {"language": "da"}, "models/csm-mini")


def test_the_numbers_are_kept_with_the_adapter_and_go_on_with_it(trained):
    model, folder = trained
    kept = read_speakers(folder)
    assert [(one["number"], one["speaker"], one["own"]) for one in kept] == [
        (0, "0", False), (6, "0", True), (7, "7", True), (8, "p0042", True), (9, "æ ø", True)]
    loaded = load_adapter(load_base("models/csm-mini", "cpu")[0], folder)
    assert get_speakers(loaded) == kept and pick_voice(kept) == "8"
    assert get_speakers(start_training(load_base("models/csm-mini", "cpu")[0], "lora", folder)) == kept


def test_an_adapter_speaks_with_its_own_voice_and_refuses_others(trained, monkeypatch):
    model, folder = trained
    _, processor = load_base("models/csm-mini", "cpu")
    said = []
    monkeypatch.setattr("csm_nb.speak.generate.encode_text", lambda *prompt: said.append(prompt[2]) or [5, 6, 7])
    speak(model, processor, ["Hej."])
    assert set(said) == {"8"}
    for wrong in ("0", "4", "p0042", ["8", "5"]):
        with pytest.raises(SpeakerError, match=r"allowed are 6 \(1 clips, 0.00 h\), 7 .*, 8 \(2 clips.*, 9"):
            speak(model, processor, ["Hej."] * (2 if isinstance(wrong, list) else 1), wrong)
    with model.disable_adapter():
        said.clear()
        speak(model, processor, ["Hello."])
        assert set(said) == {"0"}


def test_a_fully_trained_model_keeps_its_speakers_too(tmp_path):
    model, processor = load_base("models/csm-mini", "cpu")
    model = start_training(model, "full", speakers=[{"number": 6, "corpus": "a", "content": "b", "speaker": "c", "clips": 3,
                                                     "hours": 0.1, "own": True}])
    folder = save_full(model, processor, tmp_path / "full_da", {"language": "da"})
    assert pick_voice(get_speakers(load_base(folder, "cpu")[0])) == "6" and "| speakers | 6 (3 clips, 0.10 h) |" in (
        folder / "README.md").read_text()


def test_without_a_list_nothing_is_known_and_every_voice_is_allowed():
    model, _ = load_base("models/csm-mini", "cpu")
    assert get_speakers(model) == get_speakers(add_adapter(model, 4, 8, 0.0)) == []
    assert pick_voice([]) == "0" and pick_voice([], "3") == "3" and list_speakers([]) == ""


@pytest.mark.parametrize("stage", ["01_anchor", "02_synthetic", "03_adapter", "05_phonemes"])
def test_everything_that_speaks_in_a_notebook_does_so_with_the_voice_that_was_trained(stage):
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
    notebook = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "stage.train(run, training" in notebook
    tree = ast.parse(notebook + "\n" + (ROOT / "csm_nb" / "teaching" / "stage.py").read_text())
    calls = [(ast.unparse(node.func), [ast.unparse(argument) for argument in (*node.args, *(key.value for key in node.keywords))])
             for node in ast.walk(tree) if isinstance(node, ast.Call)]
    speaking = [given for name, given in calls if name in ("speak", "generate.speak", "callbacks.SpeakSamples",
                                                           "select.judge_model", "select.select_checkpoint")]
    assert len(speaking) >= 5 and all({"data.voice", "training.data.voice", "speak"} & set(given) for given in speaking)
    assert "**speak" not in notebook or 'speak = {"speaker_ids": data.voice,' in notebook
