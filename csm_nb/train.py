"""Training from stored codes: the loss with its scale right by construction, and the Trainer around packed rows."""

import math
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from csm_nb.attention import use_attention
from csm_nb.batches import IGNORED, PackedRows, TrainingError, collate, pack_epoch, plan_rows, read_clips, read_column
from csm_nb.checkpoints import list_checkpoints, load_weights, mark_complete, prune_checkpoints, save_weights
from csm_nb.progress import LiveFigure, PrintProgress, WriteMetrics, WriteTensorBoard
from csm_nb.provenance import write_json
from csm_nb.texts import split_of

EXPLODED = 1.5  # times the first loss, or that of blind guessing if it is larger: no training that goes well is there
VALIDATION_CLIPS = 128  # about 15 minutes of speech; more only makes every evaluation slower
FEWEST_SPEAKERS = 10  # with fewer, holding one out would cost more of the voices than it tells


@dataclass(frozen=True)
class Recipe:
    """How to train. Fields of the same names are parameters of the notebooks; 0 in a `..._every` leaves it to the length."""

    steps: int
    lr: float = 2e-4
    max_tokens: int = 1024  # positions of a packed row
    batch_size: int = 1  # rows a step and process
    accumulate: int = 1  # batches a step
    depth_ratio: float = 1 / 16  # share of the frames that the depth decoder learns from
    codebook_weights: tuple = ()  # one a codebook, scaled to a mean of 1; empty: all alike
    text_weight: float = 0.0  # of the loss on the next text token
    schedule: str = "cosine"  # or linear
    recompute: bool = False  # gradient checkpointing of the backbone: less memory, a third more time
    patience: int = 0  # evaluations without gain before it stops; 0: never
    log_every: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 3
    seed: int = 0


def read_recipe(params: dict, **given) -> Recipe:
    """The recipe that a run's parameters make; `given` are the fields that a stage names otherwise (its steps, its lr).

    Raises TrainingError for a value that no training can have.
    """
    names = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in params.items() if key in names} | given)
    for name in ("steps", "max_tokens", "batch_size", "accumulate", "keep_checkpoints"):
        if getattr(recipe, name) < 1:
            raise TrainingError(f"{name} is {getattr(recipe, name)}; allowed is 1 and more")
    if not (recipe.lr > 0 and 0 < recipe.depth_ratio <= 1):
        raise TrainingError(f"lr is {recipe.lr}, depth_ratio {recipe.depth_ratio}; allowed are lr above 0, depth_ratio up to 1")
    if recipe.schedule not in ("cosine", "linear"):
        raise TrainingError(f"schedule is {recipe.schedule!r}; allowed are cosine and linear")
    return recipe


def build_inputs(model, batch: dict) -> dict:
    """What the model's forward takes: inputs_embeds, position_ids and labels (rows, positions, codebooks).

    Labels are -100 on text, padding and, in codebooks 1 and up, on frames that the depth decoder does not learn from.
    Audio is not encoded here: codes were stored before.
    """
    frames = model.backbone_model.embed_tokens(batch["codes"][batch["is_frame"]][None])[0]
    embeds = model.embed_text_tokens(batch["input_ids"]).to(frames.dtype)
    embeds = embeds.index_put((batch["is_frame"],), frames)
    labels = batch["codes"].masked_fill(~batch["is_frame"][..., None], IGNORED)
    labels[..., 1:] = labels[..., 1:].masked_fill(~batch["depth_frames"][..., None], IGNORED)
    return {"inputs_embeds": embeds, "position_ids": batch["position_ids"], "labels": labels}


def compute_loss(model, batch: dict, codebook_weights=(), text_weight: float = 0.0):
    """The model's output with .loss = mean over backbone frames + mean over depth-decoder codes.

    Both are means over what they label, so neither depends on the batch's size. Passing the Trainer's
    num_items_in_batch to the model instead makes the depth loss codebooks - 1 times too large (31 on CSM-1B).
    `codebook_weights` weigh codebook 0 (the backbone's) and the others; `text_weight` adds the loss on the next text
    token, with the text table as the head.
    """
    inner = inner_model(getattr(model, "module", model))
    inputs = build_inputs(inner, batch)
    output = model(**inputs, use_cache=False, output_hidden_states=text_weight > 0)
    if len(codebook_weights):
        weights = torch.tensor(codebook_weights, dtype=torch.float32, device=output.loss.device)
        if len(weights) != inputs["labels"].shape[-1] or weights.min() < 0 or weights.sum() == 0:
            raise TrainingError(f"codebook_weights holds {list(codebook_weights)}; allowed are {inputs['labels'].shape[-1]} "
                                "numbers of 0 and more, not all 0, one a codebook, or none at all")
        weights = weights / weights.mean()
        targets = inputs["labels"][batch["depth_frames"]][:, 1:]
        logits = output.depth_decoder_logits.float()
        depth = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(0)
        output.loss = weights[0] * output.backbone_loss + (weights[1:] * depth).mean()
    if text_weight > 0:
        is_text = ~batch["is_frame"][:, :-1] & ~batch["is_frame"][:, 1:] & (batch["position_ids"].diff() == 1)
        is_text &= batch["input_ids"][:, 1:] != 0  # not the padding
        hidden = output.hidden_states[-1][:, :-1][is_text]
        logits = hidden @ inner.embed_text_tokens.weight.to(hidden.dtype).T
        output.loss = output.loss + text_weight * cross_entropy(logits.float(), batch["input_ids"][:, 1:][is_text])
    return output


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster on `device`: on a GPU, on a CPU with AVX512-BF16 or AMX."""
    return device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def half_precision(device: str) -> torch.autocast:
    """A context in which matrix products run in bfloat16 where that is faster; the weights stay as they are.

    For language models and judges; a codec trained in it diverges (its thin convolutions need the digits).
    """
    return torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device))


class CsmTrainer(Trainer):
    """transformers' Trainer on packed rows: the loss, its parts in the log, and checkpoints that are whole are its own."""

    def __init__(self, *args, recipe: Recipe, frame_rate: float, **kwargs):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.recipe, self.frame_rate = recipe, frame_rate
        self.model_accepts_loss_kwargs = True  # the Trainer counts the labelled frames of a whole step and hands them over
        config = self.accelerator.unwrap_model(self.model).config
        self.guess = 2 * math.log(config.vocab_size)  # nats: both decoders choose evenly
        self.sums = {True: torch.zeros(4), False: torch.zeros(4)}  # training or not: loss, backbone, depth, all by frame; frames
        self.rows_of_step = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, frames = inputs.pop("row"), inputs["is_frame"].sum()
        output = compute_loss(model, inputs, self.recipe.codebook_weights, self.recipe.text_weight)
        if model.training:
            self.rows_of_step += rows.tolist()
            loss = output.loss.item()
            first = next((row["loss"] for row in self.state.log_history if "loss" in row), loss)
            if not (math.isfinite(loss) and loss <= EXPLODED * max(first, self.guess)):
                self.stop(f"the loss is {loss:.4g} (it began with {first:.4g}, blind guessing has {self.guess:.1f})")
        parts = torch.stack([output.loss, output.backbone_loss, output.depth_decoder_loss]).detach().float() * frames
        self.sums[model.training] += torch.cat([parts, frames[None].float()]).cpu()
        loss = output.loss
        if num_items_in_batch is not None:  # frames count alike, in whichever batch and process of the step they are
            loss = loss * frames / num_items_in_batch * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if not (math.isfinite(norm) and norm > 0):  # at 0 nothing is learned any more: what too large a rate leaves behind
            self.stop(f"the gradient's norm is {float(norm)}")
        self.rows_of_step.clear()
        return norm

    def stop(self, what: str):
        """Raises TrainingError with the step, its clips and the newest good checkpoint; no weight has moved yet."""
        done = list_checkpoints(self.args.output_dir)
        kept = f"the newest good checkpoint is {done[-1][1]}" if done else "no checkpoint was written yet"
        clips = "; ".join(self.train_dataset.describe(i) for i in self.rows_of_step)
        raise TrainingError(f"{what} at step {self.state.global_step}: lower lr or look at the clips of this step; {kept}. "
                            f"The clips: {clips}")

    def log(self, logs, start_time=None):
        kind = "loss" in logs
        if kind or "eval_loss" in logs:
            sums = self.accelerator.reduce(self.sums[kind].to(self.args.device), "sum").cpu()
            total, backbone, depth = (sums[:3] / sums[3]).tolist()
            prefix = "" if kind else "eval_"
            logs |= {prefix + "backbone_loss": backbone, prefix + "depth_loss": depth}
            logs |= {"audio_seconds": sums[3].item() / self.frame_rate} if kind else {"eval_loss": total}
            self.sums[kind].zero_()
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        save_weights(self.accelerator.unwrap_model(self.model), output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _save_checkpoint(self, model, trial):
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
            mark_complete(folder, {"step": self.state.global_step} | losses)
            prune_checkpoints(self.args.output_dir, self.recipe.keep_checkpoints)


def train_model(model, processor, train_rows, valid_rows, out_dir, recipe: Recipe, callbacks=()) -> list[dict]:
    """Trains what is trainable in `model` on token rows and returns the loss history; `model` holds the trained weights.

    Goes on from the newest complete checkpoint in `out_dir`, if one is there, as if it had never stopped. Entries of the
    history are {"step", "loss", ...} and {"step", "eval_loss", ...} (on a fixed draw of frames), with the parts of each
    decoder. The log also goes to out_dir/metrics.jsonl. Raises TrainingError when
    there is nothing to train on, the loss explodes or is no number, or a checkpoint can not be written.
    """
    out_dir, device = Path(out_dir), next(model.parameters()).device.type
    rate = inner_model(model).codec_model.config.frame_rate
    clips = read_clips(train_rows, processor, recipe.max_tokens, rate)
    held_out = read_clips(valid_rows, processor, recipe.max_tokens, rate)
    arguments = build_arguments(out_dir, recipe, device)
    count = recipe.steps * recipe.batch_size * recipe.accumulate * arguments.world_size
    plan = plan_rows(clips, recipe.max_tokens, count, recipe.seed)
    trainer = CsmTrainer(
        model=prepare_model(model, recipe), args=arguments, recipe=recipe, frame_rate=rate,
        train_dataset=PackedRows(clips, plan, recipe.depth_ratio, recipe.seed),
        eval_dataset=PackedRows(held_out, plan_validation(held_out, recipe), recipe.depth_ratio, recipe.seed),
        callbacks=[PrintProgress(), WriteMetrics(), WriteTensorBoard(), LiveFigure(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.patience:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    done = list_checkpoints(out_dir)
    if clips.set_aside:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "set_aside.json", clips.set_aside)
        print(f"{len(clips.set_aside)} clips are longer than a row and set aside, all in set_aside.json:", *clips.set_aside[:5],
              sep="\n  ")
    if done:
        print(f"goes on from {done[-1][1].name}")
    try:
        trainer.train(resume_from_checkpoint=str(done[-1][1]) if done else None)
    finally:
        restore_model(model)
    return [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]


def plan_validation(clips, recipe: Recipe) -> list[list[int]]:
    """The rows of the held-out clips, the same at every evaluation: at most 128 clips, drawn by the recipe's seed."""
    rng = np.random.default_rng(recipe.seed)
    chosen = np.sort(rng.permutation(clips.usable)[:VALIDATION_CLIPS])
    return pack_epoch(clips.lengths, chosen, recipe.max_tokens, rng)


def build_arguments(out_dir, recipe: Recipe, device: str) -> TrainingArguments:
    """TrainingArguments of a recipe. Batches come in the plan's order; what is saved or logged when follows the length."""
    evaluate = recipe.eval_every or max(1, math.ceil(recipe.steps / 4))
    return TrainingArguments(
        output_dir=str(out_dir), max_steps=recipe.steps, learning_rate=recipe.lr, seed=recipe.seed, data_seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate, lr_scheduler_type=recipe.schedule,
        warmup_steps=max(1, recipe.steps // 10), max_grad_norm=1.0, bf16=has_fast_bfloat16(device), use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        train_sampling_strategy="sequential", remove_unused_columns=False,
        logging_steps=recipe.log_every or max(1, recipe.steps // 10), logging_first_step=True, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=evaluate, eval_on_start=not list_checkpoints(out_dir), save_strategy="steps",
        save_steps=recipe.save_every or evaluate, metric_for_best_model="eval_loss", greater_is_better=False,
        restore_callback_states_from_checkpoint=True, report_to=[], disable_tqdm=True,
        dataloader_num_workers=2 if device == "cuda" else 0, dataloader_pin_memory=device == "cuda",
    )


def inner_model(model):
    """The CSM model itself, without an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prepare_model(model, recipe: Recipe):
    """Makes `model` ready to be trained: what is trained in float32, attention that does not mix packed clips, gradient
    checkpointing on the backbone if asked for (the depth decoder writes into its input, which that does not survive).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("nothing in the model is trainable; add an adapter (csm.add_adapter) or csm.train_fully")
    for parameter in trained:
        parameter.data = parameter.data.float()
    inner = inner_model(model)
    use_attention(inner, training=True)
    if recipe.recompute:
        inner.backbone_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def restore_model(model) -> None:
    """Undoes what prepare_model changed for the training alone, and goes back to eval mode."""
    inner = inner_model(model)
    use_attention(inner, training=False)
    if inner.backbone_model.is_gradient_checkpointing:
        inner.backbone_model.gradient_checkpointing_disable()
    model.eval()


def split_rows(rows):
    """(train, held out, how it was split), as the Dataset or list that `rows` is.

    One speaker in ten is held out, and their sentences are taken from the training. With fewer than 10 speakers it is one
    sentence in ten, by its hash, whoever says it. So no sentence is ever in both. Raises TrainingError when a side is empty.
    """
    speakers, texts = (read_column(rows, name) for name in ("speaker_id", "text"))
    voices = sorted(set(speakers))
    if len(voices) >= FEWEST_SPEAKERS:
        held_voices = set(voices[::10])
        held = [i for i, voice in enumerate(speakers) if voice in held_voices]
        known = {texts[i] for i in held}
        train = [i for i, voice in enumerate(speakers) if voice not in held_voices and texts[i] not in known]
        how = f"{len(held)} clips of {len(held_voices)} held-out speakers of {len(voices)}"
    else:
        held = [i for i, text in enumerate(texts) if split_of(text) != "train"]
        train = [i for i, text in enumerate(texts) if split_of(text) == "train"]
        how = f"{len(held)} with held-out sentences ({len(voices)} speakers: too few to hold one out)"
    if not train or not held:
        raise TrainingError(f"{len(texts)} clips leave {len(train)} to train on and {len(held)} held out; "
                            "both are needed: give more clips with different sentences")
    return _take(rows, train), _take(rows, held), how


def _take(rows, indices):
    return rows.select(indices) if isinstance(rows, datasets.Dataset) else [rows[i] for i in indices]
