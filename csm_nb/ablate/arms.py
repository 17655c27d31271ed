"""The arms of an ablation: the workbook with one thing changed at a time, at equal compute, each trained once per seed.

Arms are compared by the last checkpoint of every stage (`choice=last`): a chosen one would compare the draw of the choice.
"""

import math
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import CsmConfig, CsmForConditionalGeneration

from csm_nb.corpora.sources import load_corpus
from csm_nb.csm.adapters import add_adapter
from csm_nb.hub import fetch_model
from csm_nb.manifest import CorpusError
from csm_nb.paths import STAGES, resolve_path
from csm_nb.recipe import ParameterError
from csm_nb.runs import chain
from csm_nb.runs.params import check_params

ANCHOR, SYNTHETIC, ADAPTER, JUDGING = STAGES[1:5]
STEPS = {ANCHOR: "anchor_steps", SYNTHETIC: "synthetic_steps", ADAPTER: "adapter_steps"}
FROZEN, TRAINED = 4, 6  # FLOPs of a step by weight and position: 2 forward, 2 back to the activations, 2 to a trained weight
FULL_LR = 0.2  # of LoRA's learning rate: what moves every weight moves the model further
GRID = (1.0, 0.5, 2.0)  # times the learning rates, for LoRA as for full: none is judged at a rate that suits the other
SHARES = (8, 4, 2)  # the corpus is divided by these: what more of it brings
REFERENCE = "LoRA + text"  # the arm that the others are compared with
SENTENCES = 24  # held-out sentences that an arm is judged by; 8 leave intervals that hide everything
SET_BY_ARMS = ("language", "method", "train_text", "init_adapter", "adapters_dir", "compare", "choice")


@dataclass
class Work:
    """One training of one arm and language: its calls of csm_nb.runs, one after the other, and the runs that they made.

    A call is (stages, overrides); `params` are each stage's parameters before any arm changed them; `cost` is what a step
    costs, 1 with LoRA.
    """

    arm: str
    language: str
    seed: int
    calls: list
    params: dict
    cost: float
    log: Path
    runs: dict[str, Path] = field(default_factory=dict)
    at: int = 0
    state: str = "waiting"
    process: subprocess.Popen | None = None
    started: float = 0.0

    def __str__(self):
        return f"{self.language} {self.arm:<17} seed {self.seed}"


def compare_costs(params: dict) -> float:
    """Return what a step of full fine-tuning costs in FLOPs, where a step of LoRA costs 1.

    A frozen weight costs 4 FLOPs a position (2 forward, 2 back to the activations), a trained one 2 more. So full
    fine-tuning costs 1.5 where the adapter is small; the miniature's has a quarter of the weights that it adapts, and costs
    as well. Weights are counted on the model's shape, the depth decoder's by its positions a frame. Embeddings are looked
    up, not multiplied; attention's scores and recomputation are left out. Raises hub.ModelError.
    """
    config = CsmConfig.from_pretrained(fetch_model(params["base_model"]))
    with torch.device("meta"):
        model = CsmForConditionalGeneration(config)
        model = add_adapter(model, params["rank"], params["alpha"], params["dropout"], params["train_mlp"])
    depth = params["depth_ratio"] * config.num_codebooks  # positions of the depth decoder to one of the backbone
    lora = full = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "codec_model" not in name:
            weights = module.weight.numel() * (depth if "depth_decoder" in name else 1)
            lora += weights * (TRAINED if "lora_" in name else FROZEN)
            full += weights * (0 if "lora_" in name else TRAINED)
    head = model.get_base_model().depth_decoder.codebooks_head.weight[0].numel() * depth  # one of its matrices a position
    return (full + TRAINED * head) / (lora + FROZEN * head)


def name_rate(arm: str, factor: float) -> str:
    """Return the name of an arm at a learning rate of the grid: "full, lr x0.5"; at 1 the arm's own."""
    return arm if factor == 1 else f"{arm}, lr x{factor:g}"


def plan_arms(params: dict, cost: float = TRAINED / FROZEN, seed: int = 0) -> dict[str, list]:
    """Return {arm: [(stages, overrides), ...]}, calls of csm_nb.runs that train with `seed` and all cost as many FLOPs.

    `params` are the steps, learning rates and clips of 01 to 03, `cost` is what compare_costs says: by so much less are the
    steps of full fine-tuning. LoRA + text and full each have a grid of learning rates. An arm without a stage gives its
    steps to the next one. An arm of less data has a share of the clips of 02 and 03, and all the steps. The last call of
    each judges: it has the same seed, so the same sentences, in every arm and for every seed of the training.
    """
    anchor, synthetic, adapter = (params[key] for key in STEPS.values())
    stages, text = (ANCHOR, SYNTHETIC, ADAPTER), {"method": "lora", "train_text": True}
    full = text | {"method": "full"} | {key: max(1, round(params[key] / cost)) for key in STEPS.values()}
    arms = {"LoRA": [(stages, text | {"train_text": False})]}
    for arm, own, scale in ((REFERENCE, text, 1.0), ("full", full, FULL_LR)):
        for factor in GRID:
            rates = {key: float(f"{params[key] * scale * factor:.3g}") for key in ("lr", "adapter_lr")}
            arms[name_rate(arm, factor)] = [(stages, own | ({} if scale * factor == 1 else rates))]
    arms["without anchor"] = [  # two calls: 02 and 03 take what they go on from by the same name
        ((SYNTHETIC,), text | {"init_adapter": "", "synthetic_steps": anchor + synthetic}),
        ((ADAPTER,), text | {"init_adapter": SYNTHETIC}),
    ]
    arms["without synthetic"] = [((ANCHOR, ADAPTER), text | {"init_adapter": ANCHOR, "adapter_steps": synthetic + adapter})]
    for share in SHARES:
        clips = {key: math.ceil(params[key] / share) for key in ("synthetic_clips", "corpus_clips")}
        arms[f"data 1/{share}"] = [(stages, text | clips)]
    return {
        arm: [*((names, own | {"choice": "last", "seed": seed}) for names, own in calls),
              ((JUDGING,), {"method": calls[0][1]["method"]})]
        for arm, calls in arms.items()
    }


def plan_works(languages, profile: str = "mini", overrides: dict | None = None, seeds=()) -> list[Work]:
    """Return one work per language, arm and seed, every parameter of every call checked before anything starts.

    `seeds` are those of the trainings, by default one, the profile's. `overrides` hold for all arms; `sentences` is 24
    without one, `seed` is that of the judging. Raises ParameterError, also for what the arms set themselves.
    """
    overrides = {"sentences": SENTENCES} | (overrides or {})
    for key in SET_BY_ARMS:
        if key in overrides:
            raise ParameterError(f"command line: {key} is set by the arms (language by --langs), not by --set")
    works = []
    for language in dict.fromkeys(languages):
        tasks = chain.plan_tasks([language], [*STEPS, JUDGING], profile, overrides)
        params = {task.stage: task.params for task in tasks}
        root, cost = Path(params[JUDGING]["runs_dir"]) / "ablate", compare_costs(params[ADAPTER])
        sizes = params[ANCHOR] | params[SYNTHETIC] | params[ADAPTER]
        sizes["corpus_clips"] = count_corpus(params[ADAPTER])
        for seed in dict.fromkeys(seeds or [params[JUDGING]["seed"]]):
            for arm, calls in plan_arms(sizes, cost, seed).items():
                place = root / re.sub(r"\W+", "_", arm.lower()) / f"seed-{seed}"
                own = overrides | {"runs_dir": str(place), "adapters_dir": str(place / "models"), "compare": [language]}
                calls = [(stages, own | changed) for stages, changed in calls]
                for stages, changed in calls:
                    for stage in stages:
                        check_params(stage, params[stage] | changed)
                step = cost if calls[0][1]["method"] == "full" else 1.0
                works.append(Work(arm, language, seed, calls, params, step, resolve_path(place) / f"{language}.log"))
    return works


def count_corpus(params: dict) -> int:
    """Return how many clips 03 takes: as many as asked for, or as there are, so that a share of them is a share of the corpus.

    Raises ParameterError for a corpus without the language.
    """
    if not params["corpus"]:
        return params["corpus_clips"]
    try:
        return len(load_corpus(resolve_path(params["corpus"]), params["language"], params["corpus_clips"]))
    except CorpusError as error:
        raise ParameterError(f"corpus is {params['corpus']!r}: {error}") from error


def write_value(value) -> str:
    """Return `value` as csm_nb.runs takes it after --set KEY=."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
