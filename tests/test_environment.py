"""pyproject.toml, requirements.lock and environment.yml say the same, and what they install works together."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = [Requirement(line) for line in LOCK.splitlines()]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
NAMED = PROJECT["project"]["dependencies"] + EXTRAS["dev"] + EXTRAS["filters"] + EXTRAS["serve"]  # dev takes these two along
DIRECT = [one for one in map(Requirement, NAMED) if one.name != PROJECT["project"]["name"]]
OVERRIDES = [Requirement(line) for line in PROJECT["tool"]["uv"]["override-dependencies"]]


def pins(name):
    """Return the versions that the lock pins for a package (more than one where they differ by Python version)."""
    return [next(iter(pin.specifier)).version for pin in LOCKED if pin.name == name]


@pytest.mark.parametrize("requirement", DIRECT + OVERRIDES, ids=str)
def test_lock_pins_every_dependency_within_its_range(requirement):
    assert pins(requirement.name)
    assert all(requirement.specifier.contains(version) for version in pins(requirement.name))


def test_lock_holds_exact_versions_and_no_address():
    assert all([item.operator for item in pin.specifier] == ["=="] and not pin.url for pin in LOCKED)
    assert not re.search(r"://|^-|@", LOCK, re.MULTILINE)


def test_direct_dependencies_are_installed_as_locked():
    for requirement in DIRECT:
        assert Version(importlib.metadata.version(requirement.name)).public in pins(requirement.name), requirement.name


def test_conda_brings_python_and_system_libraries_and_leaves_packages_to_the_lock():
    assert CONDA["channels"] == ["conda-forge"]
    assert all(isinstance(entry, str) for entry in CONDA["dependencies"])  # a pip section would be a dict
    names = {re.split("[=<>]", entry)[0] for entry in CONDA["dependencies"]}
    assert {"python", "uv", "make", "espeak-ng", "libsndfile", "ffmpeg"} <= names
    assert not names & {pin.name for pin in LOCKED}


def test_conda_and_make_use_a_python_that_the_project_allows():
    (python,) = [entry.split("=")[1] for entry in CONDA["dependencies"] if entry.startswith("python=")]
    assert python in Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    makefile = (ROOT / "Makefile").read_text()
    assert f"PYTHON  ?= python{python}\n" in makefile and f"--python-version {python} " in makefile


def test_moshi_torchaudio_and_transformers_work_in_one_process():
    """moshi's own pins forbid these versions; a full-size Mimi, at random, shows that it runs on them all the same."""
    import torch
    import torchaudio
    import transformers
    from moshi.models import loaders

    mimi = loaders.get_mimi(None, num_codebooks=8)
    with torch.no_grad():
        codes = mimi.encode(torch.zeros(1, 1, 24_000))
        assert codes.shape == (1, 8, 13)  # 12.5 frames a second
        assert mimi.decode(codes).shape == (1, 1, 13 * 1920)
    assert torchaudio.functional.resample(torch.zeros(240), 24_000, 16_000).shape == (160,)
    assert transformers.CsmForConditionalGeneration.config_class is transformers.CsmConfig
