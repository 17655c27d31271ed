"""Data sets of codes alone are written and read back, and taken only by the codec that they are of."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csm_nb import paths
from csm_nb.audio import SAMPLE_RATE, write_audio
from csm_nb.clips.check import check_clips, check_enough
from csm_nb.codec.mimi import load_codec
from csm_nb.corpora import codes, tokens
from csm_nb.corpora.sources import load_corpus
from csm_nb.corpora.tokens import read_tokens, write_tokens
from csm_nb.manifest import CorpusError


@pytest.fixture(scope="module")
def codec():
    return load_codec("models/csm-mini")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path / "project")


@pytest.fixture
def made(codec, tmp_path):
    """Tokens of five clips of two voices."""
    rows = []
    for number in range(5):
        wav = 0.1 * np.sin(np.arange(round((1 + number / 5) * SAMPLE_RATE)) * (0.05 + number / 50)).astype(np.float32)
        rows.append({"text": f"nummer {'et to tre fire fem'.split()[number]}", "speaker_id": str(number % 2), "language": "da",
                     "audio_path": str(write_audio(tmp_path / f"wavs/{number}.wav", wav))})
    return write_tokens(rows, codec, tmp_path / "made")["path"]


def publish(folder, frames=(20, 30), size=512, codebooks=8, metadata=None, **columns):
    """A data set of codes alone as others write it: no language, and no word of its codec."""
    rng = np.random.default_rng(0)
    table = {"id": ["a", "b"], "text": ["hej med dig", "vi ses"], "speaker_id": ["anna", "bent"],
             "codes": [rng.integers(0, size, (codebooks, n)).tolist() for n in frames], "n_frames": list(frames),
             "k_codebooks": [codebooks] * 2} | columns  # fmt: skip
    table = pa.table({name: values for name, values in table.items() if values is not None})
    table = table.set_column(table.schema.get_field_index("codes"), "codes",
                             table["codes"].cast(pa.list_(pa.list_(pa.int16()))))
    folder.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "train-00000-of-00001.parquet", row_group_size=1)
    return folder


def test_what_is_written_is_read_back_with_the_same_codes_and_nothing_is_encoded(codec, made, tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "FILE_CLIPS", 2)  # several files
    assert codes.main([str(made), str(tmp_path / "set"), "--licence", "CC0"]) == 0
    assert "license: cc0-1.0" in (tmp_path / "set/README.md").read_text()
    first = pq.read_table(tmp_path / "set/data/train-00000-of-00003.parquet")
    assert first.schema.names == ["id", "text", "speaker_id", "language", "codes", "n_frames", "k_codebooks"]
    assert (len(first["codes"][0]), len(first["codes"][0][0])) == (first["k_codebooks"][0].as_py(), first["n_frames"][0].as_py())
    monkeypatch.setattr(tokens, "encode", lambda codec, wavs: pytest.fail("encoded"))
    good, set_aside = check_clips(load_corpus(tmp_path / "set", "da"))
    again = write_tokens(good, codec, tmp_path / "again")
    assert (again["clips"], again["encoded"], set_aside) == (5, 0, [])
    for before, after in zip(read_tokens(made), read_tokens(again["path"], codec), strict=True):
        assert np.array_equal(before["codes"], after["codes"])
        assert (before["text"], before["speaker_id"]) == (after["text"], after["speaker_id"])
    assert write_tokens(good, codec, tmp_path / "again")["found"] == 0  # all whole: no shard is looked at


def test_a_set_that_does_not_state_its_codec_is_taken_and_that_is_said(codec, tmp_path):
    good, _ = check_clips(load_corpus(publish(tmp_path / "set"), "da"))
    assert [row["duration"] for row in good] == [1.6, 2.4]
    assert "a codec that its data set does not state, without audio" in good[0]["remarks"]["codes alone"]
    check_enough(good)
    assert write_tokens(good, codec, tmp_path)["clips"] == 2


def test_length_and_pace_are_checked_without_audio_and_nothing_is_measured_by_codes(tmp_path):
    rows = load_corpus(publish(tmp_path / "set", frames=(2, 2000)), "da")
    _, set_aside = check_clips(rows, need_one=False)
    assert [row["kind"] for row in set_aside] == ["too short", "too long"]
    assert [row["kind"] for row in check_clips(rows, need_text=False, need_one=False)[1]] == ["unreadable"] * 2


@pytest.mark.parametrize(("how", "message"), [
    ({"codebooks": 4}, "its codes have codebooks 4; the codec of the base model has 8"),
    ({"metadata": {"codec": "another"}}, "its codes have codec another"),
    ({"metadata": {"codebook_size": "2048"}}, "its codes have codebook_size 2048; the codec of the base model has 512"),
    ({"size": 2048}, "row 0: codes from .* to 20..; the codec of the base model has 0 to 511: they are of another codec"),
])  # fmt: skip
def test_codes_that_do_not_fit_the_codec_are_refused(codec, tmp_path, how, message):
    rows = load_corpus(publish(tmp_path / "set", **how), "da")
    with pytest.raises(CorpusError, match=message):
        write_tokens(rows, codec, tmp_path)


def test_a_set_without_its_shape_lists_the_columns_found(tmp_path):
    with pytest.raises(CorpusError, match="lacks a column of n_frames .*found are id, text, speaker_id, codes, k_codebooks"):
        load_corpus(publish(tmp_path / "set", n_frames=None), "da")


def test_codes_of_another_length_than_stated_are_set_aside(codec, tmp_path):
    rows = load_corpus(publish(tmp_path / "set", n_frames=[20, 31]), "da")
    made = write_tokens(rows, codec, tmp_path)
    assert made["clips"] == 1 and "8 codebooks of 30 codes; stated are 8 of 31" in made["set_aside"][0]["reason"]


def test_half_a_folder_of_tokens_is_not_published(made, tmp_path, capsys):
    next(made.glob("part-*")).unlink()
    assert codes.main([str(made), str(tmp_path / "set")]) == 1
    assert "0 of 1 shards of tokens" in capsys.readouterr().err and not (tmp_path / "set").exists()
