"""Pages for reviewers: each executed notebook as one HTML file, and an index of the runs by language and stage."""

import contextlib
import time
from pathlib import Path

from csm_nb.hub import ModelError, describe_model, find_model
from csm_nb.languages import get_language
from csm_nb.paths import STAGES
from csm_nb.provenance import read_json, replace_file
from csm_nb.runs.folders import is_alive

# nbconvert's own page without what it loads from the network (RequireJS, MathJax, Mermaid, the widget manager); a
# widget shows nothing in it: the plain cell beside it does.
_NOTEBOOK = """
{%- extends 'lab/index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}
<style>
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
.jp-InputArea-editor { font-size: .85em; opacity: .85; }
.jp-OutputArea-output img { max-width: 100%; }
</style>
{% endblock %}
{% block data_widget_view %}{% endblock %}
"""
_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title>
<style>
:root { color-scheme: light dark; --line: #d8dbe0; --soft: #667; --page: #fff; --head: #f4f5f7; --good: #1a7f4b;
        --mixed: #9a6700; --bad: #c62828; --plain: #3b5bdb; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #9aa3af; --page: #15181c; --head: #1e2228;
        --good: #5fcf95; --mixed: #e0b04a; --bad: #ff7b72; --plain: #91a7ff; } }
body { font: 15px/1.45 system-ui, sans-serif; background: var(--page); max-width: 90rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 60rem; } .soft, small { color: var(--soft); }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border: 1px solid var(--line); padding: .5rem .65rem; text-align: left; vertical-align: top; }
th { background: var(--head); font-weight: 600; white-space: nowrap; }
a { color: inherit; } .verdict { font-weight: 650; }
.good { color: var(--good); } .mixed { color: var(--mixed); }
.bad { color: var(--bad); } .plain { color: var(--plain); }
dl { display: grid; grid-template-columns: auto auto; gap: 0 .6rem; margin: .35rem 0 0;
     font-size: .8rem; width: fit-content; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; }
.stages { table-layout: fixed; min-width: 76rem; overflow-wrap: anywhere; } .stages th:first-child { width: 7rem; }
.runs td { padding: .25rem .65rem; } td { font-variant-numeric: tabular-nums; }
</style></head><body>
<h1>Runs</h1>
{% for model in models %}<p>{{ model }}</p>
{% endfor %}<p class="soft">Each verdict opens the executed notebook, with its figures and sound. Written {{ now }}.</p>
{% macro cell(run) %}<a class="verdict {{ run.tone }}" href="{{ run.link | urlencode }}">{{ run.verdict }}</a>
<small>{% if run.seconds is not none %}{{ run.seconds }} s{% endif %}</small>{% endmacro %}
<div class="scroll"><table class="stages"><tr><th></th>{% for stage in stages %}<th>{{ stage }}</th>{% endfor %}</tr>
{% for language, name in languages %}<tr><th>{{ name }}<br><small>{{ language }}</small></th>
{% for stage in stages %}<td>{% if (language, stage) in table %}{% set run = table[language, stage] %}{{ cell(run) }}
<br><small>{{ run.model }}</small>
{% if run.error %}<br><small class="bad">{{ run.error }}</small>{% endif %}
{% if run.metrics %}<dl>
{%- for key, value in run.metrics %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>{% endif %}
{% else %}<small>not run</small>{% endif %}</td>{% endfor %}</tr>{% endfor %}
</table></div>
{% if older %}<h2>Other runs</h2><div class="scroll"><table class="runs">
<tr><th>started</th><th>language</th><th>stage</th><th>verdict</th><th>on</th><th>run</th></tr>
{% for run in older %}<tr><td>{{ run.when }}</td><td>{{ run.language }}</td><td>{{ run.stage }}</td>
<td>{{ cell(run) }}</td><td>{{ run.model }}</td><td><small>{{ run.dir.name }}</small></td></tr>{% endfor %}
</table></div>{% endif %}
</body></html>
"""


def export_html(notebook) -> Path:
    """Return the HTML page made beside an executed notebook; it stands alone, with nothing loaded from elsewhere."""
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    notebook = Path(notebook)
    content = nbformat.read(notebook, as_version=4)
    record = read_json(notebook.with_name("run.json"))
    content.metadata["title"] = " · ".join(filter(None, [record.get("stage", notebook.stem), record.get("language")]))
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"run.html.j2": _NOTEBOOK})], template_file="run.html.j2", embed_images=True
    )
    page, _ = exporter.from_notebook_node(content)
    return _write(notebook.with_suffix(".html"), page)


def build_index(runs_dir, current=()) -> Path:
    """Return runs_dir/index.html, written anew: languages by stages, each with verdict, seconds, metrics and its page.

    A cell shows the run of `current` (folders) of its language and stage, otherwise the newest; the others are listed
    below. A run counts as done by its marker only; one that failed or was cut short is shown as that, in red.
    """
    from jinja2 import Environment

    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    runs = [_describe_run(path.parent, runs_dir) for path in runs_dir.glob("*/*/*/run.json")]
    runs.sort(key=lambda run: (run["dir"] in set(current), run["started"]), reverse=True)
    table, older = {}, []
    for run in runs:
        if table.setdefault((run["language"], run["stage"]), run) is not run:
            older.append(run)
    languages = [(code, _name_language(code)) for code in sorted({language for language, _ in table})]
    page = Environment(autoescape=True).from_string(_INDEX)
    return _write(runs_dir / "index.html", page.render(
        stages=STAGES, languages=languages, table=table, models=_describe_models({run["model"] for run in runs}),
        older=sorted(older, key=lambda run: -run["started"]), now=time.strftime("%Y-%m-%d %H:%M"),
    ))  # fmt: skip


def _describe_run(folder, runs_dir):
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    done = (folder / "done.json").is_file()
    if done:
        verdict = str(metrics.get("verdict", "done"))
        tone = {"go": "good", "stop": "mixed", "unclear": "mixed"}.get(verdict.split(":")[0], "plain")
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
        "link": (folder.relative_to(runs_dir) / page).as_posix(),
        "started": record.get("started", 0),
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("started", 0))),
        "seconds": round(record["seconds"]) if "seconds" in record and verdict != "running" else None,
        "model": params.get("base_model") or params.get("codec_model") or "",
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
