"""Pages for reviewers: each executed notebook as one HTML file, and an index of the runs by language and stage.

`python -m csm_nb.runs.pages` (make index) writes the index anew, with pages of runs made by hand; csm_nb.runs does so at its end.
"""

import argparse
import contextlib
import logging
import re
import sys
import time
from pathlib import Path

from csm_nb import paths
from csm_nb.hub import ModelError, describe_model, find_model
from csm_nb.languages import get_language
from csm_nb.paths import STAGES, resolve_path, show_path
from csm_nb.provenance import read_json, replace_file
from csm_nb.runs.advice import say_next
from csm_nb.runs.folders import NOTEBOOK, is_alive

OPENED, FINISHED = "results in (.+)$", "at most: {}$"  # what a notebook prints of its run's folder: its first cell, its last
TEMPLATES = Path(__file__).parent / "templates"
CUT_SHORT = "its process ended without a word: killed, out of memory, or the kernel was shut down"
ROW = re.compile("<tr.*?</tr>", re.S)
TONES = dict.fromkeys(("go", "clear", "learned"), "good") | dict.fromkeys(("stop", "unclear", "bleeds", "no gain"), "mixed")
NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?( ?%)?|nan|NaN|None|")  # what a column of numbers holds; the rest are words


def export_html(notebook) -> Path:
    """Return the HTML page made beside an executed notebook; it stands alone, with nothing loaded from elsewhere.

    Under its title stands the verdict, with what decided it and what to do next. No path of this machine is left in it.
    """
    import nbformat
    from jinja2 import FileSystemLoader
    from nbconvert import HTMLExporter

    notebook = Path(notebook)
    content = nbformat.read(notebook, as_version=4)
    record = read_json(notebook.with_name("run.json"))
    content.metadata["title"] = " · ".join(filter(None, [record.get("stage", notebook.stem), record.get("language")]))
    if "papermill-error-cell-tag" in content.cells[0].metadata.get("tags", []):
        del content.cells[0]  # says above the title what the box says
    content.cells.insert(1, nbformat.v4.new_markdown_cell(render("verdict.html", **_describe_run(notebook.parent))))
    for cell in content.cells:
        for output in cell.get("outputs", []):
            _tidy(output)
        if "outputs" in cell:  # a widget alone leaves nothing to see
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    exporter = HTMLExporter(
        extra_loaders=[FileSystemLoader(TEMPLATES)], template_file="notebook.html.j2", embed_images=True
    )
    page, _ = exporter.from_notebook_node(content)
    return _write(notebook.with_suffix(".html"), page)


def take_notebook(notebook) -> Path | None:
    """Return the page made of a notebook that was run by hand and copied into its run's folder; None where there is none to make.

    Its own outputs say which run that is. A run that is done, or failed, gets its page once: what is edited and tried in the
    notebook afterwards is not the run. Outputs of cells that the run did not execute are left out.
    """
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    folder = resolve_path([".", *re.findall(OPENED, said, re.M)][-1])
    record = read_json(folder / "run.json")
    if "notebook" not in record or not _lacks_page(folder):
        return None
    names = [output.ename for output in outputs if output.output_type == "error"]
    if (folder / "done.json").is_file():
        whole = re.search(FINISHED.format(re.escape(show_path(folder))), said, re.M)
    else:
        whole = record["status"] != "running" and any(record.get("error", "").startswith(f"{name}:") for name in names)
    if not whole:  # it was saved too early, or is at another run by now
        return None
    for cell in cells:
        if record.get("cells") and cell.get("id") not in record["cells"]:
            cell.outputs, cell.execution_count = [], None
    if Path(notebook).resolve() != (folder / NOTEBOOK).resolve():
        _write(folder / NOTEBOOK, nbformat.writes(content))
    return export_html(folder / NOTEBOOK)


def take_saved(model, os_path, **_):
    """Make the page of a run, and the index, when JupyterLab saves its notebook; called by the server that make lab starts.

    Whatever goes wrong is logged: raised, it would tell the person that nothing was saved.
    """
    try:
        if model["type"] == "notebook" and (page := take_notebook(os_path)):
            build_index(page.parents[3])
    except Exception:
        logging.getLogger(__name__).exception("no page of %s", os_path)


def _lacks_page(folder):
    """Tell whether a run's state (run.json) is newer than its page."""
    page = folder / "notebook.html"
    return not page.is_file() or page.stat().st_mtime < (folder / "run.json").stat().st_mtime


def _take_what_lacks(runs_dir):
    for path in sorted(runs_dir.glob("*/*/*/run.json")):
        notebook = read_json(path).get("notebook")
        if notebook and resolve_path(notebook).is_file() and _lacks_page(path.parent):
            try:
                take_notebook(resolve_path(notebook))
            except Exception as error:  # half a notebook, say: the run is shown without its page
                print(f"{show_path(path.parent)}: no page of {notebook}: {error}", file=sys.stderr)


def build_index(runs_dir, current=()) -> Path:
    """Return runs_dir/index.html, written anew: languages by stages, each with verdict, seconds, metrics and its page.

    Beside it lies the same as index.md, for JupyterLab: in its preview links work, and in its viewer of HTML they are refused.

    A cell shows the run of `current` (folders) of its language and stage, otherwise the newest; the others are listed
    below. A run counts as done by its marker only; one that failed or was cut short is shown as that, in red. Runs made by
    hand get the pages that they lack, where their notebook is still there and still theirs (take_notebook).
    """
    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    _take_what_lacks(runs_dir)
    runs = [_describe_run(path.parent) for path in runs_dir.glob("*/*/*/run.json")]
    runs.sort(key=lambda run: (run["dir"] in set(current), run["started"]), reverse=True)
    table, older = {}, []
    for run in runs:
        if table.setdefault((run["language"], run["stage"]), run) is not run:
            older.append(run)
    shown = {
        "stages": STAGES, "languages": [(code, _name_language(code)) for code in sorted({language for language, _ in table})],
        "table": table, "older": sorted(older, key=lambda run: -run["started"]), "now": time.strftime("%Y-%m-%d %H:%M"),
        "models": _describe_models({run["model"] for run in runs}),
    }  # fmt: skip
    _write(runs_dir / "index.md", render("index.md", **shown))
    return _write(runs_dir / "index.html", render("index.html", **shown))


def render(template: str, **values) -> str:
    """Return the text of a template of this room, such as "index.html", with values in it."""
    from jinja2 import Environment, FileSystemLoader

    trim = template.endswith(".md")
    environment = Environment(autoescape=not trim, trim_blocks=trim, loader=FileSystemLoader(TEMPLATES))
    return environment.get_template(f"{template}.j2").render(**values)


def _tidy(output):
    """Leave out of an output what no page can show, the paths of this machine, and the alignment of words as numbers."""
    data = output.get("data", {})
    if data.pop("application/vnd.jupyter.widget-view+json", None):
        data.pop("text/plain", None)  # the widget's name
    for place, name in ((output, "text"), (data, "text/plain"), (data, "text/html")):
        if name in place:
            place[name] = place[name].replace(f"{paths.ROOT}/", "")
    if 'class="dataframe"' in data.get("text/html", ""):
        data["text/html"] = _align_words(data["text/html"])


def _align_words(frame):
    """Mark in a data frame's HTML the columns that hold words, cells and heads, and the heads of its index.

    Pandas aligns everything as numbers.
    """
    rows = [re.findall("<td>(.*?)</td>", row, re.S) for row in ROW.findall(frame)]
    columns = max(map(len, rows), default=0)
    words = {i - len(row) for row in rows for i, cell in enumerate(row) if not NUMBER.fullmatch(cell.strip())}

    def mark(row):
        kind = "td" if "<td>" in row[0] else "th"
        before, *cells = row[0].split(f"<{kind}>")  # a head over several columns is none of theirs
        places = range(-len(cells), 0)  # counted from the right, as an index may have several columns
        tags = [f'<{kind} class="words">' if i in words or i < -columns else f"<{kind}>" for i in places]
        return before + "".join(tag + cell for tag, cell in zip(tags, cells, strict=True))

    return ROW.sub(mark, frame)


def _describe_run(folder):
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    done = (folder / "done.json").is_file()
    if done:
        verdict = str(metrics.get("verdict", "done"))
        tone = next((tone for word, tone in TONES.items() if verdict.startswith(word)), "plain")
    else:
        verdict, tone = record.get("status", "failed"), "bad"
        if verdict == "running":
            verdict, tone = ("running", "plain") if is_alive(folder) else ("cut short", "bad")
    page = next((name for name in ("notebook.html", "notebook.ipynb", "log.txt") if (folder / name).is_file()), "")
    params = record.get("params", {})
    numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)} if done else {}
    return {
        "dir": folder,
        "stage": folder.parent.name,
        "language": folder.parent.parent.name,
        "verdict": verdict,
        "tone": tone,
        "link": "/".join([*folder.parts[-3:], page]),
        "started": record.get("started", 0),
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("started", 0))),
        "seconds": round(record["seconds"]) if "seconds" in record and verdict != "running" else None,
        "model": params.get("base_model") or params.get("codec_model") or "",
        "because": metrics.get("because", "") if done else "" if verdict == "running" else record.get("error") or CUT_SHORT,
        "next": say_next(folder.parent.name, verdict, params) if done else "",
        "metrics": [(key, f"{value:.3g}" if type(value) is float else value) for key, value in numbers.items()][:5],
    }


def _describe_models(names):
    """Return what the cards of those models say that lie here as folders; the index fetches nothing."""
    lines = []
    for name in sorted(name for name in names if name and find_model(name)):
        with contextlib.suppress(ModelError):
            lines.append(describe_model(name))
    return lines


def _name_language(code):
    try:
        return get_language(code).name
    except ValueError:
        return code


def _write(path, page):
    with replace_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def main(arguments=None) -> int:
    """Take in the notebooks that are given, write the index of their runs and of --runs anew, and print each page's path."""
    parser = argparse.ArgumentParser("python -m csm_nb.runs.pages", description=__doc__.partition(":")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="run by hand, and moved or renamed since")
    parser.add_argument("--runs", default="runs", help="the folder of the runs (their runs_dir)")
    options = parser.parse_args(arguments)
    places = [resolve_path(options.runs)]
    for notebook in options.notebooks:
        page = take_notebook(notebook)
        print(show_path(page) if page else f"{notebook}: no page; its outputs name no run that is over and lacks its page")
        places += [page.parents[3]] if page else []
    for place in dict.fromkeys(places):
        print(f"index: {build_index(place)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
