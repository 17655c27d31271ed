"""Stød is followed through a codec by what each window itself has of it, and by nothing that it has not."""

import numpy as np
import pandas as pd
import pytest

from csm_nb.audio import SAMPLE_RATE, read_audio
from csm_nb.codec.mimi import load_codec
from csm_nb.fidelity import traits, verdict
from csm_nb.fidelity.clips import CodedClip, code_clips, pass_vorbis
from csm_nb.manifest import read_manifest
from csm_nb.prosody import klatt, stod
from csm_nb.prosody.f0 import track_f0


def make_clip(row, wav, **versions):
    return CodedClip(row, wav, versions, (70.0, 350.0), 120.0)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Stød words by KlattGrid: [(row, wav, the same word without stød), ...]."""
    rows = read_manifest(klatt.make_stod_corpus(tmp_path_factory.mktemp("stod")))
    wavs = [read_audio(row["audio_path"]) for row in rows]
    plain = {(row["speaker_id"], row["rate"]): wav for row, wav in zip(rows, wavs, strict=True) if not row["stod"]}
    return [(row, wav, plain[row["speaker_id"], row["rate"]]) for row, wav in zip(rows, wavs, strict=True)]


@pytest.fixture(scope="module")
def retention(words):
    """Retention where stød was taken out by construction, left alone, coded by Vorbis, and smoothed away."""
    clips = [make_clip(row, wav, removed=plain, untouched=wav, Vorbis=pass_vorbis(wav),
                       smooth=stod.smooth_voicing(wav, pitch_range=(70.0, 350.0))) for row, wav, plain in words]
    return stod.measure_retention(stod.measure_windows(clips))


def test_stod_that_was_removed_by_construction_is_below_a_third_and_untouched_stod_above_nine_tenths(retention):
    kept = retention[retention.stod].groupby("condition").stod_retention
    assert kept.count().min() == 48
    assert kept.max()["removed"] < 0.3
    assert kept.min()["untouched"] > 0.9 and kept.median()["Vorbis"] > 0.9


def test_smoothed_voicing_keeps_less_stod_than_vorbis_does_and_intervals_do_not_meet(retention):
    summary = verdict.summarise(retention, stod.MEASURES).set_index(["condition", "measure"])
    assert summary.high["smooth", "stod_retention"] < summary.low["Vorbis", "stod_retention"]


def test_each_cue_alone_is_found_for_what_it_is(words, retention):
    cues = retention[retention.condition == "untouched"].set_index("audio_path").cues
    for row, _, _ in words:
        if row["cues"] == ["F0 dip"]:
            assert "F0 drop" in cues[row["audio_path"]]
        if row["cues"] == ["intensity dip"]:
            assert "low-band dip" in cues[row["audio_path"]] and "F0 drop" not in cues[row["audio_path"]]
        if row["cues"] == ["double pulsing"]:
            assert "HNR dip" in cues[row["audio_path"]]


def test_a_codec_that_puts_stod_where_none_was_shows_as_a_rise(words):
    plain = [(row, wav) for row, wav, _ in words if not row["stod"]]
    stodded = {(row["speaker_id"], row["rate"]): wav for row, wav, _ in words if row["cues"] == list(klatt.CUES)}
    clips = [make_clip(row, wav, worse=stodded[row["speaker_id"], row["rate"]], same=wav) for row, wav in plain]
    rise = stod.measure_retention(stod.measure_windows(clips)).groupby("condition").stod_rise
    assert rise.min()["worse"] > 1 and rise.max()["same"] == 0


def test_without_windows_to_compare_with_nothing_is_said(words):
    clips = [make_clip(row, wav, same=wav) for row, wav, _ in words if row["stod"]][:6]
    table = stod.measure_retention(stod.measure_windows(clips))
    assert table.stod_retention.isna().all() and table.reason.str.contains("without stød to compare with: 0").all()


@pytest.mark.parametrize("wav", [np.zeros(SAMPLE_RATE), np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE), np.zeros(200)],
                         ids=["silence", "noise", "too short"])
def test_a_window_without_voice_is_named_and_stops_nothing(words, wav):
    clips = [make_clip(row, sound, same=sound) for row, sound, _ in words[:12]]
    clips.append(make_clip(words[0][0] | {"audio_path": "odd.wav", "windows": [[0.1, 0.4, True]]}, wav, same=wav))
    table = stod.measure_retention(stod.measure_windows(clips)).set_index("audio_path")
    assert "not voiced" in table.reason["odd.wav"]


def test_smoothing_makes_periods_even_and_keeps_length_and_level():
    wav, (start, end) = klatt.make_stod_word("m", 95.0, cues=("double pulsing",))
    smooth = stod.smooth_voicing(wav, pitch_range=(70.0, 200.0))
    assert len(smooth) == len(wav) and np.sqrt(np.mean(smooth**2)) == pytest.approx(np.sqrt(np.mean(wav**2)), rel=0.1)
    tracks = [track_f0(x, pitch_range=(40.0, 200.0)) for x in (wav, smooth)]
    inside = [(t.times > start + 0.45 * (end - start)) & (t.times < start + 0.75 * (end - start)) for t in tracks]
    assert np.nanmin(tracks[0].f0[inside[0]]) < 60 and np.nanmin(tracks[1].f0[inside[1]]) > 60


def test_accents_are_told_apart_by_their_contours_and_a_flat_one_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(klatt, "ACCENT_RATES", (0.75, 1.25))
    for language in klatt.CONTOURS:
        rows = read_manifest(klatt.make_accent_corpus(language, tmp_path / language))
        clips = code_clips(rows, load_codec("models/csm-mini"), [8])
        right = traits.tell_accents(clips).groupby("condition").accent_right.mean()
        assert right["identity"] == 1 and right["Vorbis"] == 1 and right["flat F0"] < 0.8


def test_there_are_enough_words_with_accent_for_a_perfect_codec_to_go():
    words = 2 * len(klatt.ACCENT_SPEAKERS) * len(klatt.ACCENT_RATES)
    right = pd.DataFrame({"condition": "8 codebooks", "accent_right": [1.0] * words})
    (row,) = verdict.summarise(right, ["accent_right"]).itertuples()
    assert row.measured == 80 and traits.ACCENT[0].holds(row.low)


def test_an_unknown_cue_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'hiccup'.*F0 dip"):
        klatt.make_stod_word("m", 95.0, cues=("hiccup",))
