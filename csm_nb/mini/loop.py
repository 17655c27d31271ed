"""The training loop that the recipe of the miniature models shares: by the clock, seeded, resumable after a kill."""

import math
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch

from csm_nb.provenance import replace_file


def fit(modules, compute_loss, minutes: float, work, lr: float, seed: int = 0, betas=(0.9, 0.99), weight_decay: float = 0.0,
        log_every: int = 50, save_every_seconds: float = 60.0, clip: float = 1.0) -> dict:
    """Train `modules` (name -> nn.Module) for `minutes` of training time; return {"steps", "seconds", "losses", "asked"}.

    `compute_loss(rng, done)` gets a numpy generator seeded by (seed, step) and the share of the time that is used up,
    and returns (loss, {name: value for the log}). Warm-up over 2 % of the time, then cosine to zero. A checkpoint is
    written every minute and replaced in one move; a killed run goes on from it with the data that it would have seen,
    and a finished one with more minutes goes on at the rate that it would have there (`asked` lists them all).
    """
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    progress = {"steps": 0, "seconds": 0.0, "losses": [], "asked": []}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        used = f"{progress['seconds'] / 60:.1f} of {minutes:g} minutes used"
        print(f"{work}: goes on from step {progress['steps']}, {used}", flush=True)
    if progress["asked"][-1:] != [minutes]:
        progress["asked"].append(minutes)
    step, seconds = progress["steps"], progress["seconds"]
    window, saved, last = [], time.monotonic(), time.monotonic()
    while seconds < 60 * minutes:
        done = seconds / (60 * minutes)
        rate = lr * min(1.0, done / 0.02 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed * 1_000_003 + step)
        loss, parts = compute_loss(np.random.default_rng((seed, step)), done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        if torch.isfinite(norm):
            optimizer.step()
        step += 1
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        progress |= {"steps": step, "seconds": seconds}
        window.append(parts)
        if step % log_every == 0:
            mean = {key: float(np.mean([row[key] for row in window])) for key in window[-1]}
            progress["losses"].append({"step": step, **mean})
            window.clear()
            print(f"{work.name} step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
                  + f"  norm {norm:.2f}  {step / seconds:.2f} steps/s  {max(0, minutes - seconds / 60):.1f} min left", flush=True)
        if now - saved > save_every_seconds:
            save_checkpoint(checkpoint, modules, optimizer, progress)
            saved = now
    save_checkpoint(checkpoint, modules, optimizer, progress)
    return progress


def describe_training(result: dict, seed: int) -> dict:
    """Return what a card says of a training: minutes asked for (several if it went on), seed, steps, seconds, and so on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    processor = f"{torch.get_num_threads()} threads of {names[0] if names else platform.processor() or 'a CPU'}"
    return {"minutes": result["asked"], "seed": seed, "steps": result["steps"], "seconds": round(result["seconds"]),
            "last": result["losses"][-1:], "processor": processor}


def save_checkpoint(path, modules, optimizer, progress: dict) -> None:
    """Write the whole training state beside `path` and move it into place: a kill leaves the old or the new one."""
    weights = {name: module.state_dict() for name, module in modules.items()}
    with replace_file(Path(path)) as partial:
        torch.save({"modules": weights, "optimizer": optimizer.state_dict(), "progress": progress}, partial)
