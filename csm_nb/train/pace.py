"""When a training logs, evaluates and saves, and the log that it keeps beside its checkpoints."""

import json
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from csm_nb.provenance import replace_file


class KeepPace(TrainerCallback):
    """Ask the Trainer for log lines and checkpoints by the clock, and at the steps `choices` also for an evaluation.

    A line is due every `log_seconds`, a checkpoint every `save_minutes`; 0 means never. Every checkpoint comes with a line,
    so that the next line of a resumed training counts from there as well. A training that stops early is saved where it
    stopped. The clock changes nothing that is learned: evaluations, by which a training may stop early, do not go by it.
    """

    def __init__(self, log_seconds: float, save_minutes: float, choices=()):
        self.log_seconds, self.save_seconds, self.choices = log_seconds, 60 * save_minutes, set(choices)
        self.logged = self.saved = self.began = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        """Note when the step began: the next one is taken to last as long."""
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for what is due now, or would be before the next step ends."""
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
        """Ask for a checkpoint where the evaluation stops the training."""
        control.should_save |= control.should_training_stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Start the log's clock anew."""
        self.logged = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        """Start the checkpoints' clock anew."""
        self.saved = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start both clocks, as loading may have taken minutes."""
        self.logged = self.saved = time.monotonic()


class WriteMetrics(TrainerCallback):
    """Keep <output_dir>/metrics.jsonl: one line per logged step, without what a killed run logged after its last checkpoint."""

    def on_log(self, args, state, control, **kwargs):
        """Write the whole file anew, in the first process alone."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in state.log_history), encoding="utf-8")
