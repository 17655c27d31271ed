"""Windows of stød come from marks or an alignment, and what can not be used is named."""

from types import SimpleNamespace

import numpy as np
import pytest
from parselmouth.praat import call

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.judge import judges
from csm_nb.prosody import marks
from csm_nb.synth.espeak import VOICES, speak_phonemes, speak_text
from csm_nb.text import normalise


@pytest.fixture(scope="module")
def asr():
    return judges.load_asr("models/asr-mini", "cpu")


def test_marks_in_a_table_are_read_by_file(tmp_path):
    path = tmp_path / "marks.tsv"
    path.write_text("audio\tstart\tend\tstod\na.wav\t0.1\t0.4\t1\na.wav\t0.5\t0.8\t0\nb.ogg\t0\t0.2\tstød\n", encoding="utf-8")
    assert marks.read_marks(path) == {"a": [[0.1, 0.4, True], [0.5, 0.8, False]], "b": [[0.0, 0.2, True]]}


def test_marks_are_read_in_any_unicode_encoding_and_form(tmp_path):
    path = tmp_path / "marks.tsv"
    text = "audio\tstart\tend\tstod\npa\u030a.wav\t0.1\t0.4\t1\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        found = marks.read_marks(path)
        assert found == {"på": [[0.1, 0.4, True]]}
    rows = [{"audio_path": f"x/{name}.wav", "text": ""} for name in ("på", "pa\u030a")]
    assert [len(marks.find_windows([row], found)[0]) for row in rows] == [1, 1]  # two files of one name would be in doubt
    path.write_bytes("audio\tstart\tend\tstod\npå.wav\t0.1\t0.4\t1\n".encode("latin-1"))
    with pytest.raises(marks.MarksError, match="marks.tsv, line 2: not UTF-8"):
        marks.read_marks(path)
    path.write_text("")
    with pytest.raises(marks.MarksError, match="marks.tsv: .*marks are a TSV"):
        marks.read_marks(path)


@pytest.mark.parametrize(("text", "says"), [
    ("audio\tstart\tend\na.wav\t0\t1\n", "stod missing"),
    ("audio\tstart\tend\tstod\na.wav\tx\t1\t1\n", "line 2"),
    ("audio\tstart\tend\tstod\na.wav\t1\t0.5\t1\n", "0 <= start < end"),
    ("audio\tstart\tend\tstod\na.wav\t0\t1\tmaybe\n", "'maybe'"),
    ("audio\tstart\tend\tstod\na.wav\t0\t1\t\n", "1 or 0"),
], ids=["column", "number", "order", "label", "no label"])  # fmt: skip
def test_wrong_marks_are_named_with_what_is_allowed(tmp_path, text, says):
    path = tmp_path / "marks.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(marks.MarksError, match=says):
        marks.read_marks(path)


def write_textgrid(path, tier="stod", labels=("1", "", "0")):
    grid = call("Create TextGrid", 0, 0.9, tier, "")
    for time in (0.3, 0.6):
        call(grid, "Insert boundary", 1, time)
    for number, label in enumerate(labels, 1):
        call(grid, "Set interval text", 1, number, label)
    call(grid, "Save as text file", str(path))


def test_marks_in_a_folder_of_textgrids_are_read_by_name(tmp_path):
    write_textgrid(tmp_path / "a.TextGrid")
    assert marks.read_marks(tmp_path) == {"a": [[0.0, pytest.approx(0.3), True], [pytest.approx(0.6), pytest.approx(0.9), False]]}


def test_a_textgrid_without_the_tier_or_with_another_label_is_named(tmp_path):
    write_textgrid(tmp_path / "a.TextGrid", tier="words")
    with pytest.raises(marks.MarksError, match="words.*'stod'"):
        marks.read_marks(tmp_path)
    write_textgrid(tmp_path / "a.TextGrid", labels=("1", "creak", ""))
    with pytest.raises(marks.MarksError, match="'creak'"):
        marks.read_marks(tmp_path)
    (tmp_path / "a.TextGrid").write_text("no grid")
    with pytest.raises(marks.MarksError, match="a.TextGrid"):
        marks.read_marks(tmp_path)


@pytest.mark.parametrize("text", [b"", b"a\tb\n1\t2\t3\t4\n"], ids=["empty", "ragged"])
def test_a_table_that_can_not_be_read_is_named(tmp_path, text):
    path = tmp_path / "marks.tsv"
    path.write_bytes(text)
    with pytest.raises(marks.MarksError, match="marks.tsv"):
        marks.read_marks(path)


def write_marks(path, *lines):
    rows = ["audio\tstart\tend\tstod", *("\t".join(map(str, line)) for line in lines)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8-sig")  # as Excel saves it
    return path


def test_a_window_that_is_given_twice_counts_once_and_one_with_two_labels_is_refused(tmp_path):
    lines = [("a.wav", 0.1, 0.4, 1), ("a.wav", "0.10", 0.4, "stød"), ("./a.WAV", 0.1, 0.4, 1), ("a.wav", 0.5, 0.8, 1)]
    assert marks.read_marks(write_marks(tmp_path / "marks.tsv", *lines)) == {"a": [[0.1, 0.4, True], [0.5, 0.8, True]]}
    with pytest.raises(marks.MarksError, match="lines 2 and 6.*with and as without"):
        marks.read_marks(write_marks(tmp_path / "marks.tsv", *lines, ("a.wav", 0.1, 0.4, 0)))


def test_marks_are_those_of_the_file_that_their_path_means(tmp_path):
    rows = [{"audio_path": f"/corpus/{name}.wav", "text": ""} for name in ("a/1", "b/1", "c/1", "c/x.2", "c/p\u00e5")]
    lines = [("a/1.wav", 0, 1, 1), ("/corpus/b/1.wav", 0, 2, 1), ("x.2", 0, 3, 1), ("pa\u030a.wav", 0, 4, 1)]
    lines.append(("nobody.wav", 0, 5, 1))
    read = marks.read_marks(write_marks(tmp_path / "marks.tsv", *lines))
    found, set_aside = marks.find_windows(rows, read)
    ends = {row["audio_path"][8:]: row["windows"][0][1] for row in found}
    assert ends == {"a/1.wav": 1, "b/1.wav": 2, "c/x.2.wav": 3, "c/p\u00e5.wav": 4}
    assert [row["audio_path"] for row in set_aside] == ["/corpus/c/1.wav"]


def test_marks_that_fit_several_files_are_set_aside_and_never_guessed(tmp_path):
    rows = [{"audio_path": f"/corpus/{name}.wav", "text": ""} for name in ("a/1", "b/1", "b/2")]
    read = marks.read_marks(write_marks(tmp_path / "marks.tsv", ("1.wav", 0, 1, 1), ("2.wav", 0, 1, 1)))
    found, set_aside = marks.find_windows(rows, read)
    assert [row["audio_path"] for row in found] == ["/corpus/b/2.wav"]
    assert all("'1' fit several files" in row["reason"] for row in set_aside) and len(set_aside) == 2
    assert marks.find_windows(rows[:1], read, among=rows)[0] == []  # the other one was drawn by nobody, or is broken


def test_textgrids_of_one_name_in_two_folders_belong_to_the_audio_of_theirs(tmp_path):
    for folder, labels in (("a", ("1", "", "")), ("b", ("", "", "0"))):
        (tmp_path / folder).mkdir()
        write_textgrid(tmp_path / folder / "1.TextGrid", labels=labels)
    found, _ = marks.find_windows([{"audio_path": f"/corpus/{name}.wav", "text": ""} for name in ("a/1", "b/1")],
                                  marks.read_marks(tmp_path))  # fmt: skip
    assert [[stod for *_, stod in row["windows"]] for row in found] == [[True], [False]]


def test_a_file_and_a_window_that_come_twice_are_measured_once():
    row = {"audio_path": "/corpus/a.wav", "text": "", "stod": 1}
    found, set_aside = marks.find_windows([row | {"windows": [[0, 1, True], [0, 1, True]]}, row], {"a": [[0, 1, True]]})
    assert [row["windows"] for row in found] == [[[0, 1, True]]]
    assert [row["reason"] for row in set_aside] == ["the same file as a clip before"]
    windows = [[0, 1, True], [0, 1, False]]
    assert "with and as without" in marks.find_windows([row | {"windows": windows}])[1][0]["reason"]


def test_a_mark_behind_the_end_of_its_clip_is_set_aside():
    row = {"audio_path": "/corpus/a.wav", "text": "", "duration": 1.0}
    assert marks.find_windows([row], {"a": [[0.5, 1.05, True]]})[1] == []
    assert "marked up to 2 s, and it is 1 s long" in marks.find_windows([row], {"a": [[0.5, 2, True]]})[1][0]["reason"]


def place_letters(asr, wav, text):
    spans, heard = marks.align_text(asr, wav, text)
    return list(zip(normalise.normalise_text(text), spans, strict=True)), heard


def test_letters_are_aligned_to_where_they_are_said(asr):
    text = "Manden køber en bil."
    wav, phonemes = speak_phonemes(text, "da", VOICES[0])
    letters, heard = place_letters(asr, wav, text)
    assert "".join(letter for letter, _ in letters) == heard == "manden køber en bil"
    starts = {name: time for time, name in phonemes}
    said = next(span[0] for letter, span in letters if letter == "k")
    assert said == pytest.approx(starts["k"], abs=0.08)


def change_vocabulary(asr, change):
    """The recogniser with other names for its tokens: `change` maps each to a name, or to None."""
    vocabulary = {change(token): number for token, number in asr.tokenizer.get_vocab().items() if change(token)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, pad_token_id=0, all_special_tokens=["<pad>", "<unk>"],
                                word_delimiter_token="|", decode=asr.tokenizer.decode)  # fmt: skip
    return SimpleNamespace(type="ctc_with_lm", tokenizer=tokenizer, feature_extractor=asr.feature_extractor, model=asr.model,
                           device=asr.device)  # fmt: skip


@pytest.mark.parametrize("change", [
    lambda token: token if "<" in token else token.upper(), lambda token: None if token == "k" else token,
    lambda token: None if token == "|" else token, lambda token: None if token == "é" else token,
], ids=["capitals", "no k", "no delimiter", "no accent"])  # fmt: skip
def test_each_span_belongs_to_its_letter_whatever_letters_the_recogniser_has(asr, change):
    text = "Manden køber en kafé."
    wav = speak_text(text, "da", VOICES[0])
    whole, _ = place_letters(asr, wav, text)
    letters, _ = place_letters(change_vocabulary(asr, change), wav, text)
    lacking = {letter for letter in " k" if not change({" ": "|"}.get(letter, letter))}
    assert [letter for letter, span in letters if span is None] == [letter for letter, _ in whole if letter in lacking]
    for (letter, span), (_, before) in zip(letters, whole, strict=True):
        if span:
            assert span[0] == pytest.approx(before[0], abs=0.1), letter


def test_a_recogniser_without_the_letters_of_the_text_gives_a_reason(asr):
    latin = change_vocabulary(asr, lambda token: token if "<" in token else None)
    window, reason = marks.align_rhyme(latin, speak_text("En bil.", "da"), "En bil.", "da")
    assert window is None and reason == "the recogniser has no letter of 'en bil'"


def test_the_rhyme_is_found_where_the_last_word_has_a_letter_that_the_recogniser_lacks(asr):
    wav = speak_text("Manden køber en bil.", "da", VOICES[0])
    lacking = change_vocabulary(asr, lambda token: None if token in "bk" else token)
    windows = [marks.align_rhyme(judge_, wav, "Manden køber en bil.", "da")[0] for judge_ in (asr, lacking)]
    assert windows[1][0] == pytest.approx(windows[0][0], abs=0.08)


def test_the_rhyme_of_the_last_word_is_found_between_silences(asr):
    wav, phonemes = speak_phonemes("En bil.", "da", VOICES[0])
    quiet = np.zeros(SAMPLE_RATE // 2, np.float32)
    window, reason = marks.align_rhyme(asr, np.concatenate([quiet, wav, quiet]), "En bil.", "da")
    vowel = 0.5 + next(phonemes[i + 1][0] for i, (_, name) in enumerate(phonemes) if name == "b")
    assert reason == "" and window[0] == pytest.approx(vowel, abs=0.1) and window[1] <= 0.5 + len(wav) / SAMPLE_RATE


def test_rows_without_marks_or_with_a_text_that_is_not_heard_are_set_aside_with_the_reason(asr, tmp_path):
    path = write_audio(tmp_path / "other.wav", speak_text("Hun kommer hjem i aften.", "da"))
    rows = [{"audio_path": str(path), "text": "kartoffel", "speaker_id": "a", "language": "da"} | more
            for more in ({}, {"stod": 1}, {"stod": 1, "text": ""}, {"windows": [[0, 1, True]]})]
    found, set_aside = marks.find_windows(rows, None, asr)
    assert len(found) == 1
    reasons = [row["reason"] for row in set_aside]
    assert reasons[0] == "no marks, and no label of stød" and reasons[2] == "no text to align"
    assert "for 'kartoffel': CER" in reasons[1] and "at most 50% is allowed" in reasons[1]


def test_a_text_longer_than_the_clip_and_a_recogniser_without_times_are_refused(asr):
    with pytest.raises(ValueError, match="do not fit"):
        marks.align_text(asr, np.ones(SAMPLE_RATE // 10, np.float32), "a very long text for so little sound")

    whisper = SimpleNamespace(type="seq2seq_whisper", model=SimpleNamespace(config=SimpleNamespace(model_type="whisper")))
    with pytest.raises(ValueError, match="align_model has to be a CTC"):
        marks.align_text(whisper, np.ones(SAMPLE_RATE), "text")


def test_a_number_in_digits_is_aligned_as_it_is_said(asr):
    wav = speak_text("Hun kommer klokken ni.", "da", VOICES[0])
    windows = [marks.align_rhyme(asr, wav, text, "da") for text in ("Hun kommer klokken ni.", "Hun kommer klokken 9.")]
    assert windows[0][0] and windows[0] == windows[1]
