"""What the tests share: an environment without a network, and a small project of its own to run things in."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest

from csm_nb.processes import count_cores

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))

ROOT = Path(__file__).resolve().parents[1]


def write_notebook(path, parameters, *cells):
    """Write a notebook: a parameters cell, then code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)])
    notebook.cells[0].metadata.tags = ["parameters"]
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path):
    """Return a project with the machinery of runs, tiny notebooks 00 to 02, parameters for da and sv, and a "model"."""
    package = tmp_path / "csm_nb"
    shutil.copytree(ROOT / "csm_nb", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "work.py").write_text("from csm_nb import helper\n")
    (package / "helper.py").write_text("VALUE = 1\n")
    (package / "unused.py").write_text("VALUE = 1\n")
    common = [
        'language: str = "da"  # a language', "seed: int = 0", 'base_model: str = "models/base"',
        'device: str = "auto"', "lr: float = 1.0e-3", "codebooks: list = [1, 2]", 'runs_dir: str = "runs"',
    ]  # fmt: skip
    imports = "from csm_nb import work\nfrom csm_nb.runs.folders import find_adapter, finish_run, open_run"
    finish = 'finish_run(run, {"score": 0.5}, "go")'
    make_adapter = 'path = run.dir / "adapter"\npath.mkdir(exist_ok=True)\n'
    make_adapter += '(path / "adapter_config.json").write_text(str(seed))'
    own = {
        "00_mimi_sanity": (['audio: str = ""', "clips: int = 3"], "print(clips)"),
        "01_anchor": ([], make_adapter),
        "02_synthetic": (['init_adapter: str = "01_anchor"'], "print(find_adapter(init_adapter, run))"),
    }
    for stage, (lines, cell) in own.items():
        cells = ["\n".join(common + lines), imports, f'run = open_run("{stage}", globals())', cell, finish]
        write_notebook(tmp_path / "notebooks" / f"{stage}.ipynb", *cells)
    for name, text in {"da": "language: da", "sv": "language: sv", "mini": "lr: 2.0e-3"}.items():
        (tmp_path / "params").mkdir(exist_ok=True)
        (tmp_path / "params" / f"{name}.yaml").write_text(text + "\n")
    (tmp_path / "models" / "base").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "processor_config.json"):
        (tmp_path / "models" / "base" / name).write_text("{}")
    (tmp_path / "models" / "base" / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return tmp_path
