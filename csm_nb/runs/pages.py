"""Pages for reviewers: each executed notebook as one HTML file, and an index of the runs by language and stage."""

import contextlib
import re
import time
from pathlib import Path

from csm_nb import paths
from csm_nb.hub import ModelError, describe_model, find_model
from csm_nb.languages import get_language
from csm_nb.paths import STAGES
from csm_nb.provenance import read_json, replace_file
from csm_nb.runs.advice import say_next
from csm_nb.runs.folders import is_alive

TEMPLATES = Path(__file__).parent / "templates"
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
    content.cells.insert(1, nbformat.v4.new_markdown_cell(_render("verdict", **_describe_run(notebook.parent))))
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


def build_index(runs_dir, current=()) -> Path:
    """Return runs_dir/index.html, written anew: languages by stages, each with verdict, seconds, metrics and its page.

    A cell shows the run of `current` (folders) of its language and stage, otherwise the newest; the others are listed
    below. A run counts as done by its marker only; one that failed or was cut short is shown as that, in red.
    """
    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    runs = [_describe_run(path.parent) for path in runs_dir.glob("*/*/*/run.json")]
    runs.sort(key=lambda run: (run["dir"] in set(current), run["started"]), reverse=True)
    table, older = {}, []
    for run in runs:
        if table.setdefault((run["language"], run["stage"]), run) is not run:
            older.append(run)
    languages = [(code, _name_language(code)) for code in sorted({language for language, _ in table})]
    return _write(runs_dir / "index.html", _render("index",
        stages=STAGES, languages=languages, table=table, models=_describe_models({run["model"] for run in runs}),
        older=sorted(older, key=lambda run: -run["started"]), now=time.strftime("%Y-%m-%d %H:%M"),
    ))  # fmt: skip


def _render(template, **values):
    from jinja2 import Environment, FileSystemLoader

    return Environment(autoescape=True, loader=FileSystemLoader(TEMPLATES)).get_template(f"{template}.html.j2").render(**values)


def _tidy(output):
    """Leave out of an output what no page can show, the paths of this machine, and the alignment of words as numbers."""
    data = output.get("data", {})
    if data.pop("application/vnd.jupyter.widget-view+json", None):
        data.pop("text/plain", None)  # the widget's name
    for place, name in ((output, "text"), (data, "text/plain"), (data, "text/html")):
        if name in place:
            place[name] = place[name].replace(f"{paths.ROOT}/", "")
    if 'class="dataframe"' in data.get("text/html", ""):
        data["text/html"] = re.sub(r"<td>([^<]*)</td>", _align, data["text/html"])


def _align(cell):
    return cell[0] if NUMBER.fullmatch(cell[1].strip()) else f'<td class="words">{cell[1]}</td>'


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
        "because": metrics.get("because", "") if done else record.get("error", ""),
        "next": say_next(folder.parent.name, verdict, params) if done else "",
        "error": "" if done else record.get("error", ""),
        "metrics": [(key, f"{value:.3g}" if type(value) is float else value) for key, value in numbers.items()][:5],
    }


def _describe_models(names):
    """What the cards of the models say that lie here as folders; the index fetches nothing."""
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
