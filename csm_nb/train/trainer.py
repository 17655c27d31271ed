"""Training from stored codes: transformers' Trainer on packed rows, resumed from checkpoints that are complete."""

import contextlib
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from csm_nb.claims import LEASE, hold, name_holder
from csm_nb.csm.load import inner_model
from csm_nb.device import has_fast_bfloat16
from csm_nb.paths import show_path
from csm_nb.provenance import read_json, write_json
from csm_nb.recipe import Recipe, TrainingError
from csm_nb.text.sentences import VALIDATION_CLIPS
from csm_nb.train.checkpoints import MARKER, list_checkpoints, load_weights, mark_complete, prune_checkpoints, save_weights
from csm_nb.train.loss import compute_loss, find_text_targets, prepare_model, restore_model
from csm_nb.train.pace import KeepPace, WriteMetrics
from csm_nb.train.packing import PackedRows, collate, pack_epoch, plan_rows, read_clips

LENGTH = "length.json"  # in a training's folder: how many steps it was begun with, on how many processes
EXPLODED = 1.5  # times the larger of the first loss and that of blind guessing; no training that goes well gets there


class CsmTrainer(Trainer):
    """transformers' Trainer on packed rows, with its own loss, the parts of it in the log, and checkpoints that are complete."""

    def __init__(self, *args, recipe: Recipe, frame_rate: float, **kwargs):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.recipe, self.frame_rate = recipe, frame_rate
        self.model_accepts_loss_kwargs = True  # the Trainer counts the labelled frames of a whole step and hands them over
        config = self.accelerator.unwrap_model(self.model).config
        self.guess = 2 * math.log(config.vocab_size)  # nats: both decoders choose evenly
        self.trained, self.validated = torch.zeros(6), {}  # sums of the loss's parts since the last log, and by held-out row
        self.rows_of_step, self.held = [], None  # the claim on output_dir

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Return the Trainer's schedule begun one step later (its last_epoch is 0): at a rate of 0 step 1 would learn nothing."""
        for group in (optimizer or self.optimizer).param_groups:
            group.setdefault("initial_lr", group["lr"])
        return super().create_scheduler(num_training_steps + 1, optimizer)

    def _get_num_items_in_batch(self, batch_samples, device):
        frames = super()._get_num_items_in_batch(batch_samples, device)
        if frames is None or not self.recipe.text_weight:
            return frames
        texts = sum(find_text_targets(batch).sum() for batch in batch_samples).to(device)
        return torch.stack([frames, self.accelerator.reduce(texts, "sum")])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a batch in nats, with `return_outputs` also the model's output; its parts go to the log.

        `num_items_in_batch` is how many frames the whole step labels, or (frames, text tokens). With it the loss is scaled so
        that each counts the same, in whichever batch and process of the step it is. Raises TrainingError (stop) in training
        when the loss explodes: it is not finite, or over EXPLODED times the first one and that of blind guessing.
        """
        rows, frames = inputs.pop("row"), inputs["is_frame"].sum()
        output = compute_loss(model, inputs, self.recipe.codebook_weights, self.recipe.text_weight)
        texts = find_text_targets(inputs).sum() if self.recipe.text_weight else frames.new_zeros(())
        text = self.recipe.text_weight * output.text_loss if self.recipe.text_weight else output.loss.new_zeros(())
        audio = output.loss - text
        parts = torch.stack([audio * frames, text * texts, output.backbone_loss * frames, output.depth_decoder_loss * frames,
                             frames, texts]).detach().float().cpu()
        if model.training:
            self.rows_of_step += rows.tolist()
            loss = output.loss.item()
            first = next((row["loss"] for row in self.state.log_history if "loss" in row), loss)
            if not (math.isfinite(loss) and loss <= EXPLODED * max(first, self.guess)):
                self.stop(f"the loss is {loss:.4g} (it began with {first:.4g}, blind guessing has {self.guess:.1f})")
            self.trained += parts
        else:
            self.validated[int(rows)] = parts  # a row that a process repeats, to have as many as the others, counts once
        loss = output.loss
        if num_items_in_batch is not None:  # frames count alike, and text tokens, in whichever batch and process of the step
            counts = num_items_in_batch.expand(2) if num_items_in_batch.dim() == 0 else num_items_in_batch
            loss = (audio * frames / counts[0] + text * texts / counts[1]) * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return (loss, None, None) of a held-out row: an evaluation needs no logits, and its loss comes from log."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if not (math.isfinite(norm) and norm > 0):  # 0 is what too high a rate leaves: nothing is learned any more
            self.stop(f"the gradient's norm is {float(norm)}")
        self.rows_of_step.clear()
        return norm

    def stop(self, what: str):
        """Raise TrainingError with the step, its clips and the newest good checkpoint, before the step changes a weight."""
        done = list_checkpoints(self.args.output_dir)
        kept = f"the newest good checkpoint is {done[-1][1]}" if done else "no checkpoint was written yet"
        clips = "; ".join(self.train_dataset.describe(i) for i in self.rows_of_step)
        raise TrainingError(f"{what} at step {self.state.global_step}: lower lr or look at the clips of this step; {kept}. "
                            f"The clips: {clips}")

    def log(self, logs, start_time=None):
        """Add to a line of the log the parts of its loss in nats, and how many seconds of audio were trained on since the last.

        The loss of an evaluation is computed here: a mean over all held-out frames, not over rows.
        """
        kind = "loss" in logs
        if kind or "eval_loss" in logs:
            sums = self._sum_up(kind)
            audio, text, backbone, depth = (sums[:4] / sums[[4, 5, 4, 4]].clamp(min=1)).tolist()
            prefix = "" if kind else "eval_"
            logs |= {prefix + "backbone_loss": backbone, prefix + "depth_loss": depth}
            logs |= {prefix + "text_loss": text / self.recipe.text_weight} if self.recipe.text_weight else {}
            logs |= {"audio_seconds": sums[4].item() / self.frame_rate} if kind else {"eval_loss": audio + text}
        super().log(logs, start_time)

    def _sum_up(self, training):
        """Return the sums over all processes of what was seen since the last log, with each held-out row once."""
        if training:
            sums = self.accelerator.reduce(self.trained.to(self.args.device), "sum").cpu()
            self.trained.zero_()
            return sums
        table = torch.zeros(len(self.eval_dataset), 7)  # the sums, and in how many processes the row was
        for row, parts in self.validated.items():
            table[row] = torch.cat([parts, torch.ones(1)])
        self.validated.clear()
        table = self.accelerator.reduce(table.to(self.args.device), "sum").cpu()
        return (table[:, :6] / table[:, 6:]).sum(0)

    def _save(self, output_dir=None, state_dict=None):
        save_weights(self.accelerator.unwrap_model(self.model), output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _save_checkpoint(self, model, trial):
        if self.held and self.held.compromise:
            raise TrainingError(f"{show_path(self.args.output_dir)} was taken over at step {self.state.global_step}, as this "
                                f"process gave no sign of life for {LEASE:.0f} s; run again: it takes what the other one leaves")
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            done = list_checkpoints(self.args.output_dir)
            kept = f"the newest good one is {done[-1][1]}" if done else "there is none before it"
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            raise TrainingError(f"the checkpoint of step {self.state.global_step} can not be written ({error}; {free:.0f} MiB "
                                f"are free); {kept}. Make room and run again: it goes on from there") from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rows = [row for row in self.state.log_history if row["step"] == self.state.global_step]  # no loss of an earlier step
            losses = {k: v for row in rows for k, v in row.items() if k.endswith("loss")}
            stopped = self.control.should_training_stop and self.state.global_step < self.state.max_steps
            mark_complete(folder, {"step": self.state.global_step} | losses | ({"stopped": True} if stopped else {}))
            prune_checkpoints(self.args.output_dir, self.recipe.keep_checkpoints, plan_choices(self.recipe.steps))


def train_model(model, processor, train_rows, valid_rows, out_dir, recipe: Recipe, callbacks=()) -> list[dict]:
    """Train what is trainable in `model` on token rows and return the loss history; `model` holds the trained weights.

    A training goes on from the newest complete checkpoint in `out_dir`, if there is one, as if it had never stopped. One
    that stopped early (`patience`) stays stopped. It holds `out_dir` (claims.hold): where another process trains there, it
    waits and takes what that one leaves.

    Entries of the history are {"step", "loss", ...} and {"step", "eval_loss", ...} in nats, with the parts of each decoder;
    evaluations use a fixed draw of frames. The log also goes to out_dir/metrics.jsonl, and clips that are too long to
    out_dir/set_aside.json. Raises TrainingError when there is nothing to train on, the loss explodes or is not finite, a
    checkpoint can not be written, or another process takes over or holds `out_dir` and there is no waiting for it (several
    processes).
    """
    out_dir = Path(out_dir)
    one, first = int(os.environ.get("WORLD_SIZE", 1)) == 1, int(os.environ.get("RANK", 0)) == 0
    try:
        with hold(out_dir, wait=one) if first else contextlib.nullcontext() as held:
            return _train(model, processor, train_rows, valid_rows, out_dir, recipe, callbacks, held)
    except Timeout as error:  # the other processes of this training would go on from what is there now
        raise TrainingError(f"{name_holder(out_dir)} trains in {show_path(out_dir)}; stop it, or wait for its end") from error


def _train(model, processor, train_rows, valid_rows, out_dir, recipe, callbacks, held):
    device, done = next(model.parameters()).device.type, list_checkpoints(out_dir)
    recipe = fix_steps(recipe, train_rows, processor, model, out_dir)
    config, rate = inner_model(model).config, inner_model(model).codec_model.config.frame_rate
    clips, held_out = (read_clips(rows, processor, recipe.max_tokens, rate, config.max_position_embeddings)
                       for rows in (train_rows, valid_rows))
    if done and read_json(done[-1][1] / MARKER).get("stopped"):
        print(f"it stopped early at step {done[-1][0]} (patience={recipe.patience}) and stays so; delete {done[-1][1]} to go on")
        recipe = replace(recipe, steps=done[-1][0])
    if held and not done:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / LENGTH, {"steps": recipe.steps, "processes": int(os.environ.get("WORLD_SIZE", 1))})
    arguments = build_arguments(out_dir, recipe, device)
    count = recipe.steps * recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    plan = plan_rows(clips, recipe.max_tokens, count, recipe.seed)
    pace = KeepPace(recipe.log_seconds, recipe.save_minutes, plan_choices(recipe.steps))
    stop_early = [EarlyStoppingCallback(recipe.patience)] if recipe.patience else []
    trainer = CsmTrainer(
        model=prepare_model(model, recipe), args=arguments, recipe=recipe, frame_rate=rate,
        train_dataset=PackedRows(clips, plan, recipe.depth_ratio, recipe.seed),
        eval_dataset=PackedRows(held_out, plan_validation(held_out, recipe), recipe.depth_ratio, recipe.seed),
        callbacks=[*stop_early, pace, WriteMetrics(), *callbacks],
    )
    trainer.held = held
    trainer.remove_callback(PrinterCallback)
    if clips.set_aside and trainer.is_world_process_zero():
        write_json(out_dir / "set_aside.json", clips.set_aside)
        print(f"{len(clips.set_aside)} clips are too long and set aside, all in set_aside.json:", *clips.set_aside[:5],
              sep="\n  ")
    if done and done[-1][0] >= recipe.steps:
        print(f"trained before: {done[-1][0]} steps, in {show_path(out_dir)}")
    elif done:
        print(f"goes on from {done[-1][1].name}")
    try:
        trainer.train(resume_from_checkpoint=str(done[-1][1]) if done else None)
    finally:
        restore_model(model)
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def fix_steps(recipe: Recipe, rows, processor, model, out_dir) -> Recipe:
    """Return `recipe` with steps in place of epochs: as many as read the clips of `rows` so often, packed.

    A training that has begun in `out_dir` keeps its length, on however many processes it goes on.
    """
    if recipe.steps:
        return recipe
    begun = read_json(Path(out_dir) / LENGTH).get("steps") if list_checkpoints(out_dir) else None
    if begun:
        return replace(recipe, steps=begun, epochs=0.0)
    inner, world = inner_model(model), int(os.environ.get("WORLD_SIZE", 1))
    clips = read_clips(rows, processor, recipe.max_tokens, inner.codec_model.config.frame_rate,
                       inner.config.max_position_embeddings)
    epoch = pack_epoch(clips.lengths, clips.usable, recipe.max_tokens, np.random.default_rng([recipe.seed, 0]))
    steps = max(1, math.ceil(recipe.epochs * len(epoch) / (recipe.batch_size * recipe.gradient_accumulation * world)))
    return replace(recipe, steps=steps, epochs=0.0)


def plan_validation(clips, recipe: Recipe) -> list[list[int]]:
    """Return the rows of the held-out clips, the same at every evaluation: at most 128 clips, drawn by the recipe's seed."""
    rng = np.random.default_rng(recipe.seed)
    chosen = np.sort(rng.permutation(clips.usable)[:VALIDATION_CLIPS])
    return pack_epoch(clips.lengths, chosen, recipe.max_tokens, rng)


def plan_choices(steps: int) -> list[int]:
    """Return the steps whose checkpoints the choice is between: 7, 8 and 9 ninths of `steps`, each once.

    They are written, evaluated and kept whatever the clock says (pace.KeepPace).
    """
    return sorted({-(-steps * ninth // 9) for ninth in (7, 8, 9)})


def plan_evaluations(recipe: Recipe) -> list[int]:
    """Return the steps after which a training evaluates: every eval_every (by default thirds), and those of plan_choices."""
    every = recipe.eval_every or -(-recipe.steps // 3)
    return sorted({*range(every, recipe.steps, every), *plan_choices(recipe.steps)})


def build_arguments(out_dir, recipe: Recipe, device: str) -> TrainingArguments:
    """Return the TrainingArguments of a recipe.

    Batches come in the plan's order. When it logs, evaluates and saves follows from the recipe and the number of steps, and
    from the clock (pace.KeepPace). It trains on one device, unless launched in more processes (torchrun -m
    csm_nb.runs.launch).
    """
    evaluate = recipe.eval_every or -(-recipe.steps // 3)
    arguments = TrainingArguments(
        output_dir=str(out_dir), max_steps=recipe.steps, learning_rate=recipe.lr, seed=recipe.seed, data_seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=1,  # one: rows by their number, see _sum_up
        gradient_accumulation_steps=recipe.gradient_accumulation,
        lr_scheduler_type=recipe.schedule, lr_scheduler_kwargs={"last_epoch": 0},
        warmup_steps=max(1, recipe.steps // 10), max_grad_norm=1.0, bf16=has_fast_bfloat16(device), use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        ddp_find_unused_parameters=False,  # all are used, though the embeddings outside of the wrapped forward
        train_sampling_strategy="sequential", remove_unused_columns=False,
        logging_steps=recipe.log_every or max(1, recipe.steps // 10), logging_first_step=True, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=evaluate, eval_on_start=not list_checkpoints(out_dir), save_strategy="steps",
        save_steps=recipe.save_every or evaluate, metric_for_best_model="eval_loss", greater_is_better=False,
        restore_callback_states_from_checkpoint=True, report_to=[], disable_tqdm=True,
        dataloader_num_workers=2 if device == "cuda" else 0, dataloader_pin_memory=device == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the Trainer would put all visible ones under nn.DataParallel, which CSM can't
    return arguments
