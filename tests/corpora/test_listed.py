"""Corpora are taken by name, and held to what their licences allow."""

import numpy as np
import pytest
import yaml
from conftest import ROOT

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.corpora.listed import check_listed, describe_licence, find_listed, list_corpora, take_corpus
from csm_nb.corpora.sources import describe_data, load_corpus
from csm_nb.languages import LANGUAGES
from csm_nb.recipe import ParameterError
from csm_nb.runs import folders, params
from csm_nb.runs.folders import Run
from csm_nb.teaching import stage

ENTRY = {"id": "somebody/nst", "licence": "CC0", "use": ["train"]}
LISTED = {
    "nst": ENTRY | {"config": "dk", "hours": 411, "size": "5.6 GB", "columns": {"speaker": None}},
    "coral": ENTRY | {"id": "CoRal-project/coral-v9", "licence": "OpenRAIL", "forbids": "synthesis", "use": ["evaluate"]},
    "fleurs": {"home": "elsewhere", "licence": "not stated", "use": ["evaluate"], "note": "no speakers"},
    "lent": ENTRY | {"licence": "a licence of its own", "noncommercial": True},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/da.yaml").write_text(yaml.safe_dump({"language": "da", "corpora": LISTED}))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def make_clips(folder):
    write_audio(folder / "anna/a.wav", 0.1 * np.sin(np.arange(SAMPLE_RATE) * 0.05).astype(np.float32))
    (folder / "anna/a.txt").write_text("Hej.")
    return folder


@pytest.mark.parametrize("language", sorted(path.stem for path in (ROOT / "params").glob("*.yaml") if path.stem in LANGUAGES))
def test_every_language_lists_corpora_that_hold_to_the_fields(language):
    listed = list_corpora(language)
    assert any("train" in entry["use"] for entry in listed.values()) and {"common-voice", "fleurs"} <= listed.keys()
    values, _ = params.load_params([f"params/{language}.yaml", "params/mini.yaml"])
    assert "corpora" not in values


@pytest.mark.parametrize(("section", "message"), [
    ({"a": ENTRY | {"licens": "x"}}, "corpora: a: unknown field 'licens'; did you mean licence.*The fields are id, home"),
    ({"a": ENTRY | {"use": ["sing"]}}, r"use is \['sing'\]; allowed: a list of train, evaluate, anchor"),
    ({"a": ENTRY | {"forbids": "all"}}, "forbids is 'all'; allowed: synthesis"),
    ({"a": ENTRY | {"hours": True}}, "hours is True; allowed: a number"),
    ({"a": {"licence": "CC0"}}, "a lacks use, id or home"), ({"a": 3}, "a is 3; allowed are the fields"),
    ([1], r"corpora is \[1\]"),
])  # fmt: skip
def test_a_section_of_other_fields_is_refused_with_the_list(section, message):
    with pytest.raises(ParameterError, match=f"params/da.yaml: .*{message}" if section != [1] else message):
        check_listed("params/da.yaml", section)


def test_a_section_is_a_languages_own_and_no_profiles(project):
    (project / "params/my.yaml").write_text("corpora: {}\n")
    with pytest.raises(ParameterError, match="unknown parameter 'corpora'"):
        params.load_params(["params/my.yaml"])


def test_a_name_is_its_folder_or_says_what_to_fetch_how_large_it_is_and_where_to_put_it(project):
    with pytest.raises(ParameterError, match=r"no data/corpora/nst; fetch somebody/nst, config dk \(411 h, speakers not stated, "
                                             r"size 5.6 GB; licence: CC0\) into data/corpora/nst, as by: hf download"):
        take_corpus("corpus is 'nst'", "nst", "da")
    make_clips(project / "data/corpora/nst")
    assert take_corpus("", "nst", "da") == "data/corpora/nst"
    assert params.check_params("03_adapter", {"language": "da", "corpus": "nst"})["corpus"] == "data/corpora/nst"
    assert take_corpus("", "my/manifest.jsonl", "da") == "my/manifest.jsonl"


def test_a_link_to_another_disk_is_the_listed_corpus_too(project):
    make_clips(project / "disk/x")
    (project / "data/corpora").mkdir(parents=True)
    (project / "data/corpora/lent").symlink_to(project / "disk/x")
    assert find_listed("da", take_corpus("", "lent", "da")) == LISTED["lent"]


def test_of_several_languages_in_one_download_the_listed_one_is_read(project):
    make_clips(project / "data/corpora/nst/dk")
    make_clips(project / "data/corpora/nst/se")
    assert [row["audio_path"] for row in load_corpus("data/corpora/nst", "da")] == [
        str(project / "data/corpora/nst/dk/anna/a.wav")]


def test_how_a_listed_corpus_is_read_is_in_the_hash_of_its_runs(project):
    make_clips(project / "data/corpora/nst")
    inputs = [folders.find_inputs({"corpus": "data/corpora/nst", "language": "da", "compare": []})["corpus"]["hash"]]
    (project / "params/da.yaml").write_text(yaml.safe_dump({"corpora": {"nst": ENTRY}}))
    inputs.append(folders.find_inputs({"corpus": "data/corpora/nst", "language": "da", "compare": []})["corpus"]["hash"])
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize("corpus", ["coral", "data/corpora/coral", "elsewhere/coral-v9", "elsewhere/coral/manifest.jsonl"])
def test_a_licence_that_forbids_synthesis_is_refused_for_training_with_the_reason(project, corpus):
    make_clips(project / "data/corpora/coral")
    with pytest.raises(ParameterError, match=r"03_adapter.ipynb: corpus is .*coral \(CoRal-project/coral-v9; licence: OpenRAIL\) "
                                             "forbids speech synthesis"):
        params.check_params("03_adapter", {"language": "da", "corpus": corpus})
    if "elsewhere" not in corpus:  # to measure the codec by is another thing
        assert params.check_params("00_mimi_sanity", {"language": "da", "audio": corpus})["audio"] == "data/corpora/coral"


@pytest.mark.parametrize("corpus", ["CoRal-project/coral-v9", "my/coral/read_aloud", "mine:1, my/coral/read_aloud:2"])
def test_a_licence_that_forbids_synthesis_forbids_it_for_every_language_and_each_configuration(project, corpus):
    make_clips(project / "my/coral/read_aloud")
    make_clips(project / "mine")
    for language in ("da", "no"):
        with pytest.raises(ParameterError, match="forbids speech synthesis"):
            take_corpus("corpus is it", corpus, language)


def test_a_card_says_the_licences_that_the_rows_of_a_corpus_say(project):
    rows = [{"licence": licence} for licence in ("MIT", "GPL-2.0", "MIT", None)]
    assert describe_licence(["da"], "my/own", rows=rows) == {"licence": "of the data: GPL-2.0, MIT"}
    assert describe_licence(["da"], "my/own", "CC0", rows) == {"licence": "of the data: CC0"}
    make_clips(project / "my/own")
    for text, licence in (
            ("---\nlicense: cc-by-nc-4.0\n---\n# own", "cc-by-nc-4.0"), ("# own", "not stated"), ("---\n: [", "not stated")):
        (project / "my/own/README.md").write_text(text)
        assert describe_licence(["da"], "my/own")["licence"] == f"of the data: {licence}"
    mine = describe_licence(["da"], "my/own, his", rows=[{"of_corpus": "his", "licence": "CC BY-NC 4.0"}])
    assert mine["licence"] == "of the data: not stated (own), CC BY-NC 4.0 (his)" and "commercial use" in mine


def test_a_name_that_each_language_lists_for_itself_has_the_licences_of_all(project):
    lent = ENTRY | {"id": "his/nst", "licence": "CC BY-NC 4.0"}
    (project / "params/no.yaml").write_text(yaml.safe_dump({"language": "no", "corpora": {"nst": lent}}))
    both = {"licence": "of the data: CC0 (nst), CC BY-NC 4.0 (nst)", "commercial use": "none: the licence of the data forbids it"}
    assert describe_licence(["da", "no"], "nst") == both and describe_licence(["da"], "nst") == {"licence": "of the data: CC0"}
    rows = [{"of_corpus": of, "duration": 3600.0, "language": code} for of, code in (("somebody/nst", "da"), ("his/nst", "no"))]
    assert describe_data("nst:2", rows) == "nst (2.00 h)"


def test_what_is_listed_for_evaluation_is_not_trained_on(project):
    with pytest.raises(ParameterError, match="fleurs is listed for evaluate and not for training: no speakers"):
        take_corpus("corpus is 'fleurs'", "fleurs", "da")


def test_the_card_says_the_licence_of_the_data_and_marks_what_is_not_for_commercial_use(project):
    marked = {"commercial use": "none: the licence of the data forbids it"}
    assert describe_licence(["da"], "data/corpora/nst") == {"licence": "of the data: CC0"}
    assert describe_licence(["da"], "data/corpora/lent") == {"licence": "of the data: a licence of its own"} | marked
    assert describe_licence(["da"], "data/corpora/nst", "CC BY-NC 4.0") == {"licence": "of the data: CC BY-NC 4.0"} | marked
    assert describe_licence(["da"], "my/nst") == {"licence": "of the data: not stated"} and find_listed("da", "my/nst") == {}
    make_clips(project / "data/corpora/lent")
    given = {"corpus": "data/corpora/lent", "corpus_licence": "", "corpus_clips": 5, "seed": 0}
    run = Run("03_adapter", "da", project, given, {})
    assert stage.read_corpus(run)[1] == {"data": "data/corpora/lent", "licence": "of the data: a licence of its own"} | marked
