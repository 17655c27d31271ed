"""Every notebook keeps the rules, and runs from its first to its last cell at the smallest size."""

import ast
import statistics
import subprocess
import sys

import nbformat
import papermill
import pytest
import yaml
from conftest import ROOT
from test_report import LOADS

from csm_nb import recipe
from csm_nb.corpora import tokens
from csm_nb.corpora.split import split_rows
from csm_nb.csm import adapters
from csm_nb.csm.load import load_base
from csm_nb.manifest import read_manifest, write_manifest
from csm_nb.paths import NOTEBOOKS, PACKAGE, STAGES, resolve_path
from csm_nb.provenance import read_json
from csm_nb.runs import __main__
from csm_nb.runs.params import read_cell
from csm_nb.synth import corpus
from csm_nb.text import sentences
from csm_nb.train import select

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(path):
    """Return (parameters cells, other code cells) of a notebook."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in cells]
    split = [[cell for cell, tag in zip(cells, tagged, strict=True) if tag is wanted] for wanted in (True, False)]
    return split[0], split[1]


def test_there_is_one_notebook_for_each_stage():
    assert tuple(path.stem for path in PATHS) == STAGES


@every_notebook
def test_parameters_are_annotated_literals_each_with_a_comment(path):
    found = papermill.inspect_notebook(str(path))  # what papermill's own users see must be what `params` checks
    ours = read_cell(path.stem)
    assert {name: (p["inferred_type_name"], ast.literal_eval(p["default"])) for name, p in found.items()} == {
        name: (parameter.type, parameter.default) for name, parameter in ours.items()
    }
    assert all(parameter["help"] for parameter in found.values())
    assert {"language", "seed", "device", "runs_dir"} <= ours.keys()


@every_notebook
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    assert not {"papermill", "widgets"} & notebook.metadata.keys()
    assert not [cell for cell in notebook.cells if {"papermill", "execution", "ExecuteTime"} & cell.metadata.keys()]


@every_notebook
def test_cells_are_short_and_define_nothing(path):
    tagged, cells = code_cells(path)
    assert len(tagged) == 1
    lines = [len(cell.source.splitlines()) for cell in cells]
    assert max(lines) <= 15 and statistics.median(lines) <= 4
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    assert not [node for cell in cells for node in ast.walk(ast.parse(cell.source)) if isinstance(node, definitions)]


@every_notebook
def test_a_run_is_opened_under_the_notebook_s_name_and_finished_in_the_last_cell(path):
    cells = code_cells(path)[1]
    assert f'open_run("{path.stem}", globals())' in "".join(cell.source for cell in cells)
    assert "finish_run(" in cells[-1].source or "stage.finish(run" in cells[-1].source


@every_notebook
def test_every_model_is_loaded_where_the_parameter_device_says(path):
    sources = [cell.source for cell in code_cells(path)[1]]
    if any("stage.load_base(run)" in source for source in sources):
        sources.append((PACKAGE / "teaching" / "stage.py").read_text(encoding="utf-8"))
    loads = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr in ("load_codec", "load_base", "load_lid", "load_asr")]
    assert loads
    for load in loads:
        assert "run.device" in map(ast.unparse, load.args) or ast.unparse(load) == "stage.load_base(run)", ast.unparse(load)


@every_notebook
def test_only_the_run_says_what_its_parameters_are_once_it_is_open(path):
    statements = [(number, node) for number, cell in enumerate(code_cells(path)[1]) for node in ast.parse(cell.source).body]
    opened = next(i for i, (_, node) in enumerate(statements) if "open_run(" in ast.unparse(node))
    names = [(number, name) for number, node in statements[opened + 1 :] for name in ast.walk(node) if isinstance(name, ast.Name)]
    assigned = {(number, name.id) for number, name in names if isinstance(name.ctx, ast.Store)}
    parameters = read_cell(path.stem)
    read = {(number, name.id) for number, name in names if isinstance(name.ctx, ast.Load) and name.id in parameters}
    assert read - assigned == set()  # (code cell, global): run.<global> is what ran


@every_notebook
def test_code_cells_fit_the_page(path):
    tagged, cells = code_cells(path)
    assert len(tagged[0].source.splitlines()) <= 24  # 03 says how a corpus is cleaned
    assert [line for cell in tagged + cells for line in cell.source.splitlines() if len(line) > 100] == []


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return the settings that keep these runs and their adapters together and out of the checkout."""
    folder = tmp_path_factory.mktemp("runs")
    return {"runs_dir": str(folder / "runs"), "adapters_dir": str(folder / "models")}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_runs_at_the_smallest_size(stage, places, capsys):
    settings = [f"{key}={value}" for key, value in places.items() if key in read_cell(stage)]
    code = __main__.main(["--langs", "da", "--profile", "test", "--stages", stage, "--set", *settings])
    assert code == 0, "".join(capsys.readouterr())
    (done,) = (ROOT / places["runs_dir"]).glob(f"da/{stage}/*/done.json")
    assert read_json(done.with_name("metrics.json"))["verdict"]
    profile = yaml.safe_load((ROOT / "params" / "test.yaml").read_text()) | places
    params = read_json(done.with_name("run.json"))["params"]
    wanted = recipe.pick_fields(profile.pop("recipe"), stage)
    assert all(params[key] == profile[key] for key in profile.keys() & params.keys())
    assert stage in (STAGES[0], STAGES[4]) or wanted.items() <= params["recipe"].items()
    assert not LOADS.findall(done.with_name("notebook.html").read_text())


@pytest.mark.parametrize("stage", STAGES[1:4])
def test_figures_of_a_training_are_of_the_weights_that_it_saved(stage, places):
    (done,) = (ROOT / places["runs_dir"]).glob(f"da/{stage}/*/done.json")  # of the test above
    metrics, params = (read_json(done.with_name(f"{name}.json")) for name in ("metrics", "run"))
    model, processor = load_base("models/csm-mini", "cpu")
    rows = tokens.read_tokens(resolve_path(params["used"]["tokens"][0]), model.codec_model)
    how = recipe.read_recipe(params["params"])
    saved = adapters.load_adapter(model, done.parent / "adapter").eval()
    assert select.measure_clips(saved, processor, split_rows(rows)[1], how).mean() == pytest.approx(
        metrics["last_loss"], abs=1e-3)
    card = (done.parent / "adapter" / "README.md").read_text()
    assert all(f"| {name} | {metrics[name]} |" in card for name in ("verdict", "last_loss", "steps", "chosen_because"))
    assert stage == STAGES[1] or f"| cer | {metrics['cer']} |" in card


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Return the manifest of a small corpus of three speakers whose names CSM has never heard of."""
    prompts, _ = sentences.draw_prompts("sv", 10)
    manifest = corpus.make_corpus(prompts, "sv", tmp_path_factory.mktemp("corpus"))
    rows = read_manifest(manifest)
    names = ("p0042", "Åse Lind", "spk-7")
    return str(write_manifest([row | {"speaker_id": names[i % 3]} for i, row in enumerate(rows)], manifest))


CODEC_BACKEND = next(name for name in read_cell(STAGES[0]) if name.endswith("backend"))
FRESH = {"init_adapter": "", "keep_checkpoints": 1}


@pytest.mark.parametrize(("language", "stages", "values"), [
    ("nl", ["04_confusion"], {}),  # compared with English, the base's own language; nothing is trained
    ("pl", ["03_adapter", "04_confusion"], FRESH | {"method": "full"}),
    ("da", ["00_mimi_sanity"], {CODEC_BACKEND: "moshi"}),
    ("no", ["02_synthetic"], FRESH | {"dtype": "bfloat16"}),  # what a GPU trains in, with a text table as in the profile
    ("sv", ["03_adapter"], FRESH | {"corpus": "foreign"}),
], ids=["nl", "pl full", "moshi", "bfloat16", "foreign speakers"])  # fmt: skip
def test_a_path_beside_the_default_runs_to_its_end(language, stages, values, tmp_path, foreign, capsys):
    values = values | {"runs_dir": str(tmp_path / "runs"), "adapters_dir": str(tmp_path / "models")}
    known = {name for stage in stages for name in read_cell(stage)}
    settings = [f"{key}={foreign if value == 'foreign' else value}" for key, value in values.items() if key in known]
    code = __main__.main(["--langs", language, "--profile", "test", "--stages", *stages, "--set", *settings])
    assert code == 0, "".join(capsys.readouterr())
    assert [read_json(done)["verdict"] != "" for done in (tmp_path / "runs").glob("*/*/*/done.json")] == [True] * len(stages)


def test_plain_papermill_takes_the_recipe_of_the_last_file_or_of_the_call_whole(tmp_path):
    command = [sys.executable, "-m", "papermill", "--prepare-only", "notebooks/03_adapter.ipynb", tmp_path / "out.ipynb"]
    command += ["-f", "params/da.yaml", "-f", "params/mini.yaml"]
    own_rank = ["-y", "recipe: {rank: 16}"]
    for more, expected in (([], {"rank": 32, "lr": 1e-3, "steps": 100}), (own_rank, {"rank": 16, "epochs": 3})):
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, check=True)
        values = {}
        exec("\n".join(cell.source for cell in code_cells(tmp_path / "out.ipynb")[1][:1]), values)  # the cell that it injects
        own = recipe.pick_fields(values["recipe"], "03_adapter")
        assert expected.items() <= vars(recipe.Recipe(**own)).items() and ("alpha" in own) == (not more)


def test_plain_papermill_runs_a_notebook_too(places, tmp_path):
    command = [sys.executable, "-m", "papermill", "notebooks/00_mimi_sanity.ipynb", tmp_path / "out.ipynb"]
    command += ["-f", "params/da.yaml", "-f", "params/test.yaml", "-p", "runs_dir", tmp_path / "runs"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list((tmp_path / "runs").glob("da/00_mimi_sanity/*/done.json"))
