"""What a training will cost, before it starts: memory by part, disk, and a few real steps that change nothing."""

import contextlib
import math
import os
import shutil
import time
import weakref
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import psutil
import torch
from peft import PeftModel

from csm_nb.csm.load import inner_model
from csm_nb.device import half_precision
from csm_nb.processes import read_memory_left
from csm_nb.recipe import Recipe
from csm_nb.train.loss import compute_loss, prepare_model, restore_model
from csm_nb.train.packing import Clips, PackedRows, collate, plan_rows, read_clips
from csm_nb.train.trainer import fix_steps, plan_choices

PLAN = {"anchor": 10, "synthetic": 100, "real": 50}  # hours of speech of a language's three trainings, as a plan
EPOCHS = 3
MANY_EPOCHS = 10
EXAMINED = 2048  # rows of the plan that are looked at for the largest batch; later ones are packed in the same way
GIB = 2**30
# Of activations and temporary, what the allocator holds in pieces too small to use. On a CPU the real size (rows of 256 and
# 512 positions, LoRA) took 32 to 59 % more than was alive, and that was as counted; on a GPU it is assumed, not measured.
SLACK = {"cpu": 0.5, "cuda": 0.1}
# Rows that are small and differ in one way each: lengths of the clips, text positions of each clip, depth frames. Multiples
# of 16, as attention on a GPU pads its mask to that.
SAMPLES = (((16,) * 2, 2, 2), ((16,) * 4, 2, 2), ((32,) * 4, 2, 2), ((16,) * 2, 2, 6), ((16,) * 2, 6, 2))


class CostError(RuntimeError):
    """A training that does not fit the memory, or whose checkpoints do not fit the disk.

    `memory` holds bytes by part, `suggestions` dicts of fields of the recipe with which it would fit; the message says both.
    """

    def __init__(self, message: str, memory: dict, suggestions: list[dict]):
        super().__init__(message)
        self.memory, self.suggestions = memory, suggestions


def measure_cost(model, processor, rows, recipe: Recipe, steps: int = 3, out_dir=".") -> dict:
    """Return what training `model` on token rows will take, measured on `steps` real steps after one to warm up.

    Memory is checked first, and the disk that holds `out_dir`.
    The steps are the Trainer's (forward, backward, clipping, AdamW; the first on the plan's largest batch) at a learning
    rate of 0: no weight, no random number and no mode is another afterwards, but what is trained is float32, as train_model
    makes it. Evaluations, checkpoints and, with several processes, the exchange of gradients are not in it.

    Keys are seconds_per_step (the median), audio_seconds_per_step and _per_second and positions_per_second of all processes,
    memory (estimate_memory), disk (estimate_disk), peak_memory (bytes in use in these steps: the GPU's, or the process's on a
    CPU), epochs, hours and price of the whole run (None where the recipe has no price), and plan: the rows of tabulate_cost. For
    other corpora it takes clips packed as densely as these. Raises CostError when memory or disk is too small, before a step
    or in one.
    """
    recipe = fix_steps(recipe, rows, processor, model, out_dir)
    rate, world = inner_model(model).codec_model.config.frame_rate, int(os.environ.get("WORLD_SIZE", 1))
    clips = read_clips(rows, processor, recipe.max_tokens, rate, inner_model(model).config.max_position_embeddings)
    disk = estimate_disk(model, recipe, out_dir)
    memory, suggest = _estimate(model, clips, recipe)
    shapes = shape_batches(clips, recipe, model.device)
    largest = max(range(len(shapes)), key=lambda i: tuple(shapes[i]))
    plan = _plan(clips, recipe, steps * recipe.gradient_accumulation)
    dataset, size = PackedRows(clips, plan, recipe.depth_ratio, recipe.seed), recipe.batch_size
    order = [largest] * recipe.gradient_accumulation + list(range(steps * recipe.gradient_accumulation))
    batches = [collate([dataset[row] for row in range(i * size, min(len(plan), (i + 1) * size))]) for i in order]
    ran_out = False
    try:
        seconds, peak = _time_steps(model, batches, recipe)
    except torch.OutOfMemoryError:
        ran_out = True  # raised below: in here the error's frames would hold on to the memory
    if ran_out:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise _refuse(model, memory, suggest(0.8 * min(memory["needed"], memory["free"])), "ran out of memory in a first step")
    per_step, seconds = world * size * recipe.gradient_accumulation, median(seconds)
    audio = per_step * float(np.mean([clips.seconds[row].sum() for row in plan]))
    positions = per_step * float(np.mean([clips.lengths[row].sum() for row in plan]))

    def price(what, hours_of_audio):
        hours = hours_of_audio / audio * seconds
        return {"what": what, "audio": hours_of_audio, "steps": math.ceil(hours_of_audio * 3600 / audio), "hours": hours,
                "price": hours * recipe.price_per_hour if recipe.price_per_hour else None}

    run = price("this run", recipe.steps * audio / 3600) | {"steps": recipe.steps}
    table = [price(f"{name} {hours} h x {EPOCHS}", hours * EPOCHS) for name, hours in PLAN.items()]
    total = price("all three", EPOCHS * sum(PLAN.values())) | {"steps": sum(row["steps"] for row in table)}
    return {
        "seconds_per_step": seconds, "audio_seconds_per_step": audio, "audio_seconds_per_second": audio / seconds,
        "positions_per_second": positions / seconds, "memory": memory, "disk": disk, "peak_memory": peak,
        "epochs": recipe.steps * audio / float(clips.seconds[clips.usable].sum()), "hours": run["hours"],
        "price": run["price"], "plan": [run, *table, total],
    }


def describe_cost(cost: dict) -> str:
    """Return in words what measure_cost found: time per step, speed, memory, disk for the checkpoints.

    Also how often each clip is heard, with a warning from ten times on.
    """
    memory, disk = cost["memory"], cost["disk"]
    often = f"\neach clip is heard {cost['epochs']:.1f} times"
    if cost["epochs"] >= MANY_EPOCHS:
        often += (f": from {MANY_EPOCHS} on it is learned by heart. Give fewer steps (or epochs: {EPOCHS} in their place), or "
                  "more clips")
    return (f"{cost['seconds_per_step']:.2g} s per step, {cost['audio_seconds_per_second']:.3g} s of audio per second; memory: "
            f"{memory['needed'] / GIB:.2g} GiB needed of {memory['free'] / GIB:.2g} GiB free; disk: {disk['checkpoints']} "
            f"checkpoints of {disk['checkpoint'] / GIB:.2g} GiB, {disk['free'] / GIB:.3g} GiB free{often}")


def tabulate_cost(cost: dict) -> pd.DataFrame:
    """Return measure_cost's result as a table: this run and the plan of a language's three trainings, each for three epochs.

    Columns: audio (hours that pass through, repeats counted), steps, hours, and price if one was given.
    """
    table = pd.DataFrame(cost["plan"]).rename(columns={"audio": "audio (h)"}).set_index("what").rename_axis(None)
    table["hours"] = table["hours"].round(2)
    table["audio (h)"] = table["audio (h)"].round(2)
    if cost["price"] is None:
        return table.drop(columns="price")
    return table.assign(price=table["price"].round(2))


def estimate_disk(model, recipe: Recipe, out_dir=".") -> dict:
    """Return the bytes that checkpoints take on the disk of `out_dir`: {"checkpoint", "checkpoints", "needed", "free"}.

    Each holds what is trained (all weights, if there is no adapter) and AdamW's two moments, in float32. `checkpoints` is how
    many there are at once: those that are kept (checkpoints.prune_checkpoints) and one being written; what earlier ones of
    this training take already counts as free. Raises CostError when there is less room.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = 0 if isinstance(model, PeftModel) else sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    count = min(max(recipe.keep_checkpoints, len(plan_choices(recipe.steps))) + 1, recipe.steps)
    folder = Path(out_dir).resolve()
    held = sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    place = next(path for path in (folder, *folder.parents) if path.exists())
    disk = {"checkpoint": 12 * trained + others, "checkpoints": count}
    disk |= {"needed": count * disk["checkpoint"], "free": shutil.disk_usage(place).free + held}
    if disk["needed"] > disk["free"]:
        fewest = len(plan_choices(recipe.steps))
        fits = fewest < recipe.keep_checkpoints and (fewest + 1) * disk["checkpoint"] <= disk["free"]
        suggestions = [{"keep_checkpoints": fewest}] if fits else []
        ways = [f"keep_checkpoints={fewest}"] * fits + ["method=lora instead of full"] * (not isinstance(model, PeftModel))
        ways.append("more room there, or a runs_dir elsewhere")
        raise CostError(
            f"the training's checkpoints do not fit the disk: {count} of {disk['checkpoint'] / GIB:.2f} GiB, "
            f"{disk['needed'] / GIB:.2f} GiB, {disk['free'] / GIB:.2f} GiB are free in {place}. What helps: {', or '.join(ways)}",
            disk, suggestions)
    return disk


def estimate_memory(model, clips: Clips, recipe: Recipe) -> dict:
    """Return the bytes that training on `clips` (packing.read_clips) takes, by part: to know before the machine kills it.

    model is there already; copies (of weights in half precision, in float32), gradients, optimizer (AdamW's two moments),
    activations (kept for the backward pass of the plan's largest batch), temporary and slack (the allocator's) come on top
    and sum to needed; free is what is left now. Activations are counted on rows of at most 128 positions and scaled by what
    they grow with, exactly. Raises CostError when needed is more than free, with what would fit.
    """
    return _estimate(model, clips, recipe)[0]


def _estimate(model, clips, recipe):
    """estimate_memory's parts, and a function from free bytes to the recipes that fit them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    exchange = 2 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 1  # with more processes, the gradients in transit too
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in (*model.parameters(), *model.buffers())}
    memory = {"model": sum(held.values()), "copies": sum(p.numel() * (4 - p.itemsize) for p in trained),
              "gradients": 4 * count * exchange, "optimizer": 8 * count}
    fixed, free = sum(memory.values()) - memory["model"], count_free(model.device)
    if fixed > free:  # even before a row is looked at: its weights in float32 alone might be too much
        raise _refuse(model, memory | {"needed": fixed, "free": free}, [], "does not fit")
    fits = {less: fit_activations(model, replace(recipe, gradient_checkpointing=less)) for less in (False, True)}

    def predict(wanted):
        shapes, config = shape_batches(clips, wanted, model.device), inner_model(model).config
        kept = {less: shapes @ fit for less, fit in fits.items()}
        _, positions, _, texts, frames = shapes.max(0)
        logits = max(positions, frames * (config.num_codebooks - 1)) * config.vocab_size
        temporary = 8 * max(logits, texts * config.text_vocab_size * (wanted.text_weight > 0))  # float32, and their gradient
        if wanted.gradient_checkpointing:  # one layer at a time is computed again
            temporary = max(temporary, (kept[False] - kept[True]).max() / config.num_hidden_layers)
        most = kept[wanted.gradient_checkpointing].max()
        return {"activations": int(most), "temporary": int(temporary),
                "slack": int(SLACK.get(model.device.type, 0.1) * (most + temporary))}

    def suggest(room):
        return _suggest(lambda wanted: fixed + sum(predict(wanted).values()) <= room, clips, recipe)

    memory |= predict(recipe)
    memory |= {"needed": sum(memory.values()) - memory["model"], "free": free}
    if memory["needed"] > free:
        raise _refuse(model, memory, suggest(free), "does not fit")
    return memory, suggest


def count_free(device: torch.device) -> int:
    """Return the bytes that this process may still take on `device`; of CPU memory its share of what the container leaves."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free, left = psutil.virtual_memory().available, read_memory_left()
    return (free if left is None else min(free, left)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fit_activations(model, recipe: Recipe) -> np.ndarray:
    """Return what a training keeps for the backward pass, in bytes per column of shape_batches, counted on five small rows."""
    codebooks = inner_model(model).config.num_codebooks
    batches = [make_sample(*sample, codebooks) for sample in SAMPLES]
    shapes = [_shape([(sum(lengths), sum(n * n for n in lengths), len(lengths) * (text - 1), depth)], model.device)
              for lengths, text, depth in SAMPLES]
    with _leave_alone(model, recipe):
        return np.linalg.solve(np.array(shapes, float), [count_activations(model, batch, recipe) for batch in batches])


def make_sample(lengths, text: int, depth: int, codebooks: int) -> dict:
    """Return a batch of one row, as packing.collate makes it: clips with `text` text positions each, `depth` depth frames."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    is_frame = positions >= text
    return {"input_ids": (~is_frame).long(), "codes": is_frame[..., None].long().repeat(1, 1, codebooks), "is_frame": is_frame,
            "depth_frames": is_frame & (is_frame.cumsum(1) <= depth), "position_ids": positions}


def count_activations(model, batch: dict, recipe: Recipe) -> int:
    """Return the bytes that a forward pass keeps for the backward pass and of its output, beside the model's own."""
    kept = []

    def keep(tensor):
        held = tensor.detach()  # an output that held on to its own graph would never be freed
        kept.append(weakref.ref(held))  # some are let go again before the pass ends
        return held

    batch = {key: value.to(model.device) for key, value in batch.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half_precision(model.device.type):
        output = compute_loss(model, batch, recipe.codebook_weights, recipe.text_weight)
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for ref in kept if (tensor := ref()) is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


def shape_batches(clips: Clips, recipe: Recipe, device: torch.device) -> np.ndarray:
    """Return what memory grows with, for each batch of the recipe's plan (its first 2,048 rows): (batches, 5).

    1, positions, squares of what attends to each other (the clips on a CPU, whole rows on a GPU), text positions that
    another follows, depth frames.
    """
    texts, size = np.array([len(ids) for ids in clips.input_ids]), recipe.batch_size
    rows = []
    for row in _plan(clips, recipe):
        frames = clips.lengths[row].sum() - texts[row].sum()
        rows.append((clips.lengths[row].sum(), (clips.lengths[row] ** 2).sum(), texts[row].sum() - len(row),
                     max(1, round(recipe.depth_ratio * frames))))
    return np.array([_shape(rows[i : i + size], device) for i in range(0, len(rows), size)], float)


def _shape(rows, device):
    longest = max(row[0] for row in rows)
    padded = [squares + (longest - length) ** 2 for length, squares, _, _ in rows]  # the padding attends to itself
    squares = sum(padded) if device.type == "cpu" else len(rows) * longest**2
    return 1, len(rows) * longest, squares, sum(row[2] for row in rows), sum(row[3] for row in rows)


def _plan(clips, recipe, batches=0):
    """Return the first rows of the recipe's plan: those that are examined, at least so many batches."""
    whole = recipe.steps * recipe.batch_size * recipe.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
    return plan_rows(clips, recipe.max_tokens, max(min(EXAMINED, whole), batches * recipe.batch_size), recipe.seed)


@contextlib.contextmanager
def _leave_alone(model, recipe):
    """`model` prepared for `recipe` in training mode; afterwards its modes and the random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    device = model.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield prepare_model(model, recipe).train()
    finally:
        model.zero_grad()
        restore_model(model)
        for module, mode in modes.items():
            module.training = mode


def _time_steps(model, batches, recipe):
    """(seconds of each step but the first, peak bytes in use): training steps at a learning rate of 0."""
    device, peak, seconds = model.device, 0, []
    with _leave_alone(model, recipe):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
        for first in range(0, len(batches), recipe.gradient_accumulation):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step = batches[first : first + recipe.gradient_accumulation]
            step = [{key: value.to(device) for key, value in batch.items()} for batch in step]
            frames = sum(batch["is_frame"].sum() for batch in step)
            for batch in step:
                with half_precision(device.type):
                    loss = compute_loss(model, batch, recipe.codebook_weights, recipe.text_weight).loss
                peak = max(peak, _count_used(device))  # on a CPU it is only seen when looked at: here, and with the gradients
                (loss * batch["is_frame"].sum() / frames).backward()
            if torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, 1.0)):  # else even a rate of 0 would spoil the weights
                optimizer.step()
            peak = max(peak, _count_used(device))
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return seconds[1:], peak


def _count_used(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _suggest(fits, clips, recipe):
    """Return changes of the recipe with which it `fits`, the least costly first; several at once only where one is not enough."""
    longest, rows = int(clips.lengths[clips.usable].max()), recipe.batch_size * recipe.gradient_accumulation
    fewer = [{"batch_size": size, "gradient_accumulation": math.ceil(rows / size)}
             for size in range(recipe.batch_size - 1, 0, -1)]
    shorter = [{"max_tokens": tokens} for tokens in (*range(recipe.max_tokens // 64 * 64, longest, -64), longest)
               if tokens < recipe.max_tokens]
    least = {"gradient_checkpointing": True}
    for given in ({}, least, least | {"batch_size": 1, "gradient_accumulation": rows}):
        found = []
        for ways in ([least], fewer, shorter):
            found += [given | way for way in ways if fits(replace(recipe, **given | way))][:1]
        if found:
            return [{key: value for key, value in way.items() if value != getattr(recipe, key)} for way in found]
    return []


def _refuse(model, memory, suggestions, what):
    """Return the CostError of a training that `what` ("does not fit"), with all that could be done."""
    parts = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in memory if name not in ("model", "needed", "free"))
    ways = [" and ".join(f"{key}={str(value).lower()}" for key, value in way.items()) for way in suggestions]
    if not isinstance(model, PeftModel):
        ways.append("method=lora instead of full")
    elif model.device.type == "cuda" and not getattr(inner_model(model), "is_loaded_in_4bit", False):
        ways.append("four_bit=true")
    ways.append("more memory" if ways else "free some memory, or take a machine with more: no smaller row fits")
    return CostError(
        f"the training {what}: {memory['needed'] / GIB:.2f} GiB are needed beside the model's {memory['model'] / GIB:.2f} "
        f"({parts}), {memory['free'] / GIB:.2f} GiB are free on {model.device}. What helps: {', or '.join(ways)}",
        memory, suggestions,
    )
