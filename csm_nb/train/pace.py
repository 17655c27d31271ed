"""When a training logs, evaluates and saves, and the log that it keeps beside its checkpoints."""

import json
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from csm_nb.provenance import replace_file


class KeepPace(TrainerCallback):
    """Asks the Trainer for a line of the log and a checkpoint by the clock, and for those at the steps `choices` with an
    evaluation, whatever the time.

    A checkpoint comes with a line, so that a resumed training's next line counts from there as well. None of it changes what
    is learned: evaluations, by which a training may stop early, do not go by the clock. A training that stops early is saved
    where it stopped. `log_seconds` and `save_minutes` of 0 leave the clock alone.
    """

    def __init__(self, log_seconds: float, save_minutes: float, choices=()):
        self.log_seconds, self.save_seconds, self.choices = log_seconds, 60 * save_minutes, set(choices)
        self.logged = self.saved = self.began = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        ahead = 2 * now - self.began  # when the next step is done, if it takes as long
        due = [0 < self.log_seconds < ahead - self.logged, 0 < self.save_seconds < ahead - self.saved]
        if args.world_size > 1:
            due = broadcast_object_list(due)  # all processes do the same, by the clock of the first
        chosen = state.global_step in self.choices
        control.should_evaluate |= chosen
        control.should_save |= chosen or due[1]
        control.should_log |= due[0] or control.should_save

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save |= control.should_training_stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.logged = self.saved = time.monotonic()


class WriteMetrics(TrainerCallback):
    """Keep <output_dir>/metrics.jsonl: one line per logged step, without what a killed run logged after its checkpoint."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in state.log_history), encoding="utf-8")
