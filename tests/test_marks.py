"""Windows of stød come from marks or an alignment, and what can not be used is named."""

from types import SimpleNamespace

import numpy as np
import pytest
from parselmouth.praat import call

from csm_nb import judge, marks
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.synth import VOICES, speak_phonemes, speak_text


@pytest.fixture(scope="module")
def asr():
    return judge.load_asr("models/asr-mini", "cpu")


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
    assert len(marks.find_windows(rows, found)[0]) == 2
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


def test_letters_are_aligned_to_where_they_are_said(asr):
    text = "Manden køber en bil."
    wav, phonemes = speak_phonemes(text, "da", VOICES[0])
    letters = marks.align_text(asr, wav, text)
    assert "".join(letter for letter, *_ in letters).replace("|", " ") == "manden køber en bil"
    starts = {name: time for time, name in phonemes}
    said = next(start for letter, start, _, _ in letters if letter == "k")
    assert said == pytest.approx(starts["k"], abs=0.08)


def test_the_rhyme_of_the_last_word_is_found_between_silences(asr):
    wav, phonemes = speak_phonemes("En bil.", "da", VOICES[0])
    quiet = np.zeros(SAMPLE_RATE // 2, np.float32)
    window, reason = marks.align_rhyme(asr, np.concatenate([quiet, wav, quiet]), "En bil.")
    vowel = 0.5 + next(phonemes[i + 1][0] for i, (_, name) in enumerate(phonemes) if name == "b")
    assert reason == "" and window[0] == pytest.approx(vowel, abs=0.1) and window[1] <= 0.5 + len(wav) / SAMPLE_RATE


def test_rows_without_marks_or_with_a_text_that_is_not_heard_are_set_aside_with_the_reason(asr, tmp_path):
    path = write_audio(tmp_path / "other.wav", speak_text("Hun kommer hjem i aften.", "da"))
    rows = [{"audio_path": str(path), "text": "kartoffel", "speaker_id": "a"} | more
            for more in ({}, {"stod": 1}, {"stod": 1, "text": ""}, {"windows": [[0, 1, True]]})]
    found, set_aside = marks.find_windows(rows, None, asr)
    assert len(found) == 1 and [row["reason"].split()[0] for row in set_aside] == ["no", "the", "no"]


def test_a_text_longer_than_the_clip_and_a_recogniser_without_times_are_refused(asr):
    with pytest.raises(ValueError, match="do not fit"):
        marks.align_text(asr, np.ones(SAMPLE_RATE // 10, np.float32), "a very long text for so little sound")

    whisper = SimpleNamespace(type="seq2seq_whisper", model=SimpleNamespace(config=SimpleNamespace(model_type="whisper")))
    with pytest.raises(ValueError, match="align_model has to be a CTC"):
        marks.align_text(whisper, np.ones(SAMPLE_RATE), "text")


