"""Every profile with every language and every value that a parameter's comment allows: possible up to the plan.

No notebook is executed here; the odd ones are in test_notebooks.py.
"""

import importlib.metadata
import importlib.util
import re

import pytest
from conftest import ROOT
from test_notebooks import code_cells

from csm_nb.ablate import arms
from csm_nb.languages import LANGUAGES
from csm_nb.paths import NOTEBOOKS, STAGES
from csm_nb.runs import chain
from csm_nb.runs.params import CHOICES, DEVICES, RANGES, check_inputs, check_params, read_cell
from csm_nb.text import sentences

PROFILES = [path.stem for path in sorted((ROOT / "params").glob("*.yaml")) if path.stem not in LANGUAGES]
TAUGHT = [path.stem for path in sorted((ROOT / "params").glob("*.yaml")) if path.stem in LANGUAGES]
# Values besides those of CHOICES, the booleans and the ends of RANGES
VALUES = {
    "device": ["auto", "cpu"], "asr_model": ["by-language", "models/asr-mini", "openai/whisper-large-v3"],
    "codebook_weights": [[], [1.0] * 8], "align_model": ["", "models/asr-mini", "CoRal-project/roest-wav2vec2-315m-v2"],
    "codec_model": ["kyutai/mimi"], "codebooks": [[1], [8, 1]], "init_adapter": ["", "01_anchor"],
}  # fmt: skip


def read_comments(stage):
    """Return {parameter: comment} of a notebook's parameters cell."""
    (cell,) = code_cells(NOTEBOOKS / f"{stage}.ipynb")[0]
    return {line.split(":")[0]: line.split("  # ")[-1] for line in cell.source.splitlines() if line.strip()}


def list_values(key, parameter):
    """Return values that a parameter may have by its comment: each choice, both booleans, the least and the most of a range."""
    if parameter.type == "bool":
        return [True, False]
    if parameter.type in ("int", "float"):
        interval = next((interval for interval, keys in RANGES.items() if key in keys.split()), "[0, inf)")
        low, high = (float(edge) for edge in interval[1:-1].split(","))
        ends = [low if interval[0] == "[" else 1e-6, high if interval[-1] == "]" else min(high, 1000) - 1e-3]
        return [type(parameter.default)(end) for end in ends]
    choices = CHOICES.get(key, ())
    return [*([[], list(choices)] if parameter.type == "list" and choices else choices), *VALUES.get(key, [])]


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    """Let there be a GPU and every package: what is asked is whether the values are possible somewhere."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) or name)


def test_what_is_taught_and_sized_is_all_there():
    assert set(PROFILES) >= {"mini", "csm-1b", "test"} and len(TAUGHT) >= 9


@pytest.mark.parametrize("language", TAUGHT)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_can_be_planned_with_every_value_that_its_comments_allow(profile, language):
    tasks = chain.plan_tasks([language], STAGES, profile)
    assert [task.stage for task in tasks] == list(STAGES)
    for task in tasks:
        for key, parameter in read_cell(task.stage).items():
            for value in list_values(key, parameter):
                value = [one for one in value if one != language] if key == "also" else value
                check_inputs(task.stage, check_params(task.stage, task.params | {key: value}))


@pytest.mark.parametrize("language", TAUGHT)
def test_every_count_of_every_profile_gives_sentences_in_every_language(language):
    for profile in PROFILES:
        for task in chain.plan_tasks([language], STAGES, profile):
            for key in sorted(task.params.keys() & {"anchor_clips", "synthetic_clips", "corpus_clips", "phoneme_clips"}):
                code, wanted = "en" if key == "anchor_clips" else language, task.params[key]
                prompts, how = sentences.draw_prompts(code, wanted, task.params["seed"])
                there = sentences.count_sentences(code)
                assert sum(sentences.split_of(text) == "train" for text in prompts) == min(wanted, there)
                assert (f"({wanted} were asked for" in how) == (wanted > there)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_arm_of_an_ablation_can_be_planned_in_every_language(profile, monkeypatch):
    monkeypatch.setattr(arms, "compare_costs", lambda params: 1.5)
    trainings = arms.plan_trainings(TAUGHT, profile)
    assert {training.language for training in trainings} == set(TAUGHT)


@pytest.mark.parametrize("stage", STAGES)
def test_comments_name_each_choice_that_is_checked(stage):
    for key, comment in read_comments(stage).items():
        if stage == STAGES[0] and key == "backend":  # named codec_backend where a codec's is meant
            continue
        named = re.findall(r"[\w-]+", comment)
        if key == "also":  # some of the languages stand for all
            assert set(CHOICES[key]) & set(named)
            continue
        assert not set(CHOICES.get(key, ())) - set(named) - {str(read_cell(stage)[key].default)}, (key, comment)
        if key == "device":
            assert all(re.fullmatch(DEVICES, word) for word in named)
