"""The arms of an ablation: the workbook with one thing changed at a time, at equal compute, trained once per seed.

Arms are compared by the last checkpoint of every stage (`choice=last`): a chosen one would compare the draw of the choice.
A stage of an arm is a task of csm_nb.runs with other parameters. Arms that have a stage in common share its task.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CsmConfig, CsmForConditionalGeneration

from csm_nb.corpora.sources import load_corpus
from csm_nb.csm.adapters import add_adapter
from csm_nb.hub import fetch_model
from csm_nb.manifest import CorpusError
from csm_nb.paths import STAGES
from csm_nb.provenance import hash_value
from csm_nb.recipe import ParameterError, read_recipe, suggest
from csm_nb.runs.chain import Task, plan_tasks
from csm_nb.runs.params import check_params

ANCHOR, SYNTHETIC, ADAPTER, JUDGING = STAGES[1:5]
TRAINED_IN = (ANCHOR, SYNTHETIC, ADAPTER)
CLIPS = {SYNTHETIC: "synthetic_clips", ADAPTER: "corpus_clips"}  # what a share is of
ALL_CLIPS = {ANCHOR: "anchor_clips"} | CLIPS
SET_BY_ARMS = ("language", "method", "train_text", "init_adapter", "adapters_dir", "compare", "choice")

FROZEN, TRAINED = 4, 6  # FLOPs of a step by weight and position: 2 forward, 2 back to the activations, 2 to a trained weight
FULL_LR = 0.2  # of LoRA's learning rate: what moves every weight moves the model further
GRID = (1.0, 0.5, 2.0)  # times the learning rates, for LoRA as for full: none is judged at a rate that suits the other
SHARES = (8, 4, 2)  # the corpus is divided by these: what more of it brings
REFERENCE = "LoRA + text"  # the arm that the others are compared with
SENTENCES = 24  # held-out sentences that an arm is judged by; 8 leave intervals that hide everything


@dataclass(frozen=True)
class Arm:
    """What one arm changes. `rate` multiplies the learning rates, `share` divides the clips of 02 and 03.

    The stage `without` is left out, and its steps go to the next one. `once`: trained with the first seed only.
    """

    name: str
    method: str = "lora"
    train_text: bool = True
    rate: float = 1.0
    share: int = 1
    without: str = ""
    once: bool = False


def name_rate(arm: str, factor: float) -> str:
    """Return the name of an arm at a learning rate of the grid: "full, lr x0.5"; at 1 the arm's own."""
    return arm if factor == 1 else f"{arm}, lr x{factor:g}"


def name_folder(arm: str) -> str:
    """Return an arm's name as that of a folder: "LoRA + text, lr x0.5" is lora_text_lr_x0_5."""
    return re.sub(r"\W+", "_", arm.lower())


ARMS = (
    Arm("LoRA", train_text=False),
    *(Arm(name_rate(REFERENCE, factor), rate=factor, once=factor != 1) for factor in GRID),
    *(Arm(name_rate("full", factor), method="full", rate=FULL_LR * factor, once=factor != 1) for factor in GRID),
    Arm("without anchor", without=ANCHOR),
    Arm("without synthetic", without=SYNTHETIC),
    *(Arm(f"data 1/{share}", share=share) for share in SHARES),
)


@dataclass
class Training:
    """One training of one arm in one language: its tasks by stage, the judging last.

    `params` are each stage's parameters before any arm changed them; `cost` is what a step costs, 1 with LoRA; `fault` says
    why its results can not be read, if so.
    """

    arm: str
    language: str
    seed: int
    cost: float
    params: dict
    tasks: dict[str, Task]
    fault: str = ""

    def __str__(self):
        return f"{self.language} {self.arm}, seed {self.seed}"

    @property
    def state(self) -> str:
        """Return "done", or "failed: " and what to look at."""
        broken = next((task for task in self.tasks.values() if task.state != "done"), None)
        if broken:
            return f"failed: {broken.stage} {broken.state}, see {broken.note}"
        return f"failed: {self.fault}" if self.fault else "done"


def compare_costs(params: dict) -> float:
    """Return what a step of full fine-tuning costs in FLOPs, where a step of LoRA costs 1.

    A frozen weight costs 4 FLOPs per position (2 forward, 2 back to the activations), a trained one 2 more. So full
    fine-tuning costs 1.5 where the adapter is small; the miniature's has a quarter of the weights that it adapts, and costs
    as well. Weights are counted on the model's shape, the depth decoder's by its positions per frame. Embeddings are looked
    up, not multiplied; attention's scores and recomputation are left out. Raises hub.ModelError.
    """
    config = CsmConfig.from_pretrained(fetch_model(params["base_model"]))
    with torch.device("meta"):
        model = CsmForConditionalGeneration(config)
        recipe = read_recipe(params)
        model = add_adapter(model, recipe.rank, recipe.alpha, recipe.dropout, recipe.train_mlp)
    depth = recipe.depth_ratio * config.num_codebooks  # positions of the depth decoder to one of the backbone
    lora = full = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "codec_model" not in name:
            weights = module.weight.numel() * (depth if "depth_decoder" in name else 1)
            lora += weights * (TRAINED if "lora_" in name else FROZEN)
            full += weights * (0 if "lora_" in name else TRAINED)
    head = model.get_base_model().depth_decoder.codebooks_head.weight[0].numel() * depth  # one of its matrices per position
    return (full + TRAINED * head) / (lora + FROZEN * head)


def plan_arm(arm: Arm, params: dict, cost: float) -> dict[str, dict]:
    """Return {stage: the parameters that the arm sets there}, the stages that train, in their order.

    `params` are those of the stages without an arm, `cost` is what compare_costs says: by so much less are the steps of full
    fine-tuning, so that all arms cost as many FLOPs. An arm of less data has all the steps.
    """
    lengths = {stage: count_length(stage, params[stage]) for stage in TRAINED_IN}
    if arm.without:
        left = list(lengths)
        lengths[left[left.index(arm.without) + 1]] += lengths.pop(arm.without)
    changed, before = {}, ""
    for stage, length in lengths.items():
        length = length / cost if arm.method == "full" else length
        recipe = {"train_text": arm.train_text, "choice": "last"}
        if params[stage]["recipe"]["steps"]:
            recipe["steps"] = max(1, round(length))
        else:
            share = arm.share if stage in CLIPS else 1
            recipe["epochs"] = length / math.ceil(params[stage][ALL_CLIPS[stage]] / share)
        if arm.rate != 1:
            recipe["lr"] = float(f"{params[stage]['recipe']['lr'] * arm.rate:.3g}")
        own = {"method": arm.method, "init_adapter": before, "recipe": recipe}
        if stage in CLIPS:
            own[CLIPS[stage]] = math.ceil(params[stage][CLIPS[stage]] / arm.share)
        changed[stage], before = own, stage
    return changed


def count_length(stage: str, params: dict) -> float:
    """Return how long a stage with these parameters trains: its steps, or the clips that it hears where it counts epochs."""
    recipe = params["recipe"]
    return recipe["steps"] or recipe["epochs"] * params[ALL_CLIPS[stage]]


def plan_trainings(languages, profile: str = "mini", overrides: dict | None = None, seeds=(), names=()) -> list[Training]:
    """Return the trainings by language, seed and arm, every parameter of every task checked before anything starts.

    `seeds` are those of the trainings, by default one, the profile's; `names` are the arms, by default all. `overrides` hold
    for all arms; `sentences` is 24 without one, `seed` is that of the judging: its sentences are the same for every arm and
    seed. Raises ParameterError, also for what the arms set themselves, and hub.ModelError.
    """
    overrides = {"sentences": SENTENCES} | (overrides or {})
    for key in SET_BY_ARMS:
        if key in overrides or key in overrides.get("recipe", {}):
            raise ParameterError(f"command line: {key} is set by the arms (language by --langs), not by --set")
    arms = choose_arms(names)
    trainings, shared = [], {}
    for language in dict.fromkeys(languages):
        planned = plan_tasks([language], [*TRAINED_IN, JUDGING], profile, overrides)
        params, origins = ({task.stage: getattr(task, name) for task in planned} for name in ("params", "origins"))
        by_steps = [stage for stage in TRAINED_IN if params[stage]["recipe"]["steps"]]
        if 0 < len(by_steps) < len(TRAINED_IN):
            raise ParameterError(f"{', '.join(by_steps)} of profile {profile} count steps and the others epochs, which arms at "
                                 "equal compute can not add up; give one of the two for all: --set epochs=3")
        params[ADAPTER]["corpus_clips"] = count_corpus(params[ADAPTER])
        cost = compare_costs(params[ADAPTER])
        for n, seed in enumerate(dict.fromkeys(seeds or [params[JUDGING]["seed"]])):
            for arm in arms:
                if n == 0 or not arm.once:
                    tasks = _plan_stages(arm, language, seed, params, origins, plan_arm(arm, params, cost), shared)
                    step = cost if arm.method == "full" else 1.0
                    trainings.append(Training(arm.name, language, seed, step, params, tasks))
    return trainings


def choose_arms(names=()) -> list[Arm]:
    """Return the arms of these names in their own order, all for none. Raises ParameterError for an unknown name."""
    known = [arm.name for arm in ARMS]
    for name in names:
        if name not in known:
            raise ParameterError(f"no arm {name!r}{suggest(name, known)} The arms are {'; '.join(known)}")
    return [arm for arm in ARMS if not names or arm.name in names]


def _plan_stages(arm, language, seed, params, origins, changed, shared):
    """Return the tasks of one training; `shared` holds those of other arms by what they do and what they go on from."""
    root = Path(params[JUDGING]["runs_dir"]) / "ablate"
    places = {"runs_dir": str(root / "runs"), "adapters_dir": str(root / "models" / name_folder(arm.name) / f"seed-{seed}")}
    tasks, before, key = {}, [], ""
    for stage, own in (*changed.items(), (JUDGING, {"method": arm.method, "compare": [language]})):
        own = own if stage == JUDGING else own | {"seed": seed}
        given = params[stage] | places | own
        given |= {"recipe": params[stage]["recipe"] | own["recipe"]} if "recipe" in own else {}
        checked = check_params(stage, given)
        key = hash_value([key, language, stage, checked])
        tasks[stage] = shared.setdefault(key, Task(
            language, stage, checked, before, arm=f"{arm.name}, seed {seed}",
            origins=origins[stage] | dict.fromkeys(own.get("recipe", ()), f"arm {arm.name}")))
        before = [tasks[stage]]
    return tasks


def count_corpus(params: dict) -> int:
    """Return how many clips 03 takes: as many as asked for, or as there are, so that a share of them is a share of the corpus.

    Raises ParameterError for a corpus without the language.
    """
    if not params["corpus"]:
        return params["corpus_clips"]
    try:
        return len(load_corpus(params["corpus"], params["language"], params["corpus_clips"]))
    except CorpusError as error:
        raise ParameterError(f"corpus is {params['corpus']!r}: {error}") from error
