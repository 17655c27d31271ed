"""The codec's verdict follows from intervals, numbers of clips and controls, and from nothing else."""

import numpy as np
import pandas as pd
import pytest

from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.codec.mimi import load_codec
from csm_nb.corpora.sources import load_corpus
from csm_nb.fidelity import traits
from csm_nb.fidelity.clips import code_clips, find_clips, list_unmeasured, measure_clips
from csm_nb.fidelity.verdict import (
    SUMMARY,
    Criterion,
    Evidence,
    check_controls,
    describe_verdict,
    judge_codec,
    list_metrics,
    summarise,
    tabulate,
)
from csm_nb.judge import judges
from csm_nb.manifest import CorpusError, write_manifest
from csm_nb.prosody import f0, klatt
from csm_nb.prosody.f0 import ProsodyError
from csm_nb.synth.espeak import VOICES, speak_text
from csm_nb.text.sentences import make_sentences

GOOD = {"f0_correlation": 0.99, "f0_rmse_cents": 10.0, "gpe_percent": 0.5, "vde_percent": 2.0, "mel_distance_db": 3.0,
        "hnr_change_db": -1.0}  # fmt: skip
FLAT = GOOD | {"f0_correlation": 0.1, "f0_rmse_cents": 300.0}


def make_summary(clips: int = 12, spread: float = 0.0, **codec):
    """A summary of a codec that measures as `codec` says (else well), beside controls that behave."""
    conditions = {"8 codebooks": GOOD | codec, "identity": GOOD, "Vorbis": GOOD, "flat F0": FLAT}
    return pd.DataFrame([
        (name, measure, value, value - spread, value + spread, clips, clips)
        for name, values in conditions.items() for measure, value in values.items()
    ], columns=SUMMARY)  # fmt: skip


def judge(summary):
    return judge_codec([Evidence("clips", summary)], 8)[1]


def test_a_codec_goes_only_when_every_interval_meets_its_criterion():
    assert judge(make_summary()) == "go"
    assert judge(make_summary(f0_rmse_cents=80.0)) == "stop"
    assert judge(make_summary(f0_rmse_cents=35.0, spread=0.005)) == "unclear"


def test_too_few_clips_are_unclear_and_never_a_go():
    table, verdict = judge_codec([Evidence("clips", make_summary(clips=9))], 8)
    assert verdict == "unclear" and table.verdict.str.contains("9 of 10 clips").all()


def test_a_measure_that_nothing_could_be_measured_of_does_not_pass():
    assert judge(make_summary(f0_correlation=np.nan)) == "stop"


@pytest.mark.parametrize(("control", "values"), [("identity", FLAT), ("Vorbis", FLAT), ("flat F0", GOOD)])
@pytest.mark.parametrize("correlation", [0.99, 0.2])
def test_a_control_that_misbehaves_makes_the_verdict_unclear_whatever_the_codec_scored(control, values, correlation):
    summary = make_summary(f0_correlation=correlation)
    for measure, value in values.items():
        chosen = (summary.condition == control) & (summary.measure == measure)
        summary.loc[chosen, ["figure", "low", "high"]] = value
    assert judge(summary) == "unclear"
    controls = check_controls([Evidence("clips", summary)])
    assert controls[~controls.behaves].control.tolist() == [control]


WORDS = (Criterion("stød", "stod_retention", "stød retention", ">=", 0.7),)


def make_words(name, measured, figure=0.9, note=""):
    """Evidence of stød in `measured` clips, its control behaving."""
    rows = [(condition, "stod_retention", value, value, value, measured, 48) for condition, value in
            (("8 codebooks", figure), ("identity", 1.0))] * (measured > 0)  # fmt: skip
    return Evidence(name, pd.DataFrame(rows, columns=SUMMARY), WORDS, {"identity": "passes"}, note)


def test_a_trait_that_nothing_measures_keeps_the_codec_from_a_go():
    for measured in (0, 9):
        evidence = [Evidence("clips", make_summary()), make_words("words", measured)]
        table, verdict = judge_codec(evidence, 8)
        assert verdict == "unclear" and set(table[table.on == "clips"].verdict) == {"go"}
        assert table.verdict.iloc[-1] == ("unclear: 9 of 10 clips" if measured else "unclear: not measured")


@pytest.mark.parametrize("measured", [0, 3])
@pytest.mark.parametrize(("figure", "says"), [(0.9, "go"), (0.2, "stop")])
def test_clips_that_were_not_measured_decide_nothing_where_others_measure_the_same(measured, figure, says):
    recorded = make_words("recordings", measured, 0.1, note="40 clips, none labelled")
    evidence = [Evidence("clips", make_summary()), make_words("words", 48, figure), recorded]
    table, verdict = judge_codec(evidence, 8)
    assert verdict == says
    reason = "3 of 10 clips" if measured else "not measured"
    assert table.verdict.iloc[-1] == f"not counted: {reason} (40 clips, none labelled)"
    said = describe_verdict(table, verdict, "da", 8, "12 of 40 clips")
    assert f"Not counted: stød (recordings): {reason} (40 clips, none labelled). On 12 of 40 clips." in said
    metrics = list_metrics(table, pd.DataFrame({"audio_path": ["a"]}), pd.DataFrame(), [], 8)
    assert metrics["stod_retention"] == figure
    assert "misbehaves" not in " ".join(table.verdict) and check_controls(evidence).behaves.all()


def test_what_the_codec_made_unmeasurable_counts_against_it():
    lost = make_words("recordings", 12)
    lost.summary.loc[lost.summary.condition == "8 codebooks", "measured"] = 2
    table, verdict = judge_codec([Evidence("clips", make_summary()), make_words("words", 48), lost], 8)
    assert verdict == "unclear" and table.verdict.iloc[-1] == "unclear: 2 of 10 clips"


def test_a_control_that_misbehaves_speaks_against_its_own_clips_only():
    broken = make_summary()
    broken.loc[broken.condition == "flat F0", ["figure", "low", "high"]] = np.nan
    evidence = [Evidence("clips", make_summary(f0_rmse_cents=80.0)), Evidence("words", broken)]
    evidence[1].summary.loc[lambda s: (s.condition == "identity") & (s.measure == "gpe_percent"), "figure"] = 50
    table, verdict = judge_codec(evidence, 8)
    assert verdict == "stop" and table[table.on == "words"].verdict.str.contains("identity misbehaves").all()


def test_a_control_that_has_to_lower_a_measure_needs_an_interval_below_that_of_vorbis():
    criteria = (Criterion("stød", "stod_retention", "stød retention", ">=", 0.7),)
    for high, behaves in ((0.85, True), (0.95, False)):
        rows = [("Vorbis", "stod_retention", 0.95, 0.9, 1.0, 12, 12),
                ("smooth", "stod_retention", 0.5, 0.4, high, 12, 12)]
        summary = pd.DataFrame(rows, columns=SUMMARY)
        evidence = Evidence("words", summary, criteria, {"smooth": "lowers"})
        assert check_controls([evidence]).behaves.tolist() == [behaves]


def test_medians_and_intervals_are_over_clips_and_leave_out_what_was_not_measured():
    values = [1.0, 2.0, 3.0, 4.0, np.nan]
    measures = pd.DataFrame([{"condition": "identity"} | dict.fromkeys(f0.MEASURES, value) for value in values])
    row = summarise(measures).iloc[0]
    assert (row.figure, row.measured, row.found) == (2.5, 4, 5) and row.low < 2.5 < row.high


def test_a_mean_is_taken_where_it_is_asked_for_and_a_share_has_wilson_s_interval():
    measures = pd.DataFrame({"condition": "8 codebooks", "cer_percent": [0.0, 0.0, 90.0], "right_language": [1.0, 1.0, 1.0]})
    cer, right = summarise(measures, ["cer_percent", "right_language"], "mean").itertuples()
    assert cer.figure == 30.0
    assert (right.figure, right.low, right.high) == (1.0, pytest.approx(0.4385, abs=1e-4), 1.0)


def test_a_figure_over_fewer_clips_than_its_row_says_so():
    measures = pd.DataFrame({"condition": "8 codebooks", "stoi": [1.0, 1.0, 1.0], "pesq": [3.0, 3.0, np.nan]})
    row = tabulate(summarise(measures, ["stoi", "pesq"])).loc["8 codebooks"]
    assert (row["STOI"], row["PESQ-WB"], row["measured"]) == ("1.00 (1.00 to 1.00)", "3.0 (3.0 to 3.0), 2 measured", 3)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Two spoken clips through the miniature codec, with controls."""
    rows, _, _ = find_clips("", "no", 2, 0, tmp_path_factory.mktemp("clips"))
    return code_clips(rows, load_codec("models/csm-mini"), [1, 8])


def test_controls_behave_on_speech(coded):
    controls = check_controls([Evidence("clips", summarise(measure_clips(coded)))])
    assert controls.behaves.all(), controls


def test_every_version_is_as_long_as_the_clip_and_more_codebooks_are_nearer(coded):
    assert {len(wav) for clip in coded for wav in clip.versions.values()} <= {len(clip.original) for clip in coded}
    measures = measure_clips(coded).set_index("condition").mel_distance_db
    assert measures["identity"].max() == 0
    assert measures["8 codebooks"].mean() < measures["1 codebook"].mean()


def test_an_unknown_f0_tracker_is_refused_with_those_there_are(coded):
    with pytest.raises(ProsodyError, match="'yin'; allowed are praat, pyin"):
        measure_clips(coded, "yin")


def test_bad_clips_are_set_aside_with_reasons_and_the_others_are_measured(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    write_audio(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE))
    write_audio(tmp_path / "blip.wav", np.ones(240))
    write_audio(tmp_path / "hiss.wav", np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE))
    write_audio(tmp_path / "voice.wav", speak_text("Det regner i dag.", "no"))
    rows, set_aside, source = find_clips(str(tmp_path), "no", 5, 0, tmp_path)
    assert {row["audio_path"].rsplit("/")[-1]: row["reason"].split()[0] for row in set_aside} == {
        "broken.wav": "not", "silent.wav": "silent", "blip.wav": "0.01"
    }
    assert "synthetic" not in source
    measures = measure_clips(code_clips(rows, load_codec("models/csm-mini"), [8]))
    unmeasured = list_unmeasured(measures)
    assert any("hiss" in row.clip and "hardly voiced" in row.reason for row in unmeasured.itertuples())


def test_synthetic_speech_is_called_synthetic(tmp_path):
    assert "synthetic" in find_clips("", "da", 2, 0, tmp_path)[2]


def test_a_manifest_without_the_language_says_what_it_has(tmp_path):
    path = write_audio(tmp_path / "a.wav", speak_text("Hej.", "sv"))
    manifest = write_manifest([{"text": "Hej.", "audio_path": path.name, "speaker_id": "a", "language": "sv"}],
                              tmp_path / "manifest.jsonl")  # fmt: skip
    with pytest.raises(CorpusError, match="'da'; found: sv"):
        find_clips(str(manifest), "da", 2, 0, tmp_path)


@pytest.fixture
def perfect(monkeypatch):
    """Let the codec be one that gives back what it gets, and KlattGrid's words be fewer."""
    monkeypatch.setattr("csm_nb.fidelity.clips.encode", lambda codec, wavs, codebooks: [wav[:, None] for wav in wavs])
    monkeypatch.setattr("csm_nb.fidelity.clips.decode", lambda codec, codes: [code[:, 0] for code in codes])
    monkeypatch.setattr(klatt, "CUES", klatt.CUES[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Danish clips with texts beside them, as people have them: nothing else is known of them."""
    folder = tmp_path_factory.mktemp("mine")
    for number, text in enumerate(make_sentences("da", 10, 1)):
        write_audio(folder / f"{number}.wav", speak_text(text, "da", VOICES[number % 4]))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_perfect_codec_goes_on_recordings_of_which_nothing_is_known_but_the_texts(folder, perfect, tmp_path):
    rows, _, source = find_clips(str(folder), "da", 12, 0, tmp_path)
    found, _, notes = traits.find_trait_clips("da", str(folder), "", None, 0, tmp_path)
    evidence, _ = traits.weigh_traits(traits.code_traits(found, None, [8]), notes)
    summary = summarise(measure_clips(code_clips(rows, None, [8])))
    evidence = [Evidence("clips", summary), *evidence]
    assert check_controls(evidence).behaves.all()
    table, verdict = judge_codec(evidence, 8)
    assert verdict == "go", table
    assert table.measured.tolist() == [10, 10, 10, 10, 24, 12, 0, 0]
    said = describe_verdict(table, verdict, "da", 8, source)
    assert "Not counted: stød (recorded words with stød): not measured (10 clips, none labelled)." in said
    assert f"On 10 clips of Danish in {folder}." in said


def test_a_file_that_a_manifest_names_twice_is_one_clip(folder, tmp_path):
    manifest = write_manifest(load_corpus(folder, "da") * 2, tmp_path / "manifest.jsonl")
    rows, _, source = find_clips(str(manifest), "da", 12, 0, tmp_path)
    assert len({row["audio_path"] for row in rows}) == len(rows) == 10 and source.startswith("10 clips of Danish")


def test_labels_whose_words_the_recogniser_does_not_hear_are_no_evidence(folder, perfect, tmp_path):
    rows = [row | {"text": "noget helt andet", "stod": 1} for row in load_corpus(folder, "da")]
    manifest = write_manifest(rows, tmp_path / "manifest.jsonl")
    asr = judges.load_asr("models/asr-mini", "cpu")
    found, set_aside, notes = traits.find_trait_clips("da", str(manifest), "", asr, 0, tmp_path)
    assert found[traits.STOD_RECORDINGS] == [] and len(set_aside) == 10
    assert notes == {traits.STOD_RECORDINGS: "10 clips, 10 labelled, the place found in none"}
    assert all("at most 50% is allowed" in row["reason"] for row in set_aside)


def test_a_language_without_traits_has_no_evidence_to_want_and_says_so(perfect, tmp_path):
    found, _, notes = traits.find_trait_clips("de", "", "", None, 0, tmp_path)
    evidence, table = traits.weigh_traits(traits.code_traits(found, None, [8]), notes)
    assert "German has neither stød nor tonal accent" in traits.describe_traits("de", found, notes)
    assert traits.tabulate_evidence(evidence).empty and traits.list_unmeasured(table, []).empty
    assert judge(make_summary()) == "go" and not evidence
