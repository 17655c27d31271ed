"""The notebooks for JupyterLab with the values of `make run` in them: `python -m csm_nb.runs.lab --langs da --profile mini`."""

import argparse
import sys
from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from csm_nb import hub, paths
from csm_nb.paths import STAGES, show_path
from csm_nb.provenance import hash_value
from csm_nb.recipe import ParameterError
from csm_nb.runs.params import check_params, find_params, load_params

PLACE = "runs/lab"  # below the project's root
MARK = "csm_nb_prepared"  # in a notebook's metadata: the hash of its cells as they were prepared


def prepare_notebooks(language: str, profile: str = "mini", place=PLACE) -> list[Path]:
    """Return the notebooks of all stages, each with the values of a language and a profile in a cell under its parameters.

    They are those that `make run` executes, by the same hand (papermill), in <place>/<profile>/<language>/: what is run in
    them is the run of `make run`, and a value that is changed in that cell holds. One that was edited stays as it is; the
    others follow the notebooks in notebooks/. Raises ParameterError for an unknown language or profile.
    """
    values, origins = load_params(find_params(language, profile))
    folder = paths.ROOT / place / Path(profile).stem / language
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for stage in STAGES:
        params = check_params(stage, values | {"language": language}, origins)
        notebook = load_notebook_node(str(paths.NOTEBOOKS / f"{stage}.ipynb"))
        notebook = parameterize_notebook(notebook, params, report_mode=False)
        notebook.metadata[MARK] = _hash_cells(notebook)
        path = folder / f"{stage}.ipynb"
        if _is_edited(path):
            print(f"{show_path(path)} was edited and stays as it is; delete it to have it anew")
        else:
            nbformat.write(notebook, path)
        made.append(path)
    return made


def _hash_cells(notebook):
    return hash_value([cell.source for cell in notebook.cells])


def _is_edited(path):
    if not path.is_file():
        return False
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception:  # half a file, or none of a notebook: whose it is cannot be told
        return True
    return notebook.metadata.get(MARK) != _hash_cells(notebook)


def main(arguments=None) -> int:
    """Prepare the notebooks of the languages that are given, and print where JupyterLab opens; 2 for wrong parameters."""
    parser = argparse.ArgumentParser("python -m csm_nb.runs.lab", description=__doc__.partition(":")[0])
    parser.add_argument("--langs", nargs="+", required=True, metavar="CODE")
    parser.add_argument("--profile", default="mini")
    options = parser.parse_args(arguments)
    try:
        made = [path for language in options.langs for path in prepare_notebooks(language, options.profile)]
    except (ParameterError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show_path(made[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
