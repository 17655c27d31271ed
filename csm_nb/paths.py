"""Where things are: the root of the project, its notebooks and stages, and paths as people write and read them."""

from pathlib import Path

from csm_nb.clean import find_file

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
TRAINING = ("01_anchor", "02_synthetic", "03_adapter")  # the stages that leave an adapter
STAGES = ("00_mimi_sanity", "01_anchor", "02_synthetic", "03_adapter", "04_confusion", "05_phonemes")


def resolve_path(path) -> Path:
    """Return an absolute path: `path` itself if it is absolute, else below the project's root, whatever the cwd.

    A name with accents is found in either Unicode form (find_file).
    """
    return find_file(ROOT / Path(path).expanduser())


def show_path(path) -> str:
    """Return `path` as messages and run.json show it: below the project's root relative to it, otherwise absolute."""
    path = resolve_path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
