"""How to train, and what is said of a value that can not be used."""

import difflib
from dataclasses import dataclass, fields

TRAINED = {"lora": "adapter_config.json", "full": "config.json"}  # by method: what a stage leaves in its folder adapter/


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names the file, the key, the value found and what is allowed."""


def suggest(word, allowed) -> str:
    """Return "; did you mean ...?" with the nearest of `allowed` words, or ".": the end of a sentence that names `word`."""
    word, allowed = str(word).lower(), list(allowed)
    near = [name for name in allowed if word and (name.lower().startswith(word) or word in name.lower().split("_"))]
    near = near or difflib.get_close_matches(word, allowed, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else "."


class TrainingError(RuntimeError):
    """Training that can not go on: no clips, a loss that is no number, no room for a checkpoint; says what to do."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Fields of the same names are parameters of the notebooks; 0 in a `..._every` leaves it to the length."""

    steps: int
    lr: float = 2e-4
    max_tokens: int = 1024  # positions of a packed row
    batch_size: int = 1  # rows per step and process
    gradient_accumulation: int = 1  # batches per step
    depth_ratio: float = 1 / 16  # share of the frames that the depth decoder learns from
    codebook_weights: tuple = ()  # one per codebook, scaled to a mean of 1; empty: all alike
    text_weight: float = 0.0  # of the loss on the next text token
    schedule: str = "cosine"  # or linear
    gradient_checkpointing: bool = False  # gradient checkpointing of the backbone: less memory, a third more time
    patience: int = 0  # evaluations without gain before it stops; 0: never
    log_every: int = 0
    eval_every: int = 0
    save_every: int = 0
    log_seconds: float = 30.0  # at most, from one line of the log to the next; 0: by steps alone
    save_minutes: float = 10.0  # at most, from one checkpoint to the next; 0: by steps alone
    keep_checkpoints: int = 3  # at least; the newest and the three to choose from (plan_choices) are kept in any case
    seed: int = 0


def read_recipe(params: dict, **given) -> Recipe:
    """The recipe that a run's parameters make; `given` are the fields that a stage names otherwise (its steps, its lr).

    Raises TrainingError for a value that no training can have.
    """
    names = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in params.items() if key in names} | given)
    for name in ("steps", "max_tokens", "batch_size", "gradient_accumulation", "keep_checkpoints"):
        if getattr(recipe, name) < 1:
            raise TrainingError(f"{name} is {getattr(recipe, name)}; allowed is 1 and more")
    if not (recipe.lr > 0 and 0 < recipe.depth_ratio <= 1):
        raise TrainingError(f"lr is {recipe.lr}, depth_ratio {recipe.depth_ratio}; allowed are lr above 0, depth_ratio up to 1")
    for name in ("log_seconds", "save_minutes"):
        if not getattr(recipe, name) >= 0:
            raise TrainingError(f"{name} is {getattr(recipe, name)}; allowed is 0 (never by time) and more")
    if recipe.schedule not in ("cosine", "linear"):
        raise TrainingError(f"schedule is {recipe.schedule!r}; allowed are cosine and linear")
    return recipe
