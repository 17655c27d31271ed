"""Pages stand alone, and the index shows every run as what it is."""

import re
from html import unescape

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from csm_nb.hub import describe_model
from csm_nb.paths import STAGES
from csm_nb.provenance import write_json
from csm_nb.runs.advice import NEXT, say_next
from csm_nb.runs.pages import build_index, export_html

# attributes, styles and module imports that would reach for a network
LOADS = re.compile(
    r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import|import\s.*from\s+["']https?:"""
)


def make_run(runs, language, stage, name, status, started, verdict=None, error=""):
    folder = runs / language / stage / name
    folder.mkdir(parents=True)
    record = {"status": status, "started": started, "seconds": 41.3, "error": error, "process": [1, 0]}
    write_json(folder / "run.json", record | {"params": {"base_model": "models/csm-mini"}})
    (folder / "notebook.html").write_text("page")
    if verdict:
        write_json(folder / "metrics.json", {"verdict": verdict, "cer": 0.123456, "clips": 12, "note": "words"})
        write_json(folder / "done.json", {})
    return folder


@pytest.fixture
def page(tmp_path):
    output = nbformat.v4.new_output
    plain = nbformat.v4.new_code_cell("show()", execution_count=1, outputs=[
        output("stream", text="a line\n"),
        output("display_data", {"text/html": '<audio controls src="data:audio/mp3;base64,AAAA"></audio>'}),
        output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "a figure"}),
        output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Widget"}),
    ])  # fmt: skip
    cells = [nbformat.v4.new_markdown_cell("Does it carry $F_0$?"), plain]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    write_json(tmp_path / "run.json", {"stage": "00_mimi_sanity", "language": "da"})
    return export_html(tmp_path / "notebook.ipynb")


def test_a_run_s_page_loads_nothing_from_a_network(page):
    text = page.read_text()
    assert page.name == "notebook.html"
    assert not LOADS.findall(text)
    assert not re.search(r"<script[^>]+src=", text)


def test_a_run_s_page_holds_title_text_figure_and_sound(page):
    text = page.read_text()
    assert "<title>00_mimi_sanity · da</title>" in text
    assert all(part in text for part in ("Does it carry", "a line", "data:image/png;base64,", "data:audio/mp3"))


def test_the_verdict_its_reason_and_what_to_do_next_stand_first_with_the_way_back(tmp_path):
    folder = tmp_path / "da" / "00_mimi_sanity" / "abc"
    folder.mkdir(parents=True)
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("x = 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    record = {"stage": "00_mimi_sanity", "language": "da", "params": {"language": "da", "audio": "a.jsonl"}}
    write_json(folder / "run.json", record)
    write_json(folder / "metrics.json", {"verdict": "stop", "because": "retention .55, <wanted> .7"})
    write_json(folder / "done.json", {})
    text = export_html(folder / "notebook.ipynb").read_text()
    order = [text.rindex(part) for part in ("Title", 'class="verdict-box mixed"', "&lt;wanted&gt; .7", "Next:", "x")]
    assert order == sorted(order) and 'href="../../../index.html"' in text and "listen to what is lost" in text
    (folder / "done.json").unlink()
    write_json(folder / "run.json", record | {"status": "failed", "error": "ValueError: no clip"})
    text = export_html(folder / "notebook.ipynb").read_text()
    assert 'class="verdict-box bad"' in text and "ValueError: no clip" in text and "Next:" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_every_verdict_that_a_stage_can_have_says_what_to_do_next(stage):
    for verdict in NEXT[stage]:
        for audio in ("", "my/manifest.jsonl"):
            said = say_next(stage, f"{verdict}: why", {"language": "pl", "audio": audio})
            assert said and "{" not in said
    assert say_next(stage, "none of these", {"audio": "my/manifest.jsonl"}) == ""


def test_a_page_holds_no_path_of_the_machine_no_empty_widget_and_words_at_the_left(tmp_path):
    output = nbformat.v4.new_output
    frame = pd.DataFrame({"reason": ["too short"], "seconds": [0.25]})._repr_html_()
    outputs = [output("stream", text=f"in {ROOT}/runs/da\n"), output("display_data", {"text/html": frame}),
               output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Box()"})]
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("show()", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    text = export_html(tmp_path / "notebook.ipynb").read_text()
    assert str(ROOT) not in text and "in runs/da" in text and "Box()" not in text
    assert '<td class="words">too short</td>' in text and "<td>0.25</td>" in text
    assert '<th class="words"></th>' in text and '<th class="words">reason</th>' in text and "<th>seconds</th>" in text


def test_index_shows_verdict_seconds_metrics_and_the_page_of_each_run(tmp_path):
    make_run(tmp_path, "da", "00_mimi_sanity", "abc", "done", 1000.0, verdict="go")
    text = build_index(tmp_path).read_text()
    assert not LOADS.findall(text)
    assert re.search(r'class="verdict good" href="da/00_mimi_sanity/abc/notebook.html">go<', text)
    assert "41 s" in text and "0.123" in text and "Danish" in text and describe_model("models/csm-mini") in unescape(text)
    assert "words" not in text


def test_index_shows_the_newest_run_and_lists_the_others(tmp_path):
    make_run(tmp_path, "da", "01_anchor", "older", "done", 1000.0, verdict="go")
    make_run(tmp_path, "da", "01_anchor", "newer", "failed", 2000.0, error="ValueError: <b>boom</b>")
    main, others = build_index(tmp_path).read_text().split("Other runs")
    assert "newer/" in main and "older/" not in main and "older/" in others
    assert 'class="verdict bad"' in main and "&lt;b&gt;boom" in main and "<b>boom" not in main


def test_index_shows_the_runs_of_this_call_first(tmp_path):
    wanted = make_run(tmp_path, "da", "01_anchor", "older", "done", 1000.0, verdict="go")
    make_run(tmp_path, "da", "01_anchor", "newer", "done", 2000.0, verdict="stop")
    main, others = build_index(tmp_path, [wanted]).read_text().split("Other runs")
    assert "older/" in main and "newer/" in others


def test_a_run_that_says_running_without_a_process_was_cut_short(tmp_path):
    make_run(tmp_path, "da", "01_anchor", "abc", "running", 1000.0)
    assert "cut short" in build_index(tmp_path).read_text()


def test_index_of_no_runs_is_a_page(tmp_path):
    assert "Runs" in build_index(tmp_path / "runs").read_text()


def test_index_marks_an_unclear_verdict_as_such_whatever_it_says_beside(tmp_path):
    make_run(tmp_path, "no", "04_confusion", "a", "done", 1, "unclear: 36 of 40, 90 % heard as no; 62 would decide")
    assert 'class="verdict mixed"' in build_index(tmp_path).read_text()
