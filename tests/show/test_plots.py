"""Figures show what they are given, also where there is little to show; the picker is a shell around them."""

import numpy as np
import pandas as pd
import pytest
from test_fidelity import make_summary

from csm_nb.audio import SAMPLE_RATE
from csm_nb.codec.mimi import load_codec
from csm_nb.fidelity import verdict
from csm_nb.fidelity.clips import CodedClip
from csm_nb.show import results, sound, widgets
from csm_nb.synth.espeak import speak_text
from csm_nb.train.select import mark_choice, summarise_speech


def make_clip(wav, condition: str = "8 codebooks"):
    return CodedClip({"text": "Hei.", "speaker_id": "a"}, wav, {condition: wav * 0.9}, (75.0, 400.0), 150.0)


def test_a_tone_stands_at_its_frequency_in_the_spectrogram():
    levels = sound.compute_spectrogram(np.sin(2 * np.pi * 3000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE))
    assert levels.argmax(0)[100] * sound.HIGHEST / len(levels) == pytest.approx(3000, rel=0.01)


def test_spectrograms_share_one_scale_of_level():
    loud = np.random.default_rng(0).normal(0, 0.3, SAMPLE_RATE).astype(np.float32)
    figure = sound.draw_spectrograms([("loud", loud), ("soft", loud * 0.01), ("none", loud[:0])])
    images = [ax.images[0] for ax in figure.axes if ax.images and ax.get_title(loc="left")]
    assert len({image.get_clim() for image in images}) == 1
    means = [float(np.mean(image.get_array())) for image in images]
    assert means[0] - means[1] == pytest.approx(40, abs=0.5)
    assert "none: no sound" in [ax.get_title(loc="left") for ax in figure.axes]


@pytest.mark.parametrize("wav", [speak_text("Hei du.", "no"), np.zeros(SAMPLE_RATE, np.float32), np.zeros(200, np.float32)],
                         ids=["speech", "silence", "too short"])
def test_any_clip_can_be_drawn(wav):
    clip = make_clip(wav)
    for figure in (sound.draw_clip(clip, "8 codebooks"), sound.draw_contours([clip], "8 codebooks")):
        figure.canvas.draw()
        assert figure.axes


def test_the_sweep_shades_the_side_that_passes():
    summary = make_summary()
    figure = results.draw_sweep([verdict.Evidence("clips", summary)])
    assert [ax.get_title(loc="left").split(", ")[0] for ax in figure.axes] == [c.label for c in verdict.CRITERIA]
    assert "0.95" in figure.axes[0].get_title(loc="left")


def test_confusions_write_counts_and_shares_and_survive_an_empty_row():
    table = pd.DataFrame([[3, 1], [0, 0]], index=["no", "sv"], columns=["no", "sv"])
    texts = [text.get_text() for text in results.draw_confusions([("base", table)]).axes[0].texts]
    assert texts == ["3\n75%", "1\n25%", "0\n–", "0\n–"]


def test_error_rates_have_a_bar_a_model_and_a_panel_a_language():
    rows = pd.DataFrame({"model": ["reference", "base", "base"] * 2, "language": ["no"] * 3 + ["da"] * 3,
                         "cer": [0.1, 0.4, 0.6, 0.2, np.nan, 0.9]})
    figure = results.draw_error_rates(rows)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["no", "da"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.1, 0.5])


def test_losses_of_a_training_without_a_log_say_so():
    assert [t.get_text() for t in results.draw_losses([]).axes[0].texts] == ["no loss was logged"]
    lines = results.draw_losses([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}]).axes[0].lines
    assert [line.get_label() for line in lines] == ["training", "held out"]
    assert lines[0].axes.get_ylabel() == "backbone + depth loss (nats)"  # a sum of two means, not one per code


def test_checkpoints_show_what_was_heard_only_where_judges_were_asked():
    table = mark_choice(pd.DataFrame({"step": [78, 89, 100], "held-out loss": [4.2, 4.1, 4.15]}))
    (alone,) = results.draw_checkpoints(table).axes
    assert alone.get_ylabel() == "backbone + depth loss (nats)"
    assert {line.get_label() for line in alone.lines} >= {"chosen: 89", "by loss: 89"}
    judged = pd.DataFrame({"CER": [0.2, 0.4], "right": [True, True], "runaway": [False, False], "score": [0.2, 0.4]})
    table = pd.DataFrame([row | summarise_speech(judged) for row in table.iloc[:, :2].to_dict("records")])
    figure = results.draw_checkpoints(mark_choice(table, [judged.score.to_numpy()] * 3))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Held-out loss", "What the judges heard"]


def test_the_picker_shows_clips_of_the_language_that_is_picked(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "show_clip", lambda row, codec, codebooks: shown.append((row["language"], codebooks)))
    picker = widgets.pick_clip(load_codec("models/csm-mini"), "", "no", [1, 8], 2, 0, tmp_path)
    (languages, counts), clips = picker.children[0].children, picker.children[1]
    assert shown[-1] == ("no", 8)
    languages.value = "da"
    assert shown[-1] == ("da", 8) and len(clips.options) == 2
    counts.value = 1
    assert shown[-1] == ("da", 1)
