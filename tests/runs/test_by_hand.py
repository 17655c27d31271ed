"""A run made in JupyterLab or by papermill alone gets its page and, where it fails, its reason; never the page of another."""

import inspect
import os
import re
import subprocess
import sys

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from test_notebooks import PATHS, code_cells
from test_run import find_run, put_cell, write_torch

from csm_nb.paths import resolve_path, show_path
from csm_nb.provenance import read_json, write_json
from csm_nb.runs import kernel
from csm_nb.runs.pages import OPENED, build_index, main, take_notebook, take_saved
from csm_nb.teaching.stage import describe_run


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run that was made by hand, and done."""
    folder = tmp_path / "da" / "00_mimi_sanity" / "abc"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"status": "done", "notebook": "", "started": 1.0, "stage": folder.parent.name})
    write_json(folder / "done.json", {})
    return folder


def write_outputs(path, folder, ending="done in 3 s, 0.1 GiB at most: {}", error="", note=""):
    """Write a notebook as it is saved after a run in `folder`: it opens the run, works, says what `ending` is."""
    cell, output, place = nbformat.v4.new_code_cell, nbformat.v4.new_output, show_path(folder)
    cells = [
        nbformat.v4.new_markdown_cell(f"# Title {note}"),
        cell("open", id="open", outputs=[output("stream", text=f"00 for Danish, results in {place}\na model\n")]),
        cell("work", id="work", outputs=[output("stream", text="worked\n")]),
        cell("end", id="end", outputs=[output("stream", text=ending.format(place) + "\n")] if ending else []),
    ]
    if error:
        cells[-1].outputs.append(output("error", ename=error, evalue="", traceback=[]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_says_where_its_results_go_when_it_opens_its_run(path):
    (opening,) = [cell.source for cell in code_cells(path)[1] if "open_run(" in cell.source]
    if "stage.describe_run(run)" in opening:
        opening = inspect.getsource(describe_run)
    assert re.search(OPENED.replace("(.+)$", re.escape('{run.place}")')), opening)


def test_a_notebook_is_copied_into_its_run_once_and_what_is_tried_in_it_later_is_not_the_run(run, tmp_path):
    mine = write_outputs(tmp_path / "mine.ipynb", run)
    page = take_notebook(mine)
    assert page == run / "notebook.html" and "worked" in page.read_text() and (run / "notebook.ipynb").is_file()
    write_outputs(mine, run, note="tried later")
    assert take_notebook(mine) is None and "tried later" not in page.read_text()


@pytest.mark.parametrize("change", ["not finished in it", "of another run", "still running", "of the runner", "without outputs"])
def test_a_notebook_that_does_not_show_the_run_to_its_end_makes_no_page(run, tmp_path, change):
    if change == "still running":
        (run / "done.json").unlink()
        write_json(run / "run.json", read_json(run / "run.json") | {"status": "running"})
    if change == "of the runner":
        write_json(run / "run.json", {"status": "done"})
    ending = {"not finished in it": "", "of another run": "done in 3 s, 0.1 GiB at most: {}.2"}.get(change, "at most: {}")
    mine = write_outputs(tmp_path / "mine.ipynb", run, ending)
    if change == "without outputs":
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("open")]), mine)
    assert take_notebook(mine) is None and not (run / "notebook.html").exists()


def test_a_failure_is_shown_when_the_notebook_shows_it_and_again_when_it_failed_elsewhere(run, tmp_path):
    (run / "done.json").unlink()
    record = read_json(run / "run.json") | {"status": "failed", "error": "ValueError: no clip"}
    write_json(run / "run.json", record)
    mine = write_outputs(tmp_path / "mine.ipynb", run, ending="", error="KeyError")
    assert take_notebook(mine) is None  # a failure of before
    write_outputs(mine, run, ending="", error="ValueError")
    assert "ValueError: no clip" in take_notebook(mine).read_text() and take_notebook(mine) is None
    write_json(run / "run.json", record | {"error": "KeyError: rank"})
    os.utime(run / "run.json", (2e9, 2e9))
    write_outputs(mine, run, ending="", error="KeyError")
    assert "KeyError: rank" in take_notebook(mine).read_text()


def test_outputs_of_cells_that_the_run_did_not_execute_are_left_out(run, tmp_path):
    write_json(run / "run.json", read_json(run / "run.json") | {"cells": ["open", "end"]})
    page = take_notebook(write_outputs(tmp_path / "mine.ipynb", run))
    assert "worked" not in page.read_text() and "at most" in page.read_text()


def test_the_index_takes_in_what_lacks_its_page_and_a_notebook_that_moved_is_taken_when_it_is_named(run, tmp_path, capsys):
    mine = write_outputs(tmp_path / "mine.ipynb", run)
    write_json(run / "run.json", read_json(run / "run.json") | {"notebook": show_path(tmp_path / "gone.ipynb")})
    build_index(tmp_path)
    assert not (run / "notebook.html").exists()
    assert main([str(mine), "--runs", str(tmp_path)]) == 0
    assert "abc/notebook.html" in (tmp_path / "index.html").read_text()
    assert show_path(run / "notebook.html") in capsys.readouterr().out
    (run / "notebook.html").unlink()
    write_json(run / "run.json", read_json(run / "run.json") | {"notebook": show_path(mine)})
    assert "abc/notebook.html" in build_index(tmp_path).with_suffix(".md").read_text()
    mine.write_text("{")
    (run / "notebook.html").unlink()
    build_index(tmp_path)
    assert "no page of" in capsys.readouterr().err


def test_what_goes_wrong_when_jupyterlab_saves_is_logged_and_fails_no_save(run, tmp_path, caplog):
    mine = write_outputs(tmp_path / "mine.ipynb", run)
    take_saved({"type": "file"}, str(mine))
    assert not (run / "notebook.html").exists()
    take_saved({"type": "notebook"}, str(tmp_path / "none.ipynb"))
    assert "no page of" in caplog.text
    take_saved({"type": "notebook"}, str(mine))
    assert (run / "notebook.html").is_file() and (tmp_path / "index.html").is_file()


def test_a_failed_cell_leaves_its_reason_until_it_succeeds_and_nothing_is_noted_after_the_end(tmp_path, monkeypatch):
    shell, record = InteractiveShell(), tmp_path / "run.json"
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    write_json(record, {"status": "running", "started": 1.0})
    kernel.watch_cells(record)
    run_cell = lambda source, cell: shell.run_cell(source, cell_id=cell, store_history=False)  # noqa: E731
    run_cell("x = 1", "a")
    run_cell("raise ValueError('two\\nlines')", "b")
    said = read_json(record)
    assert (said["status"], said["error"], said["cells"]) == ("failed", "ValueError: two lines", ["a", "b"])
    run_cell("x", "a")  # looking around mends nothing
    assert read_json(record)["status"] == "failed"
    run_cell("x = 2", "b")
    assert read_json(record)["status"] == "running" and "error" not in read_json(record)
    run_cell("raise KeyboardInterrupt", "c")
    assert read_json(record)["status"] == "interrupted"
    write_json(record, {"status": "done"})
    run_cell("1", "d")
    run_cell("1 / 0", "e")
    assert read_json(record) == {"status": "done", "cells": ["d"]}


def test_papermill_s_notebook_is_the_last_on_its_command_line_and_jupyterlab_names_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.ipynb", "b.ipynb"):
        (tmp_path / name).write_text("{}")
    words = ["python", "/env/bin/papermill", "a.ipynb", "b.ipynb", "-f", "params/no.yaml"]
    monkeypatch.setattr(kernel.psutil, "Process", lambda _: type("Parent", (), {"cmdline": lambda _: words})())
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "a.ipynb"))
    assert resolve_path(kernel.find_notebook()) == tmp_path / "b.ipynb"
    words[1:] = ["-m", "papermill", "a.ipynb", "s3://there/b.ipynb"]
    assert kernel.find_notebook() == ""
    words[1:] = ["jupyter-lab", "b.ipynb"]
    assert resolve_path(kernel.find_notebook()) == tmp_path / "a.ipynb"
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert kernel.find_notebook() == ""


def execute(project, *words):
    write_torch(project)
    environment = dict(os.environ) | {"PYTHONPATH": str(project), "PWD": str(project)}
    return subprocess.run([sys.executable, "-m", *words], cwd=project, env=environment, capture_output=True, text=True)


def test_runs_by_papermill_alone_get_page_index_and_the_reason_of_a_failure(project):
    put_cell(project, "00_mimi_sanity", 'print(f"results in {run.place}")')
    put_cell(project, "01_anchor", 'print(f"results in {run.place}")')
    put_cell(project, "01_anchor", "raise ValueError('no clip')")
    for stage in ("00_mimi_sanity", "01_anchor"):
        execute(project, "papermill", f"notebooks/{stage}.ipynb", f"{stage}.ipynb", "-f", "params/da.yaml", "--no-progress-bar")
    assert execute(project, "csm_nb.runs.pages").returncode == 0
    done, failed = find_run(project, "00_mimi_sanity"), find_run(project, "01_anchor")
    index = (project / "runs" / "index.html").read_text()
    assert all(f"{run.name}/notebook.html" in index for run in (done, failed)) and "ValueError: no clip" in index
    record = read_json(failed / "run.json")
    assert (record["status"], record["error"], record["notebook"]) == ("failed", "ValueError: no clip", "01_anchor.ipynb")
    page = (failed / "notebook.html").read_text()
    assert 'class="verdict-box bad"' in page and "An Exception was encountered" not in page
    assert 'class="verdict-box good"' in (done / "notebook.html").read_text()
