"""How to train, and what is said of a value that can not be used."""

import difflib
import math
from dataclasses import dataclass, field, fields

from csm_nb.paths import STAGES

TRAINED = {"lora": "adapter_config.json", "full": "config.json"}  # by method: what a stage leaves in its folder adapter/
EPOCHS = 3.0  # where neither steps nor epochs are given
LENGTHS = ("steps", "epochs")  # one of the two
ENGINES = ("local", "ray")  # where work is done: on this machine, or on the nodes of a Ray (engine.py)
FROM_ONE, FROM_ZERO, SHARE = "[1, inf)", "[0, inf)", "(0, 1]"


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names the file, the key, the value found and what is allowed."""


class TrainingError(RuntimeError):
    """Training that can not go on: no clips, a loss that is no number, no room for a checkpoint; says what to do."""


def suggest(word, allowed) -> str:
    """Return "; did you mean ...?" with the nearest of `allowed` words, or ".": the end of a sentence that names `word`."""
    word, allowed = str(word).lower(), list(allowed)
    near = [name for name in allowed if word and (name.lower().startswith(word) or word in name.lower().split("_"))]
    near = near or difflib.get_close_matches(word, allowed, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else "."


def check_value(name: str, value, default, allowed="[0, inf)"):
    """Return `value` as the type of `default`: an int becomes a float where a float belongs, a list a tuple where a tuple does.

    `allowed` is an interval for numbers ("(0, 1]": brackets belong to it, parentheses do not), also for those in a list, or
    the words that a text may be, or each of a list; () for any. `name` begins the message: "params/no.yaml: rank". Raises
    ParameterError.
    """
    kind, found = type(default), f"{name} is {value!r}"
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        hint = ""
        if kind is float and isinstance(value, str):
            try:
                mantissa, exponent = f"{float(value):e}".split("e")
                hint = f"; write {float(mantissa)}e{int(exponent):+d}, with the point and the sign"
            except ValueError:
                pass
        if kind is str and not isinstance(value, list | dict):
            hint = '; YAML reads a bare no as false and digits as a number: write them in quotes, such as "no"'
        kind, default = (list, list(default)) if kind is tuple else (kind, default)
        raise ParameterError(f"{found} ({type(value).__name__}); allowed is {kind.__name__}, such as {default!r}{hint}")
    if kind in (list, tuple):
        kinds = {type(item) for item in default[:1]} or ({str} if isinstance(allowed, tuple) else {int, float})
        if default and not value or any(type(item) not in kinds for item in value):
            hint = '; "no" in quotes, YAML reads a bare no as false' if any(item is False for item in value) else ""
            words = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ParameterError(f"{found} ({type(value).__name__}); allowed is a list of {words}, such as {default!r}{hint}")
    if isinstance(allowed, tuple):
        if allowed and not set(value if kind is list else [value]) <= set(allowed):
            raise ParameterError(f"{found}; allowed: {', '.join(allowed)}")
        return value
    low, high = (float(edge) for edge in allowed[1:-1].split(","))
    for number in value if kind in (list, tuple) else [value]:
        if type(number) in (int, float):
            above = number >= low if allowed[0] == "[" else number > low
            below = number <= high if allowed[-1] == "]" else number < high
            if not (above and below and math.isfinite(number)):
                words = f"{'from' if allowed[0] == '[' else 'above'} {low:.10g}"
                words += f" {'to' if allowed[-1] == ']' else 'to below'} {high:.10g}" if math.isfinite(high) else " on"
                raise ParameterError(f"{found}; allowed is {words}")
    return value


def _take(default, meaning, allowed=FROM_ZERO):
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class Recipe:
    """How to train: each field with its default, what it means and what it may be. It checks itself.

    Its length is `steps`, or `epochs` where they are 0 (trainer.fix_steps makes steps of them). 0 in a `..._every` leaves it
    to the length. Raises ParameterError, as read from a notebook's `recipe`, for a value that no training can have.
    """

    steps: int = _take(0, "training steps; 0: by epochs")
    epochs: float = _take(0.0, "times that each clip is heard; 0: by steps")
    rank: int = _take(64, "LoRA rank", FROM_ONE)
    alpha: int = _take(128, "LoRA scale, twice the rank", FROM_ONE)
    dropout: float = _take(0.05, "LoRA dropout", "[0, 1)")
    train_mlp: bool = _take(False, "LoRA on the MLP layers as well as on attention")
    train_text: bool = _take(False, "train the text table too, for letters that the base has never read")
    lr: float = _take(2e-4, "learning rate at its peak", SHARE)
    schedule: str = _take("cosine", "of the learning rate", ("cosine", "linear"))
    max_tokens: int = _take(1024, "positions of a row that clips are packed into; a longer clip is set aside", "[64, inf)")
    batch_size: int = _take(1, "packed rows per batch", FROM_ONE)
    gradient_accumulation: int = _take(1, "batches per step", FROM_ONE)
    depth_ratio: float = _take(1 / 16, "share of the frames that the depth decoder learns from, drawn anew each step", SHARE)
    codebook_weights: tuple = _take((), "weight of each codebook in the loss, scaled to a mean of 1; empty: all alike")
    text_weight: float = _take(0.0, "weight of the loss on the next text token")
    gradient_checkpointing: bool = _take(False, "of the backbone: less memory, a third more time")
    patience: int = _take(0, "evaluations without gain before the training stops; 0: never")
    choice: str = _take("best", "which checkpoint is saved: best (of those in the last third of the steps) or last",
                        ("best", "last"))
    log_every: int = _take(0, "steps from one line of the log to the next; 0: by the length")
    eval_every: int = _take(0, "steps from one evaluation to the next, beside three in the last third; 0: by the length")
    save_every: int = _take(0, "steps from one checkpoint to the next, beside those three; 0: by the length")
    log_seconds: float = _take(30.0, "from one line of the log to the next, at most; 0: by steps alone")
    save_minutes: float = _take(10.0, "from one checkpoint to the next, at most; 0: by steps alone")
    sample_every: int = _take(0, "steps after which three probes are spoken; 0: once, half way")
    keep_checkpoints: int = _take(3, "how many stay, at least; the newest and the three to choose from stay in any case",
                                  FROM_ONE)
    price_per_hour: float = _take(0.0, "of the machine, in any currency; 0: no price")
    workers: str = _take("local", "who encodes the clips: local (this machine's cores or GPU) or ray (docs/scale.md)", ENGINES)
    four_bit: bool = _take(False, "hold the frozen weights in 4 bits (CUDA only)")
    backend: str = _take("transformers", "or unsloth (CUDA only)", ("transformers", "unsloth"))
    dtype: str = _take("auto", "of the frozen weights: auto is bfloat16 on a GPU", ("auto", "bfloat16", "float32"))
    seed: int = _take(0, "of texts, batches and sampling", "[0, 2147483648)")  # NumPy takes twice that; stages add to it

    def __post_init__(self):
        for one in fields(self):
            value = check_value(one.name, getattr(self, one.name), one.default, one.metadata["allowed"])
            object.__setattr__(self, one.name, value)
        if self.steps and self.epochs:
            raise ParameterError(f"steps is {self.steps} and epochs {self.epochs:g}; give one of the two")
        if not self.steps and not self.epochs:
            object.__setattr__(self, "epochs", EPOCHS)


FIELDS = {one.name: one for one in fields(Recipe) if one.name != "seed"}  # seed is a parameter of its own


def read_recipe(params: dict) -> Recipe:
    """Return the recipe that a run's checked parameters hold: its fields and the run's seed."""
    return Recipe(**params["recipe"], seed=params["seed"])


def pick_fields(section: dict, stage: str, where: str = "recipe") -> dict:
    """Return the fields that a section `recipe` sets for `stage`: those for all stages, and over them its own.

    A stage's own stand under its name: {"rank": 32, "03_adapter": {"lr": 1e-4}}. `steps` and `epochs` replace each other.
    Raises ParameterError, which begins with `where`, for a name that is neither a field nor a stage, and for both lengths.
    """
    for name, value in section.items():
        if name in STAGES and not isinstance(value, dict):
            raise ParameterError(f"{where}: {name} is {value!r}; allowed are fields of a recipe, such as {{lr: 1.0e-4}}")
        for key in value if name in STAGES else [name]:
            if key in STAGES:
                raise ParameterError(f"{where}: {key} stands in the fields of {name}; allowed is a stage's section beside it, "
                                     "in the recipe itself")
            if key == "seed":
                raise ParameterError(f"{where}: seed is a parameter of its own; write it outside of `recipe:`")
            if key not in FIELDS:
                raise ParameterError(f"{where}: a recipe has no field {key!r}{suggest(key, [*FIELDS, *STAGES])} Its fields are "
                                     f"{', '.join(FIELDS)}, and the names of stages for fields of their own")
    general = {name: value for name, value in section.items() if name not in STAGES}
    picked = {}
    for layer in (general, section.get(stage, {})):
        if all(layer.get(name) for name in LENGTHS):
            raise ParameterError(f"{where}: steps is {layer['steps']!r} and epochs {layer['epochs']!r}; give one of the two")
        picked = _drop_rival(picked, layer) | layer
    return picked


def merge_recipes(section: dict, over: dict) -> dict:
    """Return a section `recipe` with another one over it: what `over` sets for all stages holds in each of them."""
    general = {name: value for name, value in over.items() if name not in STAGES}
    merged = _drop_rival(section, general) | general
    for name in STAGES:
        own = {key: value for key, value in _drop_rival(section.get(name, {}), general).items() if key not in general}
        own = _drop_rival(own, over.get(name, {})) | over.get(name, {})
        merged.pop(name, None)
        if own:
            merged[name] = own
    return merged


def _drop_rival(fields, over):
    """`fields` without the length that `over` replaces by the other one."""
    rivals = [LENGTHS[1 - n] for n, name in enumerate(LENGTHS) if over.get(name)]
    return {name: value for name, value in fields.items() if name not in rivals}
