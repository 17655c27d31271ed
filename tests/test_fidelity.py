"""The codec's verdict follows from intervals, numbers of clips and controls, and from nothing else."""

import numpy as np
import pandas as pd
import pytest

from csm_nb import fidelity
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.codec import load_codec
from csm_nb.corpora import CorpusError, write_manifest
from csm_nb.prosody import ProsodyError
from csm_nb.synth import speak_text

GOOD = {"f0_correlation": 0.99, "f0_rmse_cents": 10.0, "gpe_percent": 0.5, "vde_percent": 2.0, "mel_distance_db": 3.0,
        "hnr_change_db": -1.0}  # fmt: skip
FLAT = GOOD | {"f0_correlation": 0.1, "f0_rmse_cents": 300.0}


def make_summary(clips: int = 12, spread: float = 0.0, **codec):
    """A summary of a codec that measures as `codec` says (else well), beside controls that behave."""
    conditions = {"8 codebooks": GOOD | codec, "identity": GOOD, "Vorbis": GOOD, "flat F0": FLAT}
    return pd.DataFrame([
        (name, measure, value, value - spread, value + spread, clips)
        for name, values in conditions.items() for measure, value in values.items()
    ], columns=["condition", "measure", "median", "low", "high", "clips"])  # fmt: skip


def judge(summary):
    return fidelity.judge_codec([fidelity.Evidence("clips", summary)], 8)[1]


def test_a_codec_goes_only_when_every_interval_meets_its_criterion():
    assert judge(make_summary()) == "go"
    assert judge(make_summary(f0_rmse_cents=80.0)) == "stop"
    assert judge(make_summary(f0_rmse_cents=35.0, spread=0.005)) == "unclear"


def test_too_few_clips_are_unclear_and_never_a_go():
    table, verdict = fidelity.judge_codec([fidelity.Evidence("clips", make_summary(clips=9))], 8)
    assert verdict == "unclear" and table.verdict.str.contains("9 of 10 clips").all()


def test_a_measure_that_nothing_could_be_measured_of_does_not_pass():
    assert judge(make_summary(f0_correlation=np.nan)) == "stop"


@pytest.mark.parametrize(("control", "values"), [("identity", FLAT), ("Vorbis", FLAT), ("flat F0", GOOD)])
@pytest.mark.parametrize("correlation", [0.99, 0.2])
def test_a_control_that_misbehaves_makes_the_verdict_unclear_whatever_the_codec_scored(control, values, correlation):
    summary = make_summary(f0_correlation=correlation)
    for measure, value in values.items():
        chosen = (summary.condition == control) & (summary.measure == measure)
        summary.loc[chosen, ["median", "low", "high"]] = value
    assert judge(summary) == "unclear"
    controls = fidelity.check_controls([fidelity.Evidence("clips", summary)])
    assert controls[~controls.behaves].control.tolist() == [control]


def test_a_trait_that_is_not_measured_keeps_the_codec_from_a_go():
    nothing = pd.DataFrame(columns=["condition", "measure", "median", "low", "high", "clips"])
    evidence = [fidelity.Evidence("clips", make_summary()), fidelity.Evidence("words", nothing)]
    table, verdict = fidelity.judge_codec(evidence, 8)
    assert verdict == "unclear" and set(table[table.on == "clips"].verdict) == {"go"}


def test_a_control_that_misbehaves_speaks_against_its_own_clips_only():
    broken = make_summary()
    broken.loc[broken.condition == "flat F0", ["median", "low", "high"]] = np.nan
    evidence = [fidelity.Evidence("clips", make_summary(f0_rmse_cents=80.0)), fidelity.Evidence("words", broken)]
    evidence[1].summary.loc[lambda s: (s.condition == "identity") & (s.measure == "gpe_percent"), "median"] = 50
    table, verdict = fidelity.judge_codec(evidence, 8)
    assert verdict == "stop" and table[table.on == "words"].verdict.str.contains("identity misbehaves").all()


def test_a_control_that_has_to_lower_a_measure_needs_an_interval_below_that_of_vorbis():
    criteria = (fidelity.Criterion("stød", "stod_retention", "stød retention", ">=", 0.7),)
    for high, behaves in ((0.85, True), (0.95, False)):
        rows = [("Vorbis", "stod_retention", 0.95, 0.9, 1.0, 12), ("smooth", "stod_retention", 0.5, 0.4, high, 12)]
        summary = pd.DataFrame(rows, columns=["condition", "measure", "median", "low", "high", "clips"])
        evidence = fidelity.Evidence("words", summary, criteria, {"smooth": "lowers"})
        assert fidelity.check_controls([evidence]).behaves.tolist() == [behaves]


def test_medians_and_intervals_are_over_clips_and_leave_out_what_was_not_measured():
    values = [1.0, 2.0, 3.0, 4.0, np.nan]
    measures = pd.DataFrame([{"condition": "identity"} | dict.fromkeys(fidelity.MEASURES, value) for value in values])
    row = fidelity.summarise(measures).iloc[0]
    assert (row["median"], row["clips"]) == (2.5, 4) and row.low < 2.5 < row.high


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Two spoken clips through the miniature codec, with controls."""
    rows, _, _ = fidelity.find_clips("", "no", 2, 0, tmp_path_factory.mktemp("clips"))
    return fidelity.code_clips(rows, load_codec("models/csm-mini"), [1, 8])


def test_controls_behave_on_speech(coded):
    controls = fidelity.check_controls([fidelity.Evidence("clips", fidelity.summarise(fidelity.measure_clips(coded)))])
    assert controls.behaves.all(), controls


def test_every_version_is_as_long_as_the_clip_and_more_codebooks_are_nearer(coded):
    assert {len(wav) for clip in coded for wav in clip.versions.values()} <= {len(clip.original) for clip in coded}
    measures = fidelity.measure_clips(coded).set_index("condition").mel_distance_db
    assert measures["identity"].max() == 0
    assert measures["8 codebooks"].mean() < measures["1 codebook"].mean()


def test_an_unknown_f0_tracker_is_refused_with_those_there_are(coded):
    with pytest.raises(ProsodyError, match="'yin'; allowed are praat, pyin"):
        fidelity.measure_clips(coded, "yin")


def test_bad_clips_are_set_aside_with_reasons_and_the_others_are_measured(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    write_audio(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE))
    write_audio(tmp_path / "blip.wav", np.ones(240))
    write_audio(tmp_path / "hiss.wav", np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE))
    write_audio(tmp_path / "voice.wav", speak_text("Det regner i dag.", "no"))
    rows, set_aside, source = fidelity.find_clips(str(tmp_path), "no", 5, 0, tmp_path)
    assert {row["audio_path"].rsplit("/")[-1]: row["reason"].split()[0] for row in set_aside} == {
        "broken.wav": "not", "silent.wav": "silent", "blip.wav": "0.01"
    }
    assert "synthetic" not in source
    measures = fidelity.measure_clips(fidelity.code_clips(rows, load_codec("models/csm-mini"), [8]))
    unmeasured = fidelity.list_unmeasured(measures)
    assert any("hiss" in row.clip and "hardly voiced" in row.reason for row in unmeasured.itertuples())


def test_synthetic_speech_is_called_synthetic(tmp_path):
    assert "synthetic" in fidelity.find_clips("", "da", 2, 0, tmp_path)[2]


def test_a_manifest_without_the_language_says_what_it_has(tmp_path):
    path = write_audio(tmp_path / "a.wav", speak_text("Hej.", "sv"))
    manifest = write_manifest([{"text": "Hej.", "audio_path": path.name, "speaker_id": "a", "language": "sv"}],
                              tmp_path / "manifest.jsonl")  # fmt: skip
    with pytest.raises(CorpusError, match="'da'; found: sv"):
        fidelity.find_clips(str(manifest), "da", 2, 0, tmp_path)
