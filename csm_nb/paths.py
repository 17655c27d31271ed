"""Where things are: the root of the project, its notebooks and stages, and paths as people write and read them."""

from pathlib import Path

from csm_nb.clean import find_file


def find_project(package: Path, start: Path) -> Path:
    """Return the project's root: the folder above `package` if it holds notebooks/, else the nearest from `start` upwards.

    Those have to hold notebooks/ and params/: a package that was installed as a wheel has neither beside it. Raises
    FileNotFoundError where there is no such folder.
    """
    if (package.parent / "notebooks").is_dir():
        return package.parent
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise FileNotFoundError(
        f"csm_nb is installed in {package}, and no project was found: neither {start} nor a folder above it holds notebooks/ and "
        "params/. Change into a checkout of csm-nb, or copy its folders notebooks, params and models to where you work"
    )


PACKAGE = Path(__file__).resolve().parent
ROOT = find_project(PACKAGE, Path.cwd())
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
