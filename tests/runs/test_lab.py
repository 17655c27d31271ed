"""A notebook that is opened by make lab asks for the run that make run makes, and what was edited in it stays."""

import ast

import nbformat
import pytest
from conftest import ROOT

from csm_nb import paths
from csm_nb.paths import STAGES
from csm_nb.recipe import ParameterError
from csm_nb.runs.chain import plan_tasks
from csm_nb.runs.lab import main, prepare_notebooks


def read_values(path):
    """The values that a notebook's parameters have when its first cells were run."""
    namespace = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(compile(ast.parse(cell.source), str(path), "exec"), namespace)
    return {key: value for key, value in namespace.items() if not key.startswith("__")}


@pytest.mark.parametrize(("language", "profile"), [("da", "mini"), ("pl", "test"), ("no", "csm-1b")])
def test_every_stage_has_the_values_of_the_headless_run(language, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("csm_nb.runs.chain.hub.check_models", lambda *_: None)  # the real ones are not here
    tasks = plan_tasks([language], STAGES, profile)
    made = prepare_notebooks(language, profile, tmp_path)
    assert [path.stem for path in made] == list(STAGES) == [task.stage for task in tasks]
    for path, task in zip(made, tasks, strict=True):
        assert read_values(path) == task.params | {"language": language}
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")


def test_an_edited_notebook_stays_and_the_others_follow_the_notebooks(tmp_path, capsys):
    first, second, *_ = prepare_notebooks("da", "mini", tmp_path)
    for path in (first, second):
        notebook = nbformat.read(path, as_version=4)
        if path == first:
            notebook.cells[2].source += "\nclips = 3"
        else:
            notebook.cells[2].outputs, notebook.cells[2].execution_count = [], 4  # run, and not edited
        nbformat.write(notebook, path)
    before = first.read_text()
    prepare_notebooks("da", "mini", tmp_path)
    assert first.read_text() == before and nbformat.read(second, as_version=4).cells[2].execution_count is None
    assert "00_mimi_sanity.ipynb was edited and stays as it is" in capsys.readouterr().out
    first.write_text("{")
    prepare_notebooks("da", "mini", tmp_path)
    assert first.read_text() == "{"


def test_a_wrong_language_or_profile_is_refused_with_what_there_is(tmp_path, capsys):
    with pytest.raises(ParameterError, match="no language 'dk'"):
        prepare_notebooks("dk", "mini", tmp_path)
    assert main(["--langs", "da", "--profile", "minni"]) == 2 and "did you mean mini?" in capsys.readouterr().err


def test_the_place_that_is_printed_is_the_first_notebook(monkeypatch, tmp_path, capsys):
    for name in ("params", "notebooks", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert main(["--langs", "sv", "da"]) == 0
    assert capsys.readouterr().out.split() == ["runs/lab/mini/sv/00_mimi_sanity.ipynb"]
    assert (tmp_path / "runs/lab/mini/da/05_phonemes.ipynb").is_file()
