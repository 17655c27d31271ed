"""A run's training on several GPUs, which a notebook can not start: `torchrun --nproc-per-node 8 -m csm_nb.runs.launch RUN`."""

import argparse
import os
import sys
from pathlib import Path

import torch

from csm_nb.codec.mimi import load_codec
from csm_nb.corpora import split, tokens
from csm_nb.csm import adapters, load, tags
from csm_nb.device import pick_device
from csm_nb.paths import TRAINING, resolve_path, show_path
from csm_nb.provenance import read_json
from csm_nb.recipe import TrainingError, read_recipe
from csm_nb.runs.folders import name_worker
from csm_nb.train import callbacks, trainer
from csm_nb.train.place import place_training

HELP = """The training of a run that a notebook (01 to 03) has begun, on several GPUs:

1. Start the notebook or `make run` as ever, and stop it when the training's first line is there: the tokens are made by then,
   and run.json says where they are.
2. torchrun --nproc-per-node 8 -m csm_nb.runs.launch runs/no/03_adapter/<hash>
   One process per GPU; a step takes batch_size x gradient_accumulation rows in each of them. Killed and started again with
   as many processes, it goes on.
3. Start the notebook or `make run` again, with the same parameters: it finds the training done, and does what comes after it.
"""


def train_run(folder) -> list[dict]:
    """Train what the run.json in `folder` says, on the tokens that it names, and return the loss history.

    The training is the run's own in data/trainings (train.place), where its notebook finds it done. Each process of torchrun
    calls it. Raises TrainingError when there is nothing to train there, or a notebook still does.
    """
    folder, rank = resolve_path(folder), int(os.environ.get("RANK", 0))
    record = read_json(folder / "run.json")
    params, inputs, stage = (record.get(key) for key in ("params", "inputs", "stage"))
    if stage not in TRAINING:
        raise TrainingError(f"{show_path(folder)} holds no run of {', '.join(TRAINING)} (found: {stage or 'no run.json'}); name "
                            "a run's folder, such as runs/no/03_adapter/<hash>")
    kept = record.get("used", {}).get("tokens")
    if (folder / "done.json").is_file() or not kept:
        found = "is done" if (folder / "done.json").is_file() else "names no tokens yet"
        raise TrainingError(f"{show_path(folder)} {found}; start its notebook, and stop it at the training's first line")
    if rank == 0 and (worker := name_worker(folder)):
        raise TrainingError(f"{worker} still works in {show_path(folder)}; stop it first")
    device = pick_device(params["device"])
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    torch.manual_seed(params["seed"])
    base = inputs["base_model"]["path"]
    base = resolve_path(base) if resolve_path(base).exists() else base
    recipe = read_recipe(params)
    model, processor = load.load_base(base, device, recipe.dtype, recipe.four_bit, recipe.backend, params["method"])
    said = tags.make_tags(params.get("tag", "none"), [params["language"], *params.get("also", [])])
    before = inputs.get("init_adapter")
    before = resolve_path(before["path"]) if before else None
    model = adapters.start_training(model, params["method"], before, recipe.rank, recipe.alpha, recipe.dropout,
                                    recipe.train_mlp, recipe.train_text, seed=params["seed"], tags=said,
                                    rows=tags.find_rows(processor.tokenizer, said))
    rows = tags.tag_rows(tokens.read_tokens(resolve_path(kept[-1]), load_codec(base)), said)
    train_rows, valid_rows, how = split.split_rows(rows, recipe.max_tokens)
    if rank == 0:
        print(f"{len(train_rows)} clips to train on; {how}", flush=True)
    place = place_training(model, train_rows, valid_rows, recipe, resolve_path(params["runs_dir"]).parent / "data")
    recipe = trainer.fix_steps(recipe, train_rows, processor, model, place)
    return trainer.train_model(model, processor, train_rows, valid_rows, place, recipe, callbacks.show_progress(recipe))


def main() -> None:
    """Train the run that the command line names; exit code 1, with what to do, when it can not be."""
    parser = argparse.ArgumentParser("torchrun --nproc-per-node N -m csm_nb.runs.launch", description=HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/no/03_adapter/<hash>")
    try:
        train_run(parser.parse_args().run)
    except TrainingError as error:
        sys.exit(f"{error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
