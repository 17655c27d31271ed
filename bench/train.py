"""How fast CSM-1B trains: the stock way, audio encoded in every forward and rows padded, and ours, stored codes in packed rows.

    python bench/train.py                                   # all variants; 5 minutes on two cores
    python bench/train.py --variants ours stock_ratio --steps 5 --threads 2 --profile

A model of the real shape with random weights (data/csm-1b-random, 3.3 GB, made when it is not there; or --model FOLDER) is
trained with LoRA (rank 64, attention of both decoders, bfloat16) on the same clips of 2 to 12 s, each variant in a process
of its own: one step to warm up, then --steps. On a GPU where there is one. The variants:

    ours           train.trainer.train_model: stored codes, rows of --max-tokens positions, 1 frame in 16 for the depth decoder
    ours_all       the same with all frames for the depth decoder
    stock          as Unsloth's Sesame-CSM notebook: CsmProcessor with output_labels, rows padded to 256, Trainer, batch 2 x 4
    stock_ratio    the same with depth_decoder_labels_ratio=1/16
    stock_longest  stock, each batch of 2 padded to the longer one only
"""

import argparse
import contextlib
import io
import logging
import math
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from full_size import make_folder
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import encode_text, inner_model, load_base
from csm_nb.device import has_fast_bfloat16
from csm_nb.paths import ROOT
from csm_nb.recipe import Recipe
from csm_nb.text.sentences import make_sentences
from csm_nb.train.packing import plan_rows, read_clips
from csm_nb.train.trainer import train_model

VARIANTS = ("ours", "stock", "stock_ratio", "stock_longest", "ours_all")
COLUMNS = "{:<15}{:>9}{:>8}{:>10}{:>9}{:>9}{:>8}{:>9}  {}"
RATE, FRAME = 24_000, 1920  # samples per second, samples per frame of codes
SECONDS, CHARACTERS = (2.0, 12.0), 15  # length of a clip; of its text, per second
BATCH, ACCUMULATE, PADDED = 2, 4, 256  # of the notebook
RATIO = 1 / 16
WARM_UP = 1  # steps
GFLOP_POSITION, GFLOP_FRAME = 4.0, 14.8  # counted on the shape: per backbone position, per frame of the depth decoder
PEAK = 989e3  # GFLOP/s of an H100 or H200, dense, bfloat16


def make_clips(count: int, seed: int = 0) -> list[dict]:
    """Token rows (text, speaker_id, codes) of random codes; every 8 clips, a stock step, spread evenly over 2 to 12 s."""
    rng = np.random.default_rng(seed)
    words = " ".join(text for code in ("no", "sv", "da") for text in make_sentences(code, 300, seed, "test")).split()
    step, clips = BATCH * ACCUMULATE, []
    for _ in range(math.ceil(count / step)):
        for share in rng.permutation((np.arange(step) + rng.random(step)) / step):
            frames = round((SECONDS[0] + share * (SECONDS[1] - SECONDS[0])) * RATE / FRAME)
            start = rng.integers(len(words) - 60)
            text = " ".join(words[start : start + 60])[: round(frames * FRAME / RATE * CHARACTERS)].strip()
            codes = rng.integers(0, 2048, (frames, 32)).astype(np.int16)
            clips.append({"text": text, "speaker_id": str(rng.integers(2)), "codes": codes})
    return clips


def process_clips(clips, processor, ratio: float) -> datasets.Dataset:
    """The clips with noise for audio, processed as the notebook does; padded to 256 or as far as the longest one needs."""
    rng = np.random.default_rng(0)
    needed = max(len(encode_text(processor, clip["text"], clip["speaker_id"])) + len(clip["codes"]) + 1 for clip in clips)
    samples = max(len(clip["codes"]) for clip in clips) * FRAME
    rows = []
    for clip in clips:
        wav = rng.normal(0, 0.1, len(clip["codes"]) * FRAME).astype(np.float32)
        content = [{"type": "text", "text": clip["text"]}, {"type": "audio", "path": wav}]
        inputs = processor.apply_chat_template(
            [{"role": clip["speaker_id"], "content": content}], tokenize=True, return_dict=True, output_labels=True,
            depth_decoder_labels_ratio=ratio,
            text_kwargs={"padding": "max_length", "max_length": max(PADDED, math.ceil(needed / 8) * 8), "pad_to_multiple_of": 8,
                         "padding_side": "right"},
            audio_kwargs={"sampling_rate": RATE, "max_length": samples + 1, "padding": "max_length"},
            common_kwargs={"return_tensors": "pt"},
        )
        keys = ("input_ids", "attention_mask", "labels", "input_values", "input_values_cutoffs")
        rows.append({key: inputs[key][0].numpy() for key in keys})
    return datasets.Dataset.from_list(rows)


def collate_longest(rows) -> dict:
    """A batch of the notebook's rows without the positions that are padding in all of them."""
    batch = default_data_collator(rows)
    length = int(batch["attention_mask"].sum(-1).max())
    return batch | {key: batch[key][:, :length] for key in ("input_ids", "attention_mask", "labels")}


def train_stock(model, processor, clips, variant: str, steps: int, folder, clock) -> dict:
    """Trains the notebook's way and returns the work of the timed steps."""
    rows = process_clips(clips, processor, RATIO if variant == "stock_ratio" else 1.0)
    cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATE, warmup_steps=5,
        max_steps=steps, learning_rate=2e-4, bf16=has_fast_bfloat16(model.device.type), lr_scheduler_type="linear",
        weight_decay=0.01, logging_steps=1, save_strategy="no", report_to=[], use_cpu=cpu, disable_tqdm=True,
        train_sampling_strategy="sequential",  # the notebook shuffles; in order, it is known which clips were timed
        dataloader_pin_memory=not cpu,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock],
                      data_collator=collate_longest if variant == "stock_longest" else None)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    timed = rows.select([i % len(rows) for i in range(WARM_UP * BATCH * ACCUMULATE, clock.last * BATCH * ACCUMULATE)])
    frames = [row > -100 for row in map(np.array, timed["labels"])]  # -101: for the backbone alone
    return {"seconds": np.sum(timed["input_values_cutoffs"]) / RATE, "positions": np.sum(timed["attention_mask"]),
            "depth frames": np.sum(frames)}


def train_ours(model, processor, clips, recipe: Recipe, folder, clock) -> dict:
    """Trains from stored codes and returns the work of the timed steps."""
    train_model(model, processor, clips, clips[:1], folder, recipe, [clock])
    read = read_clips(clips, processor, recipe.max_tokens, RATE / FRAME)
    rows = recipe.batch_size * recipe.gradient_accumulation
    plan = plan_rows(read, recipe.max_tokens, rows * recipe.steps, recipe.seed)[rows * WARM_UP : rows * clock.last]
    frames = [sum(len(clips[i]["codes"]) + 1 for i in row) for row in plan]
    timed = np.concatenate(plan)
    return {"seconds": read.seconds[timed].sum(), "positions": read.lengths[timed].sum(),
            "depth frames": sum(max(1, round(recipe.depth_ratio * n)) for n in frames)}


class Clock(TrainerCallback):
    """When each step ended; and with `profiler`, which watches one step more, where the timed steps' time went."""

    def __init__(self, model, steps: int, profiler=None):
        self.model, self.last, self.profiler = inner_model(model), WARM_UP + steps, profiler
        self.ends, self.busy, self.split, self.then = [], [], {}, 0.0
        if profiler:
            backbone = self.model.backbone_model
            backbone.register_forward_pre_hook(lambda *_: self.mark("data, embeddings (stock: codec)"))
            backbone.register_forward_hook(lambda *given: self.watch(given[-1].last_hidden_state))

    def watch(self, hidden):
        self.mark("backbone forward")
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.mark("heads and depth decoder, forward and backward"))

    def mark(self, name):
        if self.profiler:
            now = self.now()
            self.split[name] = self.split.get(name, 0.0) + now - self.then
            self.then = now

    def now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.profiler and state.global_step == self.last:
            self.profiler.start()

    def on_substep_end(self, args, state, control, **kwargs):
        self.mark("backbone backward, clipping")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.mark("backbone backward, clipping")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.now())
        self.busy.append(time.process_time())
        if state.global_step == WARM_UP:
            self.split, self.then = {}, self.ends[-1]
        if state.global_step == self.last:
            self.kept = self.split
            self.split = {}
        if self.profiler and state.global_step == self.last + 1:
            self.profiler.stop()
        control.should_evaluate = control.should_save = False  # what a training does besides is not timed


def measure(variant: str, args) -> dict:
    """Trains one variant in this process and returns its work, seconds, peak memory (GB) and profile."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    model, processor = load_base(str(args.model.resolve()), dtype=torch.bfloat16)
    model, clips, cuda = add_adapter(model), make_clips(args.clips), torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    clock = Clock(model, args.steps, profile(activities=activities) if args.profile else None)
    steps = clock.last + args.profile
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if variant.startswith("ours"):
            recipe = Recipe(steps, max_tokens=args.max_tokens, batch_size=args.rows,
                            gradient_accumulation=args.gradient_accumulation, log_every=steps,
                            depth_ratio=RATIO if variant == "ours" else 1.0, eval_every=10**6, save_every=10**6)
            work = train_ours(model, processor, clips, recipe, folder, clock)
        else:
            work = train_stock(model, processor, clips, variant, steps, folder, clock)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    taken, busy = (times[clock.last - 1] - times[WARM_UP - 1] for times in (clock.ends, clock.busy))
    report = ""
    if args.profile:
        report = "".join(f"    {name:<46}{spent / taken:>6.0%}\n" for name, spent in clock.kept.items())
        report += clock.profiler.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=15,
                                                      max_name_column_width=50)
    return work | {"taken": taken, "cores": busy / taken, "peak": peak, "report": report}


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:4])
    parser.add_argument("--steps", type=int, default=20 if cuda else 2, help="timed steps, after one to warm up")
    parser.add_argument("--threads", type=int, help="threads on the CPU; default torch's own choice")
    parser.add_argument("--model", type=Path, default=ROOT / "data/csm-1b-random", help="folder of bench/full_size.py")
    parser.add_argument("--clips", type=int, default=512 if cuda else 24)
    parser.add_argument("--max-tokens", type=int, default=16_384 if cuda else 1024, help="ours: positions of a row")
    parser.add_argument("--rows", type=int, default=1, help="ours: rows of a batch")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="ours: batches of a step")
    parser.add_argument("--profile", action="store_true", help="where the time goes; slows a GPU down a little")
    return parser.parse_args()


def main():
    args = read_arguments()
    make_folder(args.model)
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{args.threads or torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {place}, {args.steps} steps, load before "
          f"{os.getloadavg()[0]:.1f}")
    print(COLUMNS.format("variant", "audio s/s", "ours x", "tokens/s", "s/step", "GFLOP/s", "peak", "mem GB", "timed"))
    ours = None
    for variant in args.variants:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            done = process.submit(measure, variant, args).result()
        taken, speed = done["taken"], done["seconds"] / done["taken"]
        ours = speed if variant == "ours" else ours
        flops = (done["positions"] * GFLOP_POSITION + done["depth frames"] * GFLOP_FRAME) / taken
        print(COLUMNS.format(
            variant, f"{speed:.2f}", f"{ours / speed:.2f}" if ours else "-", f"{done['positions'] / taken:.0f}",
            f"{taken / args.steps:.2f}", f"{flops:.0f}", f"{flops / PEAK:.1%}" if torch.cuda.is_available() else "-",
            f"{done['peak']:.1f}", f"{done['seconds']:.0f} s of audio in {taken:.0f} s on {done['cores']:.2f} cores",
        ), flush=True)
        if done["report"]:
            print(done["report"], flush=True)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    main()
