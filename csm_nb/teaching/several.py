"""One adapter for several languages: their clips in equal shares, and how each of them does."""

import numpy as np
import pandas as pd
from IPython.display import display

from csm_nb.corpora.tokens import read_column
from csm_nb.judge import judges
from csm_nb.languages import get_language
from csm_nb.manifest import CorpusError
from csm_nb.train import select


def balance_hours(rows, languages, seed: int = 0) -> list[dict]:
    """Return clips of `languages` in equal hours, each under the language that it teaches, and say how many there are.

    English read with an accent teaches the language of the accent. Every language is drawn down to the hours of the smallest,
    by `seed`, in the order of `rows`; one language stays whole. Raises CorpusError where one has none.
    """
    rows = [row | {"language": row.get("accent") or row["language"]} for row in rows]
    taught, seconds = np.array([row["language"] for row in rows]), np.array([row["duration"] for row in rows], float)
    found = {code: seconds[taught == code].sum() for code in languages}
    least, kept = min(found.values()), np.zeros(len(rows), bool)
    if not least:
        none = ", ".join(code for code, hours in found.items() if not hours)
        raise CorpusError(f"no clip that can be used is of {none}, and the adapter is to learn {', '.join(languages)} from equal "
                          "hours: see why those of it are set aside, or leave it out of `also`")
    for code in languages:
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(taught == code))
        kept[drawn[seconds[drawn].cumsum() <= least + 1e-6]] = True
    if len(languages) > 1:
        hours = ", ".join(f"{code} {value / 3600:.2f} h" for code, value in found.items())
        print(f"{least / 3600:.2f} h of each language, {kept.sum()} of {len(rows)} clips; found were {hours}")
    return [row for row, one in zip(rows, kept, strict=True) if one]


def judge_others(run, training, lid) -> dict:
    """Return select.describe_speech of each language beside the run's own, as cer_sv and so on; shows them as a table."""
    found = {}
    for code in run.languages[1:]:
        texts, asr = select.draw_texts(code, run.seed)[1], judges.load_asr(run.asr_model, run.device, code)
        judged = select.judge_model(training.model, training.processor, texts, code, lid, asr, training.data.voice, run.seed + 1,
                                    training.keep)
        found[code] = select.describe_speech(judged)
    if found:
        display(pd.DataFrame(found).rename(columns=lambda code: get_language(code).name).round(3))
    return {f"{name}_{code}": value for code, figures in found.items() for name, value in figures.items()}


def measure_each(run, training) -> dict:
    """Return the saved weights' loss on the held-out clips of each language, in nats, as loss_no and so on; {} for one alone."""
    if len(run.languages) < 2:
        return {}
    rows, table = training.data.valid_rows, {}
    codes = np.array(read_column(rows, "language"))
    for code in run.languages:
        held = np.flatnonzero(codes == code)
        part = [rows[i] for i in held] if isinstance(rows, list) else rows.select(held)
        loss = select.measure_clips(training.model, training.processor, part, training.recipe).mean() if len(held) else np.nan
        table[code] = {"held-out clips": len(held), "loss": round(float(loss), 4)}
    display(pd.DataFrame(table).T)
    return {f"loss_{code}": row["loss"] for code, row in table.items() if row["held-out clips"]}
