"""What a training says while it runs: a line every few steps, a figure that grows, probes spoken, TensorBoard."""

import datetime
import os
import time
from pathlib import Path

from IPython import get_ipython
from IPython.display import display
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from csm_nb import audio
from csm_nb.csm.attention import use_attention
from csm_nb.csm.load import inner_model
from csm_nb.recipe import Recipe
from csm_nb.show import players, results
from csm_nb.speak.generate import speak
from csm_nb.train.trainer import plan_evaluations

REDRAW = 2.0  # s; a figure drawn at every log of a fast training would be most of its time
PARTS = ("loss", "backbone_loss", "depth_loss", "text_loss", "eval_loss", "grad_norm")


def show_progress(recipe: Recipe, samples=None) -> list[TrainerCallback]:
    """Return what every training is given to say how it goes (train_model's `callbacks`): lines, figure, TensorBoard, `samples`.

    The trainer imports none of it, so that an edited line of the log trains nothing anew (place.place_training).
    """
    return [PrintProgress(plan_evaluations(recipe), samples), WriteTensorBoard(), LiveFigure(), *filter(None, [samples])]


class PrintProgress(TrainerCallback):
    """One line every few steps with the losses, gradient norm, rates and the time that is left.

    `evaluations` are the steps after which there is one: those to come are in the time. That in which `samples`
    (SpeakSamples) were spoken is none of the steps'.
    """

    def __init__(self, evaluations=(), samples=None):
        self.evaluations, self.samples, self.start, self.heard, self.evaluating = evaluations, samples, None, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Remember when the first step began."""
        self.start = self.start or (time.monotonic() - self.count_spoken(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print the line."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        self.heard += logs.get("audio_seconds", 0.0)
        words = [f"step {state.global_step}/{state.max_steps}"]
        words += [f"{key} {logs[key]:.3f}" for key in PARTS if key in logs]
        words += [f"lr {logs['learning_rate']:.1e}"] if "learning_rate" in logs else []
        if self.start and state.global_step > self.start[1]:
            self.evaluating += logs.get("eval_runtime", 0.0)
            seconds = time.monotonic() - self.count_spoken() - self.start[0] - self.evaluating
            words += [f"{self.heard / seconds:.1f} s of audio per second"]
            words += [f"{datetime.timedelta(seconds=round(self.count_left(state, seconds)))} left"]
        print("  ".join(words), flush=True)

    def count_spoken(self) -> float:
        """Return the seconds that the samples have taken so far."""
        return self.samples.seconds if self.samples else 0.0

    def count_left(self, state, seconds: float) -> float:
        """Return the seconds to the end, if steps since the start took `seconds`: and evaluations like those before."""
        steps = (state.max_steps - state.global_step) * seconds / (state.global_step - self.start[1])
        took = [row["eval_runtime"] for row in state.log_history if "eval_runtime" in row]
        evaluated = max((row["step"] for row in state.log_history if "eval_runtime" in row), default=0)
        to_come = sum(step > evaluated for step in self.evaluations)
        return steps + to_come * sum(took) / max(1, len(took))


class LiveFigure(TrainerCallback):
    """In a notebook, the figure of the losses, drawn anew as they come in; elsewhere nothing."""

    def __init__(self):
        self.handle, self.drawn = None, 0.0

    def on_log(self, args, state, control, **kwargs):
        """Draw the figure anew, if it is not too soon."""
        if time.monotonic() - self.drawn > REDRAW:
            self.draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the figure of the whole training."""
        self.draw(state)

    def draw(self, state):
        """Show the losses so far, in the place of the figure before."""
        if get_ipython() is None or not state.is_world_process_zero:
            return
        figure = results.draw_losses(state.log_history)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        self.drawn = time.monotonic()


class SpeakSamples(TrainerCallback):
    """Before the first step and every so many, `texts` spoken by the model as it is: players, and out_dir/step-<n>/<i>.wav.

    `every` 0 speaks half way, once. What is drawn for it is drawn apart, so that the training is the same with it and
    without. What fails in speaking is printed, and the training goes on.
    """

    def __init__(self, model, processor, texts, speaker_id: str, every: int, out_dir, seed: int = 0):
        self.model, self.processor, self.texts, self.speaker_id = model, processor, list(texts), speaker_id
        self.every, self.out_dir, self.seed, self.seconds = every, Path(out_dir), seed, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Speak before the first step; a training that goes on has done so."""
        if state.is_world_process_zero and not state.global_step:
            self.speak(0)

    def on_step_end(self, args, state, control, **kwargs):
        """Speak every so many steps, but for the last."""
        every, step = self.every or -(-state.max_steps // 2), state.global_step
        if state.is_world_process_zero and step % every == 0 and step < state.max_steps:
            self.speak(step)  # what is said at the end, the notebook asks for itself

    def speak(self, step: int) -> None:
        """Speak and write the samples of `step`, and show them in a notebook."""
        inner, begun = inner_model(self.model), time.monotonic()
        use_attention(inner, training=False)
        self.model.eval()
        try:
            said = speak(self.model, self.processor, self.texts, self.speaker_id, seed=self.seed)
            for number, speech in enumerate(said):
                audio.write_audio(self.out_dir / f"step-{step}" / f"{number}.wav", speech.wav)
        except Exception as error:
            print(f"step {step}: no samples, the training goes on ({type(error).__name__}: {error})", flush=True)
        else:
            print(f"step {step}: {sum(s.ended for s in said)} of {len(said)} samples ended, {self.out_dir.name}/step-{step}")
            if get_ipython() is not None:
                display(players.players([(f"step {step}: {s.text} ({'ended' if s.ended else 'runaway'})", s.wav) for s in said]))
        finally:
            use_attention(inner, training=True)
            self.model.train()
            self.seconds += time.monotonic() - begun


class WriteTensorBoard(TensorBoardCallback):
    """The log for `tensorboard --logdir <output_dir>/tensorboard`; a resumed training goes on in it from its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the log, and drop from it what came after the step that the training goes on from."""
        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(os.path.join(args.output_dir, "tensorboard"), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)
