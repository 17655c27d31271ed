"""A notebook that is opened by make lab asks for the run that make run makes, and what was edited in it stays."""

import ast
import json
import os
import re
import subprocess

import nbformat
import pytest
from conftest import ROOT

from csm_nb import paths
from csm_nb.paths import STAGES
from csm_nb.recipe import ParameterError
from csm_nb.runs.chain import plan_tasks
from csm_nb.runs.lab import ASKS, main, prepare_notebooks, write_start
from csm_nb.runs.pages import TEMPLATES, take_saved
from csm_nb.runs.params import check_params


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
        values = read_values(path)
        assert check_params(path.stem, values) == task.params | {"language": language}
        assert "recipe" not in values or values["recipe"].keys() == task.origins.keys()  # what is given, not all defaults
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")


def test_an_edited_notebook_stays_and_one_that_was_run_until_there_is_another(tmp_path, monkeypatch, capsys):
    first, second, third, *_ = prepare_notebooks("da", "mini", tmp_path)
    for path in (first, second, third):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[2].execution_count = 4
        if path == first:
            notebook.cells[2].source += "\nclips = 3"
        nbformat.write(notebook, path)
    before = first.read_text()
    prepare_notebooks("da", "mini", tmp_path)
    assert first.read_text() == before and nbformat.read(second, as_version=4).cells[2].execution_count == 4
    assert "00_mimi_sanity.ipynb was edited and stays as it is" in capsys.readouterr().out
    (tmp_path / "mini.yaml").write_text((ROOT / "params" / "mini.yaml").read_text() + "seed: 7\n")
    prepare_notebooks("da", str(tmp_path / "mini.yaml"), tmp_path)
    assert first.read_text() == before and nbformat.read(second, as_version=4).cells[2].execution_count is None
    first.write_text("{")
    prepare_notebooks("da", "mini", tmp_path)
    assert first.read_text() == "{"


def test_a_wrong_language_or_profile_is_refused_with_what_there_is(tmp_path, capsys):
    with pytest.raises(ParameterError, match="no language 'dk'"):
        prepare_notebooks("dk", "mini", tmp_path)
    assert main(["--langs", "da", "--profile", "minni"]) == 2 and "did you mean mini?" in capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Return a project of its own, with what this one has to prepare and run."""
    for name in ("params", "notebooks", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("profile", ["mini", "test"])
def test_one_start_page_names_every_stage_of_every_language_and_all_its_links_lead_somewhere(elsewhere, capsys, profile):
    assert main(["--langs", "sv", "da", "--profile", profile]) == 0
    assert capsys.readouterr().out.split() == [f"runs/lab/{profile}/START.md"]
    page = elsewhere / "runs" / "lab" / profile / "START.md"
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not (page.parent / link).is_file()] == []
    assert set(links) >= {f"{language}/{stage}.ipynb" for language in ("sv", "da") for stage in STAGES}
    assert "Swedish, Danish" in text and "clips=" in text and f"params/{profile}.yaml" in text and "params/da.yaml" in text
    where = "runs" if profile == "mini" else "runs/test"
    assert f"{where}/<language>/<stage>/" in text and (elsewhere / where / "index.md").is_file()


def test_a_profile_outside_the_project_is_named_and_not_linked(elsewhere, tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "big.yaml"
    own.write_text("clips: 20\n")
    text = write_start(["da"], str(own)).read_text()
    assert f"| {own} | `clips=20` |" in text and f"make run LANGS=\"da\" PROFILE={own}" in text


def test_what_a_stage_asks_is_what_the_readme_says():
    rows = re.findall(r"^\| `(\d\d_\w+)` \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert dict(rows) == ASKS


def test_make_lab_opens_the_start_page_as_a_page_and_hears_of_every_save():
    words = ["make", "-n", "-o", ".venv/.csm-nb-setup", "lab", "LANGS=da sv", "PROFILE=my/big.yaml"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert "default_url=/lab/tree/runs/lab/big/START.md" in command
    assert f"JUPYTER_CONFIG_PATH='{TEMPLATES / 'jupyter'}'" in command
    server = json.loads((TEMPLATES / "jupyter" / "jupyter_server_config.json").read_text())
    assert server["ContentsManager"]["post_save_hook"] == f"{take_saved.__module__}.{take_saved.__name__}"
    lab = json.loads((TEMPLATES / "jupyter" / "labconfig" / "default_setting_overrides.json").read_text())
    assert lab["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}
