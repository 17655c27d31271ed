"""Training from stored codes: sequences, the loss with its scale right by construction, and the Trainer around it."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from csm_nb.csm import encode_text
from csm_nb.texts import split_of

IGNORED = -100


class TrainingError(RuntimeError):
    """Training that can not go on: no clips, or a loss that is no number; names the step."""


def build_examples(rows, processor) -> list[dict]:
    """Token rows (text, codes, speaker_id) as training examples: input_ids (long) and codes (frames x codebooks, long).

    A last frame of zeros in every codebook is appended: the end-of-speech frame. A model that is not trained on it
    never stops.
    """
    if len(rows) == 0:
        raise TrainingError("there is no clip to train on; look at the clips that were set aside above")
    examples = []
    for row in rows:
        codes = torch.as_tensor(np.asarray(row["codes"]).astype(np.int64))
        input_ids = torch.tensor(encode_text(processor, row["text"], row["speaker_id"]))
        end = torch.zeros(1, codes.shape[1], dtype=torch.long)
        examples.append({"input_ids": input_ids, "codes": torch.cat([codes, end])})
    return examples


def collate(examples, depth_ratio: float = 1.0, generator: torch.Generator | None = None) -> dict:
    """Right-padded batch: input_ids (batch, text), codes (batch, frames, codebooks) with their lengths, and depth_frames.

    depth_frames (batch, frames, bool) are the frames that the depth decoder learns from: a fresh draw of `depth_ratio`
    of them at every call, and always the end-of-speech frame.
    """
    input_ids = pad_sequence([e["input_ids"] for e in examples], batch_first=True)
    codes = pad_sequence([e["codes"] for e in examples], batch_first=True)
    text_lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    frame_lengths = torch.tensor([len(e["codes"]) for e in examples])
    frames = torch.arange(codes.shape[1])
    depth_frames = torch.rand(codes.shape[:2], generator=generator) < depth_ratio
    depth_frames |= frames == (frame_lengths - 1)[:, None]
    depth_frames &= frames < frame_lengths[:, None]
    if depth_frames.sum() == codes.shape[-1]:
        # transformers 5.17 fails on as many depth frames as codebooks: it takes its 1-D position_ids for a batch of them
        row, frame = (frames < frame_lengths[:, None] - 1).nonzero()[0]
        depth_frames[row, frame] ^= True
    return {"input_ids": input_ids, "codes": codes, "text_lengths": text_lengths, "frame_lengths": frame_lengths,
            "depth_frames": depth_frames}


def build_inputs(model, batch: dict) -> dict:
    """What the model's forward takes: inputs_embeds, attention_mask and labels (batch, sequence, codebooks).

    Each row is its text, then its frames, then padding; labels are -100 on text, padding and, in codebooks 1 and up,
    on frames that the depth decoder does not learn from. Audio is not encoded here: codes were stored before.
    """
    text, frames = model.embed_text_tokens(batch["input_ids"]), model.backbone_model.embed_tokens(batch["codes"])
    count = len(text)
    length = int((batch["text_lengths"] + batch["frame_lengths"]).max())
    embeds = text.new_zeros(count, length, text.shape[-1])
    labels = torch.full((count, length, batch["codes"].shape[-1]), IGNORED, device=text.device)
    mask = torch.zeros(count, length, dtype=torch.long, device=text.device)
    targets = batch["codes"].clone()
    targets[..., 1:][~batch["depth_frames"]] = IGNORED
    for row, (t, f) in enumerate(zip(batch["text_lengths"].tolist(), batch["frame_lengths"].tolist(), strict=True)):
        embeds[row, :t] = text[row, :t]
        embeds[row, t : t + f] = frames[row, :f]
        labels[row, t : t + f] = targets[row, :f]
        mask[row, : t + f] = 1
    return {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels}


def compute_loss(model, batch: dict):
    """The model's output with .loss = mean over backbone frames + mean over depth-decoder codes.

    Both are means over what they label, so neither depends on the batch's size. Passing the Trainer's
    num_items_in_batch instead would make the depth loss codebooks - 1 times too large (31 on CSM-1B).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model(**build_inputs(inner, batch), use_cache=False)


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster on `device`: on a GPU, on a CPU with AVX512-BF16 or AMX."""
    return device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def half_precision(device: str) -> torch.autocast:
    """A context in which matrix products run in bfloat16 where that is faster; the weights stay as they are.

    For language models and judges; a codec trained in it diverges (its thin convolutions need the digits).
    """
    return torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device))


class CsmTrainer(Trainer):
    """transformers' Trainer on stored codes: only the collation of validation and the loss are its own."""

    model_accepts_loss_kwargs = False

    def __init__(self, *args, depth_ratio: float, seed: int, **kwargs):
        super().__init__(*args, data_collator=lambda examples: collate(examples, depth_ratio), **kwargs)
        self.model_accepts_loss_kwargs = False
        self.fixed_collator = lambda examples: collate(examples, depth_ratio, torch.Generator().manual_seed(seed))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = compute_loss(model, inputs)
        if not torch.isfinite(output.loss):
            step = self.state.global_step
            raise TrainingError(f"the loss is {output.loss.item()} at step {step}; lower lr or look at the clips")
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def get_eval_dataloader(self, eval_dataset=None):
        drawn, self.data_collator = self.data_collator, self.fixed_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = drawn


class PrintProgress(TrainerCallback):
    """One line every few steps with losses, rate and the time that is left: readable in a notebook and in a log."""

    def __init__(self):
        self.start = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or (time.monotonic(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or self.start is None or not {"loss", "eval_loss"} & logs.keys():
            return
        seconds = time.monotonic() - self.start[0]
        rate = (state.global_step - self.start[1]) / max(seconds, 1e-9)
        losses = "  ".join(f"{key} {logs[key]:.3f}" for key in ("loss", "eval_loss") if key in logs)
        left = (state.max_steps - state.global_step) / max(rate, 1e-9)
        print(f"step {state.global_step}/{state.max_steps}  {losses}  {rate:.2f} steps/s  {left:.0f} s left", flush=True)


def train_adapter(model, processor, train_rows, valid_rows, out_dir, steps: int, lr: float = 2e-4, batch_size: int = 8,
                  depth_ratio: float = 1 / 16, seed: int = 0, log_every: int | None = None) -> list[dict]:
    """Trains what is trainable in `model` on token rows for `steps` steps and returns the loss history.

    Each entry is {"step", "loss"} or {"step", "eval_loss"} (validation on a fixed draw of frames). `model` holds the
    trained weights afterwards. Raises TrainingError when there is nothing to train on or the loss is no number.
    """
    examples, valid = build_examples(train_rows, processor), build_examples(valid_rows, processor)
    every, device = log_every or max(1, steps // 10), next(model.parameters()).device.type
    arguments = TrainingArguments(
        output_dir=str(Path(out_dir)), max_steps=steps, learning_rate=lr, per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 10),
        logging_steps=every, eval_strategy="steps", eval_steps=max(1, math.ceil(steps / 4)), save_strategy="no",
        train_sampling_strategy="group_by_length", remove_unused_columns=False, seed=seed, data_seed=seed,
        report_to=[], disable_tqdm=True, use_cpu=device == "cpu", max_grad_norm=1.0, bf16=has_fast_bfloat16(device),
        dataloader_pin_memory=False, logging_first_step=True,
    )
    trainer = CsmTrainer(model=model, args=arguments, train_dataset=examples, eval_dataset=valid,
                         callbacks=[PrintProgress()], depth_ratio=depth_ratio, seed=seed)
    trainer.remove_callback(PrinterCallback)
    if device == "cpu":  # its fused attention is slow backwards: csm-mini, 8 clips of 2 s, one core: .35 s a step, eager .29
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        for part in (inner.backbone_model, inner.depth_decoder):
            part.set_attn_implementation("eager")
    trainer.evaluate()  # before the first step: what the training starts from
    trainer.train()
    model.eval()
    keys = ("loss", "eval_loss")
    return [{"step": row["step"], **{k: row[k] for k in keys if k in row}} for row in trainer.state.log_history
            if any(k in row for k in keys)]


def split_rows(rows) -> tuple[list[dict], list[dict]]:
    """(train, held out): one sentence in ten is held out, by its hash, so that no sentence is ever in both.

    Raises TrainingError when either side is empty.
    """
    rows = list(rows)
    held_out = [row for row in rows if split_of(row["text"]) == "held_out"]
    train = [row for row in rows if split_of(row["text"]) == "train"]
    if not train or not held_out:
        raise TrainingError(f"{len(rows)} clips leave {len(train)} to train on and {len(held_out)} held out; "
                            "both are needed: give more clips with different sentences")
    return train, held_out


def describe_history(history: list[dict]) -> dict:
    """Of a loss history: verdict ("learned" when the validation loss fell, else "no gain"), first_loss, last_loss, steps."""
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    return {"verdict": "learned" if losses[-1] < losses[0] else "no gain", "first_loss": losses[0], "last_loss": losses[-1],
            "steps": history[-1]["step"]}
