"""The card of an adapter or model says what it is, and its example speaks as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from csm_nb import paths
from csm_nb.cards import name_licence, write_card, write_example
from csm_nb.csm.adapters import add_adapter, load_adapter, start_training, train_fully
from csm_nb.csm.load import BACKBONE_TABLE, DEPTH_TABLE, load_base
from csm_nb.csm.save import save_adapter, save_full
from csm_nb.csm.speakers import count_speakers, number_speakers, set_speakers
from csm_nb.paths import ROOT

RUN = """
import json, os, sys
from pathlib import Path
for number, (place, example, variables) in enumerate(json.loads(sys.argv[1])):
    os.chdir(place)
    os.environ.update(variables)
    names = {}
    exec(example, names)
    Path("speech.wav").rename(f"{sys.argv[2]}/{number}.wav")
    greedy = names["model"].generate(**names["inputs"], max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False)
    Path(f"{sys.argv[2]}/{number}.txt").write_text(str(greedy.tolist()))
"""  # one process for all of them: importing takes longer than speaking
SPEAKER = {"number": 7, "corpus": "anna/manifest.jsonl", "content": "c0ffee", "speaker": "Anna", "own": True}


def make_adapter(folder, card, base="models/csm-mini", std=0.02):
    torch.manual_seed(0)
    model, _ = load_base(base, "cpu")
    model = start_training(model, "lora", None, 4, 8, 0.0, mlp=True, text_embeddings=True,
                           speakers=[SPEAKER | {"clips": 12, "hours": 0.25}])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=std)
    return save_adapter(model, folder, card, base)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of its own, with an adapter and a fully trained model where 03 leaves them, and an adapter elsewhere."""
    root = tmp_path_factory.mktemp("project")
    (root / "models").mkdir()
    (root / "notebooks").mkdir()
    shutil.copytree(ROOT / "csm_nb", root / "csm_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "models/csm-mini").symlink_to(ROOT / "models/csm-mini")
    (root / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", root)
        make_adapter(root / "models/lora_no", {"data": "noise", "language": "no"})
        make_adapter(root.with_name("moved") / "lora_sv", {"language": "sv"}, std=0.03)
        torch.manual_seed(0)
        model, processor = load_base("models/csm-mini", "cpu")
        with torch.no_grad():
            for value in train_fully(model).parameters():
                value += 0.02 * value.std() * torch.randn_like(value) if value.requires_grad else 0
        save_full(model, processor, root / "models/full_no", {"licence": "CC0", "language": "no"}, "models/csm-mini")
    return root


def read_example(folder):
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_the_example_on_a_card_speaks_as_it_stands_from_the_project_s_root_and_from_anywhere(project):
    moved = project.with_name("moved") / "lora_sv"
    work = [(project, project / "models/lora_no", {}), (project / "elsewhere", project / "models/lora_no", {}),
            (project / "elsewhere", project / "models/full_no", {}), (moved.parent, moved, {}),
            (project / "elsewhere", moved, {"BASE": str(project / "models/csm-mini"), "ADAPTER": str(moved)})]
    tasks = json.dumps([(str(place), read_example(folder), variables) for place, folder, variables in work])
    environment = os.environ | {"PYTHONPATH": str(project)}
    result = subprocess.run([sys.executable, "-c", RUN, tasks, project], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("speech.wav: Jeg vet ikke hva det er.") == 3 and result.stdout.count("Jag vet inte") == 2
    for number in range(len(work)):
        info = soundfile.info(project / f"{number}.wav")
        assert info.samplerate == 24000 and 0.3 < info.duration < 20
    said = [(project / f"{number}.txt").read_text() for number in range(len(work))]
    model, processor = load_base("models/csm-mini", "cpu")
    inputs = processor("<|begin_of_text|>[7]Jeg vet ikke hva det er.<|end_of_text|>", return_tensors="pt")
    base = model.generate(**inputs, max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False)
    assert said[0] == said[1] and said[3] == said[4] and len({*said, str(base.tolist())}) == 4


def test_a_card_says_what_was_trained_on_what_and_by_which_commit(project):
    lines = (project / "models/lora_no/README.md").read_text().splitlines()
    table = dict(line.strip("| ").split(" | ") for line in lines if line[:2] == "| ")
    assert table["data"] == "noise" and table["licence"] == "of the data: not stated" and table["rank"] == "4"
    assert table["layers of depth_decoder"] == "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert re.match("[0-9a-f]{40}|unknown", table["csm-nb commit"])
    assert table["sampling rate"] == "24000 Hz" and table["speakers"] == "7 (12 clips, 0.25 h)"
    card = (project / "models/full_no/README.md").read_text()
    assert "| licence | CC0 |" in card and "rank" not in card and "library_name: transformers" in card


def test_a_card_names_speakers_by_number_only(project):
    card = (project / "models/lora_no/README.md").read_text()
    assert "Anna" not in card and "anna" not in card and "[7]" in card


def test_a_card_names_no_folder_of_this_machine(project, tmp_path):
    model, _ = load_base("models/csm-mini", "cpu")
    base = tmp_path / "csm-own"
    card = {"goes on from": ROOT / "runs/no/01_anchor/1/adapter", "data": str(tmp_path / "my/speech")}
    model = load_adapter(model, project / "models/lora_no")
    folder = save_adapter(model, tmp_path / "lora_no", card, str(base))
    text = (folder / "README.md").read_text()
    assert "| goes on from | runs/no/01_anchor/1/adapter |" in text and "| data | my/speech |" in text
    assert str(ROOT) not in text and str(tmp_path) not in text
    folder = save_adapter(model, tmp_path / "lora_no", card, str(ROOT / "models/csm-mini"))
    assert str(ROOT) not in (folder / "README.md").read_text() + (folder / "adapter_config.json").read_text()


@pytest.mark.parametrize(("base", "found"), [
    ("sesame/csm-copied", 'root / "models/csm-copied"'), ("sesame/csm-1b", '"sesame/csm-1b"'),
    ("models/csm-mini", 'root / "models/csm-mini"'), ("/somewhere/csm-own", '"csm-own"'),
])
def test_a_base_is_looked_for_where_it_lies(base, found, project, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", project)
    (project / "models/csm-copied").mkdir(exist_ok=True)
    write_card(tmp_path, tmp_path / "lora_no", {}, base, True, "0", (DEPTH_TABLE, BACKBONE_TABLE))
    assert f'base = os.environ.get("BASE", {found})\n' in (tmp_path / "README.md").read_text()


def test_the_header_of_a_card_is_what_the_hub_reads(project, tmp_path):
    data = ModelCard.load(project / "models/lora_no/README.md").data
    assert (data.language, data.library_name, data.license, data.base_model) == ("no", "peft", "unknown", None)
    assert data.tags == ["csm", "lora"] and data.pipeline_tag == "text-to-speech"
    data = ModelCard.load(project / "models/full_no/README.md").data
    assert (data.library_name, data.license, data.tags) == ("transformers", "cc0-1.0", ["csm"])
    write_card(tmp_path, tmp_path / "lora_da", {"language": "da", "reads": "en"}, "sesame/csm-1b", True, "0", ("a", "b"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.language) == ("sesame/csm-1b", "en")


@pytest.mark.parametrize(("said", "fields"), [
    ("of the data: not stated", {"license": "unknown"}), ("of the data: synthetic speech", {"license": "unknown"}),
    ("of the data: CC BY 4.0", {"license": "cc-by-4.0"}), ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
    ("of the data: NST, ours alone", {"license": "other", "license_name": "nst-ours-alone"}),
])
def test_a_licence_is_written_as_the_hub_calls_it_or_named(said, fields):
    assert name_licence(said) == fields


def test_a_card_outside_the_project_says_where_its_example_looks(tmp_path):
    for place, said in ((tmp_path / "lora_no", True), (ROOT / "models/lora_no", False)):
        write_card(tmp_path, place, {}, "models/csm-mini", True, "0", (DEPTH_TABLE, BACKBONE_TABLE))
        card = (tmp_path / "README.md").read_text()
        assert ("It looks for `lora_no` in the folder that it is run in." in card) == said


def test_an_example_ties_the_table_that_the_base_lacks_to_the_one_that_it_holds():
    lines = write_example("'base'", "'adapter'", "Hei.", "0", (BACKBONE_TABLE, DEPTH_TABLE)).splitlines()
    at = lines.index(f"model.{BACKBONE_TABLE} = \\")
    assert lines[at + 1].strip() == f"model.{DEPTH_TABLE}" and "PeftModel" in lines[at + 2]


def test_a_base_that_keeps_the_depth_decoder_s_table_is_tied_the_other_way_round(tmp_path):
    shutil.copytree(ROOT / "models/csm-mini", tmp_path / "base")
    state = load_file(tmp_path / "base/model.safetensors")
    state[DEPTH_TABLE] = state.pop(BACKBONE_TABLE)
    save_file(state, tmp_path / "base/model.safetensors", {"format": "pt"})
    card = (make_adapter(tmp_path / "lora_no", {}, str(tmp_path / "base")) / "README.md").read_text()
    assert f"model.{BACKBONE_TABLE} = \\\n    model.{DEPTH_TABLE}" in card and f"`{BACKBONE_TABLE}` as MISSING" in card


def test_many_speakers_are_counted_and_not_all_listed(tmp_path):
    wav = tmp_path / "manifest.jsonl"
    wav.write_text("{}\n")
    rows, voices = number_speakers([{"speaker_id": f"p{i:03d}"} for i in range(50)], wav)
    voices = count_speakers(voices, [row | {"duration": 3.0} for row in rows])
    model, _ = load_base("models/csm-mini", "cpu")
    model = add_adapter(model, 4, 8, 0.0)
    set_speakers(model, voices)
    card = (save_adapter(model, tmp_path / "lora_no") / "README.md").read_text()
    assert "6 (1 clips, 0.00 h), 7 (1 clips" in card and "and 30 more" in card
