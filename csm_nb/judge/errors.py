"""What was heard against what was said: error rates over clips, and who was heard as what."""

import numpy as np
import pandas as pd

from csm_nb.judge.intervals import bootstrap_interval
from csm_nb.judge.judges import LETTERS_ON_TOP, LETTERS_PER_SECOND

COUNTED = (f"In means a clip counts as 100 % at most; a hallucination has more than {LETTERS_PER_SECOND} letters per second "
           f"of its clip and {LETTERS_ON_TOP} on top.")


def average_cer(rates) -> dict:
    """Return CER (mean over clips, each counted as 1 at most), CER low, CER high (95 %), CER median, CER over 50 % (share).

    NaN are left out; of none everything is NaN.
    """
    rates = np.asarray(rates, dtype=float)
    rates = rates[np.isfinite(rates)].clip(max=1)
    low, high = bootstrap_interval(rates)
    mean, median, over = (rates.mean(), np.median(rates), (rates > 0.5).mean()) if len(rates) else (float("nan"),) * 3
    return {"CER": float(mean), "CER low": low, "CER high": high, "CER median": float(median), "CER over 50 %": float(over)}


def confusion_matrix(true, predicted, labels) -> pd.DataFrame:
    """Return counts: a row for each of `labels` that was read, a column for each of them and each other that was heard."""
    columns = [*labels, *sorted(set(predicted) - set(labels))]
    table = pd.crosstab(pd.Series(list(true), name="read"), pd.Series(list(predicted), name="heard"))
    return table.reindex(index=list(labels), columns=columns, fill_value=0)
