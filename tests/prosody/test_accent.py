"""Turns are where a melody was made to turn, and what a copy did to them is what is measured."""

import numpy as np
import pytest

from csm_nb.prosody.f0 import TIME_STEP, F0Track
from csm_nb.prosody.turns import MEASURES, compare_accent, find_turns, smooth_contour

TIMES = np.arange(0.02, 1.0, TIME_STEP)
TWO_PEAKS = ((0.25, 5.0), (0.7, 6.0))


def make_track(*peaks, shift: float = 0.0, voiced=True) -> F0Track:
    """A track about 150 Hz with a peak of so many semitones at each (time in s, semitones), 150 ms wide."""
    semitones = sum(height * np.exp(-(((TIMES - shift - time) / 0.08) ** 2)) for time, height in peaks) + np.zeros(len(TIMES))
    return F0Track(TIMES, np.where(voiced, 150 * 2 ** (semitones / 12), np.nan), np.zeros(len(TIMES)), 75, 400)


def find(track, kind):
    return [(time, height) for time, height, k in find_turns(track, 150) if k == kind]


def test_turns_lie_where_the_melody_was_made_to_turn():
    track = make_track(*TWO_PEAKS)
    assert np.array(find(track, "peak")) == pytest.approx(np.array(TWO_PEAKS), abs=0.3)
    valleys = [time for time, _ in find(track, "valley")]
    assert len(valleys) == 3 and valleys[1] == pytest.approx(0.475, abs=0.02)


def test_a_voice_that_starts_or_stops_high_has_its_peak_there():
    track = make_track((0.02, 5), (0.99, 5))
    assert [time for time, _ in find(track, "peak")] == pytest.approx([TIMES[0], TIMES[-1]])


def test_what_does_not_stand_out_is_no_turn():
    assert find_turns(make_track((0.3, 1.2), (0.7, 1.0))) == []
    assert find_turns(make_track(voiced=False)) == []


def test_gaps_are_bridged_and_nothing_is_said_outside_the_voice():
    voiced = (TIMES > 0.1) & (TIMES < 0.9) & ~((TIMES > 0.4) & (TIMES < 0.55))
    contour = smooth_contour(make_track(*TWO_PEAKS, voiced=voiced), 150)
    assert np.isfinite(contour[(TIMES > 0.1) & (TIMES < 0.9)]).all()
    assert np.isnan(contour[(TIMES < 0.1) | (TIMES > 0.9)]).all()
    assert len(find(make_track(*TWO_PEAKS, voiced=voiced), "peak")) == 2


@pytest.mark.parametrize("octave", [0.5, 2.0])
@pytest.mark.parametrize("gap", [False, True])
def test_octave_errors_of_the_tracker_make_no_turns(octave, gap):
    truth = make_track(*TWO_PEAKS)
    wrong = (TIMES > 0.3) & (TIMES < 0.42)
    hole = gap & (TIMES > 0.42) & (TIMES < 0.45)
    track = F0Track(TIMES, np.where(hole, np.nan, np.where(wrong, octave * truth.f0, truth.f0)), truth.hnr, 75, 400)
    assert [k for _, _, k in find_turns(track)] == [k for _, _, k in find_turns(truth)]
    assert compare_accent(truth, track)["peak_shift_ms"] <= 5


@pytest.mark.parametrize("shift", [-0.06, 0.04])
def test_a_melody_that_is_late_is_late_by_as_much(shift):
    measures = compare_accent(make_track(*TWO_PEAKS), make_track(*TWO_PEAKS, shift=shift))
    assert measures["peak_shift_ms"] == pytest.approx(1000 * abs(shift), abs=5)
    assert measures["h2_h1_error_st"] == pytest.approx(0, abs=0.1)


def test_a_turn_further_off_than_a_codec_frame_and_a_bit_is_another_turn():
    measures = compare_accent(make_track((0.4, 5)), make_track((0.55, 5)))
    assert np.isnan(measures["peak_shift_ms"]) and measures["turns_kept_percent"] < 100


def test_one_turn_of_the_copy_stands_for_one_of_the_original():
    before, after = make_track((0.41, 5), (0.59, 5)), make_track((0.5, 5))
    assert len(find(before, "peak")) == 2
    assert len(find(before, "peak")) + len(find(before, "valley")) == 5
    assert compare_accent(before, after)["turns_kept_percent"] == pytest.approx(60)  # a peak, the valleys at both ends


def test_a_peak_that_is_flattened_away_is_a_lost_turn_and_an_error_as_high_as_it_was():
    measures = compare_accent(make_track(*TWO_PEAKS), make_track(TWO_PEAKS[0]))
    assert measures["turns_kept_percent"] < 70
    assert measures["h2_h1_error_st"] == pytest.approx(6, abs=0.3)
    flat = compare_accent(make_track(*TWO_PEAKS), make_track())
    assert flat["turns_kept_percent"] == 0 and flat["h2_h1_error_st"] == pytest.approx(1, abs=0.1)


def test_the_step_between_two_peaks_is_measured_whatever_the_pitch_of_the_voice():
    original, copy = make_track(*TWO_PEAKS), make_track((0.25, 5), (0.7, 3))
    higher = F0Track(TIMES, 1.5 * copy.f0, copy.hnr, 75, 400)
    assert compare_accent(original, higher)["h2_h1_error_st"] == pytest.approx(3, abs=0.2)


def test_a_turn_that_is_just_large_enough_is_not_lost_to_a_hair():
    assert compare_accent(make_track((0.5, 1.7)), make_track((0.5, 1.4)))["turns_kept_percent"] == 100


def test_where_there_is_nothing_to_measure_there_is_no_figure():
    level, silent, single = make_track(), make_track(voiced=False), make_track((0.5, 5))
    assert all(np.isnan(value) for before in (level, silent) for value in compare_accent(before, single).values())
    assert tuple(compare_accent(level, level)) == MEASURES
    measures = compare_accent(make_track(*TWO_PEAKS), silent)
    assert measures.pop("turns_kept_percent") == 0 and all(np.isnan(value) for value in measures.values())
    assert np.isnan(compare_accent(single, single)["h2_h1_error_st"])  # one peak
