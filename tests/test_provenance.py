"""A record that is written is found old or new, never half."""

import numpy as np
import pytest

from csm_nb.provenance import read_json, replace_file, write_json


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    with replace_file(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_record_that_json_can_not_hold_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"mean": np.float32(0.5), "low": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"mean": object()})
    assert read_json(path) == {"mean": 0.5, "low": None} and list(tmp_path.iterdir()) == [path]
