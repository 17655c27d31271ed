"""What README, docs/, cards and notebooks name exists: targets of make, modules and options, parameters, files, rooms."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from functools import cache

import pytest
import yaml
from conftest import ROOT

from csm_nb.paths import STAGES
from csm_nb.recipe import ParameterError, Recipe
from csm_nb.runs.__main__ import parse_arguments
from csm_nb.runs.params import find_params, load_params, read_cell

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("models/*-mini/README.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROGRAMS = ("make", "python", "python3", "torchrun", "papermill", "tensorboard")
MADE = ("runs", "data", "models/lora_", "models/full_", "models/csm-1b", "my/", "~", "/")  # by runs, or the reader's own
FILE = re.compile(r"[\w.-]+\.(?:py|md|yml|toml|lock|cff|jpg)")


@cache
def list_files():
    """The names of the files of the checkout; without git, of what lies there."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.split("\n") if found.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]


@cache
def list_parameters():
    return {name for stage in STAGES for name in read_cell(stage)} | {field.name for field in fields(Recipe)}


def list_code(text):
    """(commands, other words) of a page: the lines of its code blocks, and what stands in backticks."""
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = [*fenced, *re.findall(r"(?:^    .*\n?)+", prose, re.M)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", prose, flags=re.M))]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").split("\n")] + spans
    commands = [line for line in lines if line.split(" ")[0].split("/")[-1] in PROGRAMS]
    return commands, [span for span in spans if span not in commands]


def find_fault_of_command(line):
    """What is wrong with a command line of the docs, or ""."""
    words = shlex.split(line, comments=True)
    program, words = words[0].split("/")[-1], words[1:]
    if program == "make":
        return find_fault_of_make(words)
    name = next((word for word in words if not word.startswith("-") and "/" in word or word.startswith("csm_nb")), "")
    if not name:
        return ""
    path = ROOT / name
    if name.startswith("csm_nb"):
        path = ROOT / name.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return "" if name.startswith(MADE) else f"no {'module' if name.startswith('csm_nb') else 'file'} {name}"
    source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    options = [word for word in words[words.index(name) :] if word.startswith("--")] if source else []
    return ", ".join(f"{name} has no {option}" for option in options if f'"{option}"' not in source)


def find_fault_of_make(words):
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(["make", "-n", "-o", ".venv/.csm-nb-setup", *words], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if result.returncode:
        return f"make {' '.join(words)}: {result.stdout.strip().splitlines()[-1]}"
    if "-m csm_nb.runs --" not in result.stdout:
        return ""
    try:
        options = parse_arguments(shlex.split(result.stdout.replace("\\\n", " ").split("-m csm_nb.runs ")[1]))
        for language in options.langs:
            load_params(find_params(language, options.profile), options.set)
    except (ParameterError, SystemExit) as error:
        return f"make {' '.join(words)}: {error}"
    return ""


def find_fault_of_word(word):
    """What is wrong with something in backticks: a parameter with a value, a variable of make, a module, a file or folder."""
    if pair := re.fullmatch(r"([a-z_]+)=\S*", word):
        return "" if pair[1] in list_parameters() else f"no parameter {pair[1]}"
    if pair := re.fullmatch(r"([A-Z]{3,})=.*", word):
        return "" if re.search(rf"^{pair[1]}\s*\??=", (ROOT / "Makefile").read_text(), re.M) else f"no variable {pair[1]}"
    if re.fullmatch(r"csm_nb(\.\w+)+", word):
        place, _, last = word.replace(".", "/").rpartition("/")
        found = (ROOT / place / last).is_dir() or (ROOT / place / f"{last}.py").is_file()
        path = ROOT / f"{place}.py"  # of a function
        found = found or path.is_file() and re.search(rf"^(def|class) {last}\b", path.read_text(encoding="utf-8"), re.M)
        return "" if found else f"no module {word}"
    if word.startswith(MADE) or "<" in word or "{" in word or " " in word:
        return ""
    if FILE.fullmatch(word):
        return "" if any(name.split("/")[-1] == word for name in list_files()) else f"no file {word}"
    if "*" in word and word.split("/")[0] in {path.name for path in ROOT.iterdir()}:
        return "" if any(ROOT.glob(word)) else f"nothing is named {word}"
    if re.fullmatch(r"[\w-]+(/[\w.-]+)*/?", word) and ("/" in word) and "*" not in word:
        rooms = [ROOT, ROOT / "csm_nb"]
        known = any((room / word).exists() for room in rooms)
        return "" if known or not any((room / word.split("/")[0]).exists() for room in rooms) else f"no {word}"
    return ""


def find_faults(text, folder=ROOT):
    """All that a page names and that is not there."""
    commands, words = list_code(text)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    faults = [*map(find_fault_of_command, commands), *map(find_fault_of_word, words)]
    faults += [f"no {link} to link to" for link in links if not (folder / link).exists()]
    return [fault for fault in faults if fault]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert find_faults(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_what_a_notebook_s_prose_names_exists(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    prose = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert find_faults(prose, notebook.parent) == []


@pytest.mark.parametrize(("text", "fault"), [
    ("    make rnu", "No rule"),
    ("    make run LANGUAGES=da", "make run takes no LANGUAGES"),
    ("    make run LANGS=xx", "no language 'xx'"),
    ("    make run LANGS=da PROFILE=nini", "no profile 'nini'"),
    ("    make run LANGS=da STAGES=00_sanity", "make run LANGS=da STAGES=00_sanity"),
    ("say `make run LANGS=da SET='rnak=32'` now", "unknown parameter 'rnak'"),
    ("    make run LANGS=da \\\n      SET='rnak=32'", "unknown parameter 'rnak'"),
    ("```bash\nmake rnu\n```", "No rule"),
    ("`python -m csm_nb.run --langs no`", "no module csm_nb.run"),
    ("`python -m csm_nb.runs --languages no`", "csm_nb.runs has no --languages"),
    ("    .venv/bin/python bench/speed.py", "no file bench/speed.py"),
    ("`python bench/codec.py --loud`", "bench/codec.py has no --loud"),
    ("    .venv/bin/papermill notebooks/00_sanity.ipynb runs/out.ipynb", "no file notebooks/00_sanity.ipynb"),
    ("with `four_bits=true`", "no parameter four_bits"),
    ("with `CORPSU=my`", "no variable CORPSU"),
    ("in `csm_nb/prove.py`", "no csm_nb/prove.py"),
    ("in `csm_nb.prove`", "no module csm_nb.prove"),
    ("by `csm_nb.csm.load_base`", "no module csm_nb.csm.load_base"),
    ("in `prove.py`", "no file prove.py"),
    ("in `train/prove.py`", "no train/prove.py"),
    ("all `models/*-midi/README.md`", "nothing is named"),
    ("see [it](docs/nowhere.md)", "no docs/nowhere.md"),
])  # fmt: skip
def test_a_name_that_is_stale_is_found(text, fault):
    assert fault in " ".join(find_faults(text))


@pytest.mark.parametrize("text", [
    "`runs/da/00_mimi_sanity`", "`data/tokens/<fingerprint>/`", "`models/lora_da`", "`kyutai/mimi`", "`owner/name`", "`rank`",
    "`make run LANGS=da SET='rank=32'`", "`method=full`", "`csm_nb.csm.load.load_base`",
    "`train/loss.py`", "`loss.py`", "`notebooks/`", "`models/*-mini`",
])  # fmt: skip
def test_what_is_there_or_made_by_runs_is_no_fault(text):
    assert find_faults(text) == []


def test_the_map_of_the_house_names_every_file_of_every_room_and_no_other():
    rows = re.findall(r"^\| (?:`(\w+)/`|\(root\)) \|[^|]*\| (.*) \|$", (ROOT / "docs" / "house.md").read_text("utf-8"), re.M)
    mapped = {room: set(re.findall(r"`([^`]*)`", files)[0].split()) for room, files in rows}
    for room, names in mapped.items():
        here = {path.stem for path in (ROOT / "csm_nb" / room).glob("*.py")} - {"__init__", "__main__"}
        assert names == here, f"docs/house.md, {room or 'root'}: not there {names - here}, not on the map {here - names}"


def test_the_citation_can_be_read_and_the_licence_is_the_one_that_is_declared():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "version", "date-released"}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_the_readme_s_example_uses_names_that_are_there():
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    tree = ast.parse(example)
    modules = {}
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        for name in (alias.name for alias in node.names):
            found = getattr(importlib.import_module(node.module), name, None)
            modules[name] = found or importlib.import_module(f"{node.module}.{name}")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = [node for node in used if node.value.id in modules]
    assert used and all(hasattr(modules[node.value.id], node.attr) for node in used)
