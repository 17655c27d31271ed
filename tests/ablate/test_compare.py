"""Arms are compared over seeds and held-out sentences, paired by both."""

import numpy as np
import pandas as pd
import pytest

from csm_nb.ablate.arms import REFERENCE
from csm_nb.ablate.compare import compare_arms, pick_rates, two_way_interval


def test_paired_differences_are_by_sentence_and_leave_probes_out():
    texts = [f"{i}" for i in range(12)]
    hard = np.linspace(0, 1, 12)  # sentences differ far more than arms do
    rows = pd.concat([
        pd.DataFrame({"model": model, "seed": 0, "language": "no", "text": order, "probe": [text == "0" for text in order],
                      "heard": "no", "cer": [0.8 * hard[int(text)] + worse for text in order], "ended": True})
        for model, order, worse in ((REFERENCE, texts, 0), ("other", texts[::-1], 0.1))
    ])
    table = compare_arms(rows).set_index("model")
    assert list(table.loc["other", ["difference", "difference low", "difference high"]]) == [0.1, 0.1, 0.1]
    assert (table.sentences == 11).all()
    assert table.loc["other", "CER low"] < table.loc[REFERENCE, "CER high"]
    alone = compare_arms(rows[rows.model == "other"])
    assert alone.difference.isna().all() and len(alone) == 1


def judge_trainings(effects, texts=40, noise=0.1, seed=0):
    """Rows as 04 leaves them: {model: [what each seed of it adds to the CER]}."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(0.2, 0.6, texts)
    return pd.DataFrame([
        {"model": model, "seed": number, "language": "no", "text": str(text), "probe": False, "heard": "no", "ended": True,
         "cer": hard[text] + added + rng.normal(0, noise)}
        for model, seeds in effects.items() for number, added in enumerate(seeds) for text in range(texts)
    ])


def test_trainings_that_differ_by_seed_widen_the_interval():
    alike = compare_arms(judge_trainings({REFERENCE: [0, 0, 0], "other": [0.1, 0.1, 0.1]})).set_index("model").loc["other"]
    apart = compare_arms(judge_trainings({REFERENCE: [0, 0, 0], "other": [-0.1, 0.1, 0.3]})).set_index("model").loc["other"]
    assert alike.difference == pytest.approx(0.1, abs=0.03) and apart.difference == pytest.approx(0.1, abs=0.03)
    assert alike["difference low"] > 0 > apart["difference low"]  # over sentences alone, both were certain
    assert alike.seeds == 3 and alike.sentences == 40


def test_the_interval_is_over_seeds_and_sentences():
    rng = np.random.default_rng(0)
    seeds, texts = rng.normal(0, 1, (6, 1)), rng.normal(0, 1, (1, 50))
    low, high = two_way_interval(seeds + texts)
    expected = 2 * 1.96 * (seeds.var() / 6 + texts.var() / 50) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    assert two_way_interval(np.full((3, 5), 0.2)) == pytest.approx((0.2, 0.2))
    assert np.isnan(two_way_interval(np.zeros((0, 5)))).all() and np.isnan(two_way_interval([])).all()
    one = two_way_interval(texts)
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * (texts.var() / 50) ** 0.5, rel=0.1)


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_difference_and_the_base_stands_against_all():
    rows = judge_trainings({REFERENCE: [0, 0.2], "other": [0.1], "base": [0.3]}, noise=0)
    table = compare_arms(rows).set_index("model")
    assert table.difference["other"] == pytest.approx(0.1) and table.seeds["other"] == 1
    assert table.difference["base"] == pytest.approx(0.2)  # against the mean of 0 and 0.2
    assert table.loc[REFERENCE, "seeds"] == 2


def test_all_heard_right_is_not_certain():
    table = compare_arms(judge_trainings({REFERENCE: [0, 0]}, texts=16))
    assert (table["heard right"] == 1).all() and table.low[0] == pytest.approx(0.806, abs=1e-3)


def test_a_clip_that_babbles_counts_as_one():
    rows = judge_trainings({REFERENCE: [0]}, texts=2, noise=0)
    rows["cer"] = [0.2, 20.0]
    assert compare_arms(rows).CER[0] == pytest.approx(0.6)


def test_each_grid_stands_by_the_rate_with_the_lowest_loss():
    losses = {"LoRA": 1.0, REFERENCE: 4.5, "LoRA + text, lr x2": 4.4, "full": 4.6, "full, lr x0.5": 4.7}
    assert pick_rates(losses) == {REFERENCE: "LoRA + text, lr x2", "full": "full"}
    assert pick_rates({"LoRA": 1.0}) == {}
