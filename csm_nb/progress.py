"""What a training says while it runs: a line every few steps, and every logged figure in metrics.jsonl."""

import json
import os
import time
from pathlib import Path

from transformers import TrainerCallback

PARTS = ("loss", "backbone_loss", "depth_loss", "eval_loss", "grad_norm")


class PrintProgress(TrainerCallback):
    """One line every few steps with the losses, gradient norm, rates and the time that is left."""

    def __init__(self):
        self.start, self.heard = None, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or (time.monotonic(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        self.heard += logs.get("audio_seconds", 0.0)
        words = [f"step {state.global_step}/{state.max_steps}"]
        words += [f"{key} {logs[key]:.3f}" for key in PARTS if key in logs]
        words += [f"lr {logs['learning_rate']:.1e}"] if "learning_rate" in logs else []
        if self.start and state.global_step > self.start[1]:
            seconds = time.monotonic() - self.start[0]
            rate = (state.global_step - self.start[1]) / seconds
            left = (state.max_steps - state.global_step) / rate
            words += [f"{self.heard / seconds:.1f} s of audio a second", f"{left:.0f} s left"]
        print("  ".join(words), flush=True)


class WriteMetrics(TrainerCallback):
    """Keeps <output_dir>/metrics.jsonl: one line a logged step, without what a killed run logged after its checkpoint."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(".metrics.jsonl.part")
            part.write_text("".join(json.dumps(row) + "\n" for row in state.log_history), encoding="utf-8")
            os.replace(part, path)
