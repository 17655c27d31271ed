"""The project is found from the package beside it, and from where one works when the package is installed as a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from csm_nb.paths import find_project


def make_folders(place, *names):
    for name in names:
        (place / name).mkdir(parents=True)
    return place


def test_a_package_in_its_checkout_finds_that_checkout_from_wherever_one_works(tmp_path):
    checkout = make_folders(tmp_path / "checkout", "csm_nb", "notebooks", "params")
    other = make_folders(tmp_path / "other", "notebooks", "params")
    assert find_project(checkout / "csm_nb", other) == checkout


def test_an_installed_package_finds_the_nearest_project_above_the_working_directory(tmp_path):
    package = make_folders(tmp_path / "site-packages", "csm_nb") / "csm_nb"
    outer = make_folders(tmp_path / "work", "notebooks", "params")
    inner = make_folders(outer / "mine", "notebooks", "params")
    make_folders(outer / "half", "notebooks/deep")  # without params/ it is somebody else's folder of notebooks
    assert find_project(package, inner / "notebooks") == inner
    assert find_project(package, outer / "half" / "notebooks" / "deep") == outer


def test_an_installed_package_outside_a_project_says_where_it_looked_and_what_to_do(tmp_path):
    package = make_folders(tmp_path, "csm_nb", "elsewhere") / "csm_nb"
    with pytest.raises(FileNotFoundError, match="elsewhere nor a folder above it holds notebooks/ and params/. Change into"):
        find_project(package, tmp_path / "elsewhere")


@pytest.mark.timeout(300)
def test_a_wheel_installed_elsewhere_runs_a_stage(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    site.mkdir()
    for name in ("csm_nb", "notebooks", "params", "models"):
        target = source if name == "csm_nb" else work
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)
    command = [sys.executable, "-m", "csm_nb.runs", "--langs", "da", "--profile", "test", "--stages", "00_mimi_sanity"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    result = subprocess.run(command, cwd=work / "notebooks", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (done,) = (work / "runs").glob("**/00_mimi_sanity/*/done.json")
    assert (done.parent / "notebook.html").is_file() and "no HTML page" not in result.stdout
