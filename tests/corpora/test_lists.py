"""Several corpora are taken by a list with hours each, and rows by what a table says of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.clips.check import check_clips
from csm_nb.corpora.listed import describe_licence, find_failed, split_corpora, take_corpus
from csm_nb.corpora.sources import describe_data, load_corpus
from csm_nb.csm.speakers import number_speakers
from csm_nb.manifest import CorpusError, write_manifest
from csm_nb.recipe import ParameterError
from csm_nb.runs import folders, params

ENTRY = {"home": "here", "licence": "CC0", "use": ["train"]}
SECOND = 1 / 3600  # h


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two corpora of a speaker "a": 12 clips of 1 s in nst, 6 of 2 s in lent; two listed ones that are not for training."""
    listed = {"nst": ENTRY, "lent": ENTRY | {"licence": "CC BY-NC 4.0"}, "heard": ENTRY | {"use": ["evaluate"]},
              "coral": ENTRY | {"forbids": "synthesis", "use": ["evaluate"]}}  # fmt: skip
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/da.yaml").write_text(yaml.safe_dump({"language": "da", "corpora": listed}))
    for name, count, seconds in (("nst", 12, 1), ("lent", 6, 2)):
        folder = tmp_path / "data/corpora" / name
        for number in range(count):
            wav = 0.1 * np.sin(np.arange(seconds * SAMPLE_RATE) * (0.05 + number / 100)).astype(np.float32)
            write_audio(folder / f"a/{number}.wav", wav)
            (folder / f"a/{number}.txt").write_text(f"{name} {number}")
    return tmp_path


def take(corpus):
    return take_corpus("corpus", corpus, "da")


def test_a_list_is_names_or_paths_with_hours_or_without_and_a_path_that_is_there_is_none(project):
    assert split_corpora("nst:20, my/b:5.5,c") == [("nst", 20.0), ("my/b", 5.5), ("c", None)]
    assert split_corpora("nst:20,") == [("nst", 20.0)] and split_corpora(" ") == [(" ", None)]
    assert split_corpora("data/corpora/nst") == [("data/corpora/nst", None)]
    (project / "a, b:2").mkdir()
    assert split_corpora("a, b:2") == [("a, b:2", None)]
    assert take("nst:20,lent") == "data/corpora/nst:20, data/corpora/lent" == take(take("nst:20,lent"))
    assert take("nst") == "data/corpora/nst" and take("my/manifest.jsonl") == "my/manifest.jsonl"


@pytest.mark.parametrize(("corpus", "message"), [
    ("nst:1, coral:1", "forbids speech synthesis"), ("nst, heard", "is listed for evaluate"),
    ("nst, data/corpora/nst/", "'nst' is named twice"),
    ("nst, data/corpora/nst:3", "'nst' is named twice; allowed are"), ("nst:0", "'nst' has 0 h"),
    ("nst, my/clips.jsonl", "'my/clips.jsonl' of it is neither a folder or manifest that is there nor one of coral, heard, "),
])  # fmt: skip
def test_a_list_is_refused_for_any_of_its_corpora(project, corpus, message):
    with pytest.raises(ParameterError, match=message):
        params.check_params("03_adapter", {"language": "da", "corpus": corpus})


def test_of_each_as_many_seconds_are_drawn_as_are_asked_for_in_an_order_by_the_seed(project, capsys):
    corpus = take(f"nst:{4.9 * SECOND}, lent:{3.9 * SECOND}")
    rows = load_corpus(corpus, "da", seed=1)
    assert [row["of_corpus"] for row in rows] == ["data/corpora/nst"] * 5 + ["data/corpora/lent"] * 2
    assert load_corpus(corpus, "da", seed=1) == rows
    draws = {tuple(row["text"] for row in load_corpus(corpus, "da", seed=seed)) for seed in range(4)}
    assert len(draws) == 4 and ("nst 0", "nst 1", "nst 2", "nst 3", "nst 4", "lent 0", "lent 1") not in draws
    assert describe_data(corpus, rows) == "corpora/nst (0.00 h), corpora/lent (0.00 h)"
    assert "are asked for" not in capsys.readouterr().out and len(check_clips(rows)[0]) == 7


def test_hours_that_are_not_there_are_said_and_without_hours_all_is_taken(project, capsys):
    corpus = take("nst:1, lent")
    rows = load_corpus(corpus, "da")
    assert len(rows) == 18
    describe_data(corpus, rows)
    assert "data/corpora/nst: 0.00 h of the 1 h that are asked for" in capsys.readouterr().out


@pytest.mark.parametrize(("corpus", "counts"), [("nst:1, lent:2", (3, 6)), ("nst, lent", (4, 5)), ("nst:2, lent:1", (6, 3))])
def test_the_number_of_clips_is_of_all_together_parted_by_hours(project, corpus, counts):
    rows = load_corpus(take(corpus), "da", 9)
    assert tuple(sum(name in row["of_corpus"] for row in rows) for name in ("nst", "lent")) == counts


def test_one_speaker_id_in_two_corpora_is_two_voices_and_keeps_its_number_when_it_comes_alone(project, tmp_path):
    corpus = take("nst, lent")
    rows, voices = number_speakers(load_corpus(corpus, "da"), corpus)
    assert len({row["speaker_id"] for row in rows}) == 2
    assert sorted(voice["corpus"] for voice in voices) == ["corpora/lent", "corpora/nst"]
    (tmp_path / "base.json").write_text('{"speakers": ' + str(voices).replace("'", '"').replace("False", "false") + "}")
    alone, _ = number_speakers(load_corpus("data/corpora/nst", "da"), "data/corpora/nst", tmp_path)
    assert alone[0]["speaker_id"] == next(row["speaker_id"] for row in rows if "nst" in row["of_corpus"])


def test_the_card_says_the_licence_of_each_and_one_that_is_not_for_commercial_use_marks_all(project):
    assert describe_licence(["da"], take("nst, lent:3")) == {
        "licence": "of the data: CC0 (nst), CC BY-NC 4.0 (lent)", "commercial use": "none: the licence of the data forbids it"}
    (project / "my").mkdir()
    assert describe_licence(["da"], "data/corpora/nst:1, my") == {"licence": "of the data: CC0 (nst), not stated (my)"}


def test_hours_and_every_corpus_are_in_the_hash_of_a_run_and_a_single_corpus_keeps_its_own(project):
    def hash_inputs(corpus):
        return folders.find_inputs({"corpus": take(corpus), "language": "da", "compare": []})["corpus"]["hash"]

    assert len({hash_inputs(corpus) for corpus in ("nst", "nst:1", "nst:2", "nst, lent", "lent, nst")}) == 5
    before = hash_inputs("nst, lent")
    (project / "data/corpora/lent/a/0.txt").write_text("andet")
    assert hash_inputs("nst, lent") != before


@pytest.mark.parametrize(("condition", "cell", "passes"), [
    ("> 0.6", 0.7, True), ("> 0.6", 0.6, False), (">= 0.6", "0.6", True), ("> 0.6", None, False), ("< 2", "x", False),
    ("<= 2", float("nan"), False), ("!= foreign", "foreign", False), ("!= foreign", None, True), ("IS", "IS", True),
    ("IS", "ISX", False), ("IS", None, False), (3, "3.0", True), (3, 4, False), ("!= 3", 3.0, False), ("3", True, False),
])  # fmt: skip
def test_a_condition_compares_numbers_as_numbers_and_an_empty_cell_passes_only_what_it_differs_from(condition, cell, passes):
    assert find_failed({"x": cell}, {"x": condition}) == ("" if passes else f"x {condition}")


@pytest.mark.parametrize("condition", ["> x", ">", "", True, None, [1]])
def test_another_condition_is_refused(project, condition):
    list_filters(project, {"score": condition}, "nst")
    with pytest.raises(ParameterError, match="params/da.yaml: corpora: nst: the filter score is .*; allowed are a value, !="):
        take("nst")


def list_filters(project, filters, name="tale"):
    (project / "params/da.yaml").write_text(yaml.safe_dump({"corpora": {name: ENTRY | {"filters": filters}}}))


def test_filters_are_of_the_columns_of_parquet_and_what_each_leaves_out_is_shown(project, capsys):
    (project / "data/corpora/tale").mkdir()
    clip = (project / "data/corpora/nst/a/0.wav").read_bytes()
    table = {"text": list("abcdef"), "speaker_id": ["a"] * 6, "audio": [{"bytes": clip, "path": "x.wav"}] * 6,
             "score": [0.1, 0.9, 0.8, None, 0.7, 0.9], "region": ["n", "foreign", "n", "n", None, "s"]}  # fmt: skip
    pq.write_table(pa.table(table), project / "data/corpora/tale/train.parquet")
    list_filters(project, {"score": "> 0.6", "region": "!= foreign"})
    assert [row["text"] for row in load_corpus(take("tale"), "da")] == ["c", "e", "f"]
    said = capsys.readouterr().out
    assert "the filter score > 0.6 leaves out 2 of 6 rows" in said and "region != foreign leaves out 1 of 6 rows" in said
    list_filters(project, {"score": "> 1"})
    with pytest.raises(CorpusError, match="nothing of language 'da'; found: no clip at all; the filter score > 1 leaves out 6"):
        load_corpus(take("tale"), "da")
    list_filters(project, {"bleu": "> 0.6"})
    with pytest.raises(CorpusError, match=r"lacks a column of the filter bleu \(bleu\); found are text, speaker_id, audio"):
        load_corpus(take("tale"), "da")


def test_filters_are_of_the_columns_of_common_voice_and_no_folder_of_clips_has_any(project):
    folder = project / "data/corpora/tale"
    (folder / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence\tup_votes\tgender", "a\tx.mp3\ten\t3\tfemale", "a\ty.mp3\tto\t1", "a\tz.mp3\ttre\t2\t"]
    (folder / "validated.tsv").write_text("\n".join(lines))
    list_filters(project, {"up_votes": ">= 2"})
    assert [row["text"] for row in load_corpus("data/corpora/tale", "da")] == ["en", "tre"]
    list_filters(project, {"gender": "female"})
    assert [row["text"] for row in load_corpus("data/corpora/tale", "da")] == ["en"]
    (folder / "validated.tsv").unlink()
    with pytest.raises(CorpusError, match=r"its entry has filters \(gender\), and what it holds has no columns"):
        load_corpus("data/corpora/tale", "da")


def test_rows_of_a_manifest_in_a_list_keep_their_fields(project):
    rows = [{"text": "hej", "audio_path": str(project / "data/corpora/nst/a/0.wav"), "speaker_id": "b", "language": "da",
             "age": 3}]
    write_manifest(rows, project / "my/manifest.jsonl")
    drawn = load_corpus(take("my/manifest.jsonl:1, nst:1"), "da")
    assert drawn[0]["age"] == 3 and drawn[0]["of_corpus"] == "my/manifest.jsonl"
