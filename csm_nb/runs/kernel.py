"""A run made by hand, in JupyterLab or by papermill alone: where its notebook is, which cells ran, and why one failed."""

import os
import time
from pathlib import Path

import psutil

from csm_nb.paths import show_path
from csm_nb.provenance import read_json, write_json

_WATCHING = []  # what this kernel calls after each cell, on behalf of the run that it opened last


def find_notebook() -> str:
    """Return the notebook that this kernel runs, as show_path has it; "" where nothing tells.

    Papermill tells its kernel nothing: the output is the last notebook on the command line of the process that started it.
    JupyterLab does, in JPY_SESSION_NAME (jupyter_server 2), which a papermill that is started in a cell inherits.
    """
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    if any(Path(word).name == "papermill" for word in words):
        names = [word for word in words if word.endswith(".ipynb")][-1:]
    else:
        names = [os.environ.get("JPY_SESSION_NAME", "")]
    places = [Path(start, name) for name in names for start in (os.environ.get("PWD", ""), "")]  # --cwd has moved the kernel
    return next((show_path(place.absolute()) for place in places if place.suffix == ".ipynb" and place.is_file()), "")


def watch_cells(record: Path) -> None:
    """Note in a run's `record` (run.json) its notebook, and until it is done which cells ran, and of one that failed the reason.

    Run again without an error, that cell sets the status back to running. Outside IPython there are no cells to watch.
    """
    from IPython import get_ipython

    write_json(record, read_json(record) | {"notebook": find_notebook()})
    shell = get_ipython()
    if shell is None:
        return

    def note_cell(result):
        content = read_json(record)
        if not content:  # the folder was removed
            return
        cell, error = result.info.cell_id, result.error_before_exec or result.error_in_exec
        name = cell or result.info.raw_cell
        if content["status"] == "done":
            _stop_watching(shell)
        elif error:
            content["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            content["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            content |= {"failed_cell": name, "seconds": round(time.time() - content["started"], 1)}
        elif content.get("failed_cell") == name:
            content = {key: value for key, value in content.items() if key not in ("failed_cell", "error", "seconds")}
            content["status"] = "running"
        if cell:
            content["cells"] = list(dict.fromkeys([*content.get("cells", []), cell]))
        write_json(record, content)

    _stop_watching(shell)
    shell.events.register("post_run_cell", note_cell)
    _WATCHING.append(note_cell)


def _stop_watching(shell):
    while _WATCHING:
        shell.events.unregister("post_run_cell", _WATCHING.pop())
