"""The notebooks for JupyterLab with the values of `make run` in them: `python -m csm_nb.runs.lab --langs da --profile mini`."""

import argparse
import json
import os
import sys
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from csm_nb import hub, paths
from csm_nb.languages import get_language
from csm_nb.paths import STAGES, resolve_path, show_path
from csm_nb.provenance import hash_value
from csm_nb.recipe import ParameterError, pick_fields
from csm_nb.runs.pages import build_index, render
from csm_nb.runs.params import check_params, find_params, load_params, read_cell

PLACE = "runs/lab"  # below the project's root
MARK = "csm_nb_prepared"  # in a notebook's metadata: the hash of its cells as they were prepared
ASKS = dict(zip(STAGES, (  # as the README has it
    "what does the codec keep of melody, voicing, sounds, and of stød (Danish creak) or tonal accent?",
    "does an adapter learn English with the accent of the language?",
    "does it go on with synthetic speech in the language?",
    "does it learn your corpus? (without one, a synthetic voice that no stage before has used)",
    "which language is heard, and is it understood: base, adapters, reference audio",
    "spelling or phonemes (IPA), at equal steps?",
), strict=True))  # fmt: skip


def prepare_notebooks(language: str, profile: str = "mini", place=PLACE) -> list[Path]:
    """Return the notebooks of all stages, each with the values of a language and a profile in a cell under its parameters.

    They are those that `make run` executes, by the same hand (papermill), in <place>/<profile>/<language>/: what is run in
    them is the run of `make run`, and a value that is changed in that cell holds. One that was edited stays as it is; the
    others follow notebooks/ and the values, and keep what was run in them where those are the same. Raises ParameterError for an
    unknown language or profile.
    """
    values, origins = load_params(find_params(language, profile))
    folder = paths.ROOT / place / Path(profile).stem / language
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for stage in STAGES:
        params = check_params(stage, values | {"language": language}, origins)
        if "recipe" in params:  # what is given, to be changed there; the notebook's table shows all of it
            params["recipe"] = pick_fields(values.get("recipe", {}), stage)
        notebook = load_notebook_node(str(paths.NOTEBOOKS / f"{stage}.ipynb"))
        notebook = parameterize_notebook(notebook, params, report_mode=False)
        notebook.metadata[MARK] = _hash_cells(notebook)
        path = folder / f"{stage}.ipynb"
        if _is_edited(path):
            print(f"{show_path(path)} was edited and stays as it is; delete it to have it anew")
        elif _read_mark(path) != notebook.metadata[MARK]:
            nbformat.write(notebook, path)
        made.append(path)
    return made


def write_start(languages, profile: str = "mini", place=PLACE) -> Path:
    """Return the page where JupyterLab begins, <place>/<profile>/START.md: what to open in which order, and what is in force.

    Its links are relative, and a click in the preview opens them in Lab. The index of the runs is written anew, so that it is
    there before the first one.
    """
    start = paths.ROOT / place / Path(profile).stem / "START.md"
    start.parent.mkdir(parents=True, exist_ok=True)
    languages, files = list(dict.fromkeys(languages)), {}
    for language in languages:
        own, sizes = find_params(language, profile)
        values, origins = load_params((own, sizes))
        for file in (sizes, own):
            said = [key for key in values if origins[key] == show_path(file) and key != "language"]
            files[show_path(file)] = file, [(key, json.dumps(values[key], ensure_ascii=False)) for key in said]
    runs_dir = resolve_path(values.get("runs_dir", read_cell(STAGES[0])["runs_dir"].default))
    text = render("start.md",
        languages=[{"code": code, "name": get_language(code).name} for code in languages], stages=list(ASKS.items()),
        runs_dir=show_path(runs_dir), index=_link(build_index(runs_dir).with_suffix(".md"), start),
        profile="" if profile == "mini" else f" PROFILE={profile}",
        files=[(name, _link(file, start), said) for name, (file, said) in files.items()],
    )
    start.write_text(text, encoding="utf-8")
    return start


def _link(path, page):
    """Return the way from a page to a file, as a link; "" for a file that JupyterLab cannot open, outside the project."""
    inside = path.is_relative_to(paths.ROOT)
    return Path(os.path.relpath(path, page.parent)).as_posix().replace(" ", "%20") if inside else ""


def _hash_cells(notebook):
    return hash_value([cell.source for cell in notebook.cells])


def _read_mark(path):
    return nbformat.read(path, as_version=4).metadata.get(MARK) if path.is_file() else None


def _is_edited(path):
    if not path.is_file():
        return False
    try:
        return _read_mark(path) != _hash_cells(nbformat.read(path, as_version=4))
    except Exception:  # half a file, or none of a notebook: whose it is cannot be told
        return True


def main(arguments=None) -> int:
    """Prepare the notebooks of the languages that are given, and print the page where JupyterLab begins; 2 if one is wrong."""
    parser = argparse.ArgumentParser("python -m csm_nb.runs.lab", description=__doc__.partition(":")[0])
    parser.add_argument("--langs", nargs="+", required=True, metavar="CODE")
    parser.add_argument("--profile", default="mini")
    options = parser.parse_args(arguments)
    try:
        for language in options.langs:
            prepare_notebooks(language, options.profile)
        start = write_start(options.langs, options.profile)
    except (ParameterError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show_path(start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
