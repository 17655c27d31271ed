"""Every fault that is planted into a corpus is named with its kind, and every good clip stays."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, resample, write_audio
from csm_nb.clips.check import check_clips, count_kinds, list_remarks
from csm_nb.clips.faults import CLIPPED_BOUND, find_flaws, find_pace_fault, find_sound_fault
from csm_nb.csm.load import load_base
from csm_nb.languages import LANGUAGES
from csm_nb.manifest import CorpusError, read_manifest
from csm_nb.paths import ROOT
from csm_nb.synth.corpus import make_corpus
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.teaching import stage
from csm_nb.text.sentences import make_sentences

GOOD = 24


def find_loudest(wav):
    """The sample in the middle of the loudest 40 ms."""
    return int(np.argmax(np.convolve(wav**2, np.ones(960), "same")))


def clip_half(wav):
    return np.clip(100 * wav, -1, 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Danish clips by four voices, and beside them (row, kind) of clips with a fault each."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_sentences("da", GOOD, 3)
    good = read_manifest(make_corpus(texts, "da", folder / "good"))
    wav = speak_text(texts[0], "da")
    planted = {
        "silent": (wav * 0.001, texts[0]), "too short": (wav[:4800], texts[0]), "too long": (np.tile(wav, 40), texts[0]),
        "clipped": (clip_half(wav), texts[0]), "cut short": (wav[find_loudest(wav) :], texts[0]),
        "cut short.end": (wav[: find_loudest(wav)], texts[0][:12]), "no text": (wav[1:], "..."),
        "foreign letters": (wav[2:], "Собака спит."), "pace": (wav[3:], " ".join(texts)),
        "pace.slow": (np.pad(wav, 96000), "Ja."),
        "other language": (speak_text("I do not know what that is.", "en"), "I do not know what that is."),
    }
    bad = []
    for name, (samples, text) in planted.items():
        path = write_audio(folder / f"bad/{name}.wav", samples)
        bad.append(({"text": text, "audio_path": str(path), "speaker_id": "9", "language": "da"}, name.split(".")[0]))
    (folder / "bad/broken.wav").write_bytes(b"no audio")
    bad.append((good[0] | {"audio_path": str(folder / "bad/broken.wav")}, "unreadable"))
    samples, rate = soundfile.read(good[0]["audio_path"])
    soundfile.write(folder / "bad/again.flac", samples, rate)  # another file, the same samples
    again = {"audio_path": str(folder / "bad/again.flac"), "speaker_id": "9", "text": "Noget andet."}
    bad.append((good[0] | again, "same audio"))
    return good, bad


def test_every_planted_fault_is_named_with_its_kind_and_every_good_clip_stays(corpus):
    good, bad = corpus
    rows = [*good[:8], *(row for row, _ in bad[:6]), *good[8:], *(row for row, _ in bad[6:])]
    kept, set_aside = check_clips(rows)
    assert [row["audio_path"] for row in kept] == [row["audio_path"] for row in good]
    assert not any("remarks" in row for row in kept)
    assert [row["kind"] for row in set_aside] == [kind for _, kind in bad] and len({kind for _, kind in bad}) == 11
    for row in set_aside:
        assert any(map(str.isdigit, row["reason"])) or row["kind"] in ("unreadable", "no text", "same audio"), row["reason"]
    reasons = {row["kind"]: row["reason"] for row in set_aside}
    assert f"the same audio as good/00000.wav, whose text is {good[0]['text']!r}" == reasons["same audio"]
    assert "'en' rather than 'da'" in reasons["other language"] and "of the 10 letters" in reasons["foreign letters"]
    counts = count_kinds(kept, set_aside)
    assert counts.clips.sum() == len(bad) and counts.set_index("kind").clips["pace"] == 2 and not counts.used.any()
    assert set(list_remarks(kept, set_aside).kind) == {kind for _, kind in bad}


def test_each_clip_is_read_once(corpus, monkeypatch):
    reads, read = [], soundfile.read
    monkeypatch.setattr(soundfile, "read", lambda path, *args, **more: reads.append(path) or read(path, *args, **more))
    check_clips(corpus[0])
    assert len(reads) == len(corpus[0])


def test_where_nothing_is_learned_faults_of_the_sound_are_remarks(corpus):
    kept, set_aside = check_clips([row for row, _ in corpus[1]], need_text=False)
    assert {row["kind"] for row in set_aside} == {"silent", "too short", "too long", "unreadable"}
    assert {kind for row in kept for kind in row.get("remarks", ())} == {"clipped", "cut short"}


def test_a_text_that_a_speaker_repeats_is_remarked_on_and_left_out_if_so_asked(corpus, tmp_path):
    first, second = corpus[0][:2]
    rows = [first, second | {"text": first["text"].upper(), "speaker_id": first["speaker_id"]}, second]
    rows[2] = rows[2] | {"text": first["text"], "audio_path": corpus[0][2]["audio_path"]}
    kept, set_aside = check_clips(rows)
    assert set_aside == [] and [list(row.get("remarks", {})) for row in kept] == [[], ["same text"], []]
    kept, set_aside = check_clips(rows, keep_repeats=False)
    assert len(kept) == 2 and [row["kind"] for row in set_aside] == ["same text"] and "good/00000.wav" in set_aside[0]["reason"]


def test_a_clip_that_is_set_aside_makes_no_other_a_repeat(corpus, tmp_path):
    first = corpus[0][0]
    rows = [first | {"text": "Собака спит."}, first, first | {"text": "Собака"}]
    kept, set_aside = check_clips(rows, keep_repeats=False)
    assert kept[0]["text"] == first["text"] and [row["kind"] for row in set_aside] == ["foreign letters"] * 2


@pytest.mark.parametrize("rate", [8000, 16000])
def test_what_was_brought_up_from_a_lower_rate_is_said_and_its_own_rate_too(rate):
    wav = speak_text("Stjernerne skinner over søen.", "da")
    wav = resample(wav, SAMPLE_RATE, rate)
    narrow = np.fft.irfft(np.fft.rfft(wav), len(wav) * SAMPLE_RATE // rate).astype(np.float32) * SAMPLE_RATE / rate
    assert f"above {rate // 2000} kHz, in a file of 44100 Hz" in find_flaws(narrow, 44100, 1)["band-limited"]
    assert find_flaws(narrow, rate, 1)["band-limited"] == f"{rate} Hz: nothing above {rate // 2000} kHz"


def test_a_tone_a_pause_and_noise_are_not_taken_for_speech_that_was_cut():
    rng, seconds = np.random.default_rng(0), np.arange(SAMPLE_RATE) / SAMPLE_RATE
    speech = speak_text("Det regner i dag.", "da")
    for wav in (0.1 * np.sin(2 * np.pi * 200 * seconds), rng.normal(0, 0.1, SAMPLE_RATE), np.pad(speech, 1000),
                speech + rng.normal(0, 0.005, len(speech)), speech[1200:-1200], np.zeros(100)):
        assert find_sound_fault(wav.astype(np.float32)) is None


def test_clipping_is_a_remark_before_it_is_a_fault():
    wav = speak_text("Det regner i dag.", "da")
    shares = [np.mean(np.abs(wav * gain) >= 1) for gain in (2, 5, 10, 20)]
    for gain, share in zip((2, 5, 10, 20), shares, strict=True):
        loud = np.clip(gain * wav, -1, 1)
        assert bool(find_sound_fault(loud)) == (share > CLIPPED_BOUND)
        assert ("clipped" in find_flaws(loud, 24000, 1)) == (share > 0.005)
    assert shares[0] < 0.005 < shares[2] and shares[-1] > CLIPPED_BOUND


@pytest.mark.parametrize(("text", "seconds", "fault"), [
    ("1 000 000", 1.2, False), ("NRK", 0.5, False), ("Ja.", 2.5, False), ("Nei!", 0.3, False), ("Ja.", 8, True),
    ("Jeg vet ikke hva det er, sa han.", 0.7, True), ("Jeg vet ikke hva det er, sa han.", 1.2, False),
])  # fmt: skip
def test_pace_is_counted_by_what_is_read_out(text, seconds, fault):
    assert bool(find_pace_fault({"text": text, "language": "no"}, seconds)) == fault


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_that_the_workbook_speaks_itself_is_set_aside(language, tmp_path):
    rows = read_manifest(make_corpus(make_sentences(language, 20, 7), language, tmp_path, VOICES))
    kept, set_aside = check_clips(rows)
    assert set_aside == [] and len(kept) == 20 and not any("remarks" in row for row in kept)


def test_a_row_in_a_language_that_is_not_of_the_table_is_checked_by_its_sound_alone(corpus):
    assert len(check_clips([corpus[0][0] | {"language": "xx"}])[0]) == 1


def test_a_corpus_of_faults_alone_says_the_first(corpus):
    with pytest.raises(CorpusError, match="none of 1 clips can be used: foreign letters.wav: 10 of the 10 letters"):
        check_clips([row for row, kind in corpus[1] if kind == "foreign letters"])


def test_a_stage_shows_how_many_are_left_out_for_what_and_plays_three_of_them(corpus, monkeypatch):
    shown = []
    monkeypatch.setattr(stage, "display", shown.append)
    good, bad = corpus
    clips = stage.check_clips([*good, *(row for row, _ in bad)], load_base("models/csm-mini", "cpu")[1])
    assert (len(clips.good), len(clips.set_aside)) == (GOOD, len(bad))
    tables = [table for table in shown if "kind" in getattr(table, "columns", ())]
    assert [len(table) for table in tables] == [11, len(bad)]
    assert [page.data.count("<audio") for page in shown if hasattr(page, "data")] == [3, 3]


def test_a_stage_cleans_clips_as_its_parameters_say_and_its_card_says_it(corpus, monkeypatch, tmp_path, capsys):
    shown = []
    monkeypatch.setattr(stage, "display", shown.append)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    rows = [corpus[0][0] | {"text": "Den koster 5 kr."}, *corpus[0][1:]]
    settings = {"read_out": True, "margin": 0.05, "loudness": -23.0, "keep_repeats": False, "max_cer": 0.0}
    run = SimpleNamespace(params=settings, language="da", data=tmp_path / "data", asr_model="models/asr-mini", device="cpu")
    clips = stage.check_clips(rows, load_base(ROOT / "models/csm-mini", "cpu")[1], run)
    assert (clips.good[0]["text"], clips.good[0]["written"]) == ("Den koster fem kroner.", "Den koster 5 kr.")
    assert clips.card["processing"] == "margin 0.05 s, loudness -23 LUFS, read_out" and clips.card["set aside"] == "none"
    assert "gain: " in capsys.readouterr().out
    card = shown[0]["the corpus"]
    assert card["loudness, LUFS"].startswith("-23.0") and card["voices"] == 4 and card["letters beyond the alphabet"] == "none"
    assert [bar.get_height() for bar in shown[1].axes[0].patches] == sorted(
        (bar.get_height() for bar in shown[1].axes[0].patches), reverse=True)


def test_of_330_clips_every_planted_fault_is_named_and_no_good_clip_is(tmp_path):
    place = importlib.util.spec_from_file_location("faults", ROOT / "bench" / "faults.py")
    bench = importlib.util.module_from_spec(place)
    place.loader.exec_module(bench)
    planted = bench.plant_faults(tmp_path, 330, 0.1)
    assert sum(kind == "" for _, kind in planted) == 297 and {kind for _, kind in planted} == {"", *bench.FAULTS}
    counts = bench.count_found(planted)
    assert (counts.right == counts.clips).all() and len(counts) == 12
