"""Which clips are held out. Neither their sentences nor their speakers are trained on, where that costs few clips."""

import re
import unicodedata
from dataclasses import dataclass

import datasets
import numpy as np
import pandas as pd

from csm_nb.corpora.tokens import count_frames, read_column
from csm_nb.recipe import TrainingError
from csm_nb.text.sentences import VALIDATION_CLIPS, split_of

FEWEST_SPEAKERS = 10  # with fewer, holding one out would cost more of the voices than it tells
MOST_LOST = 0.1  # share of the clips that may be left out of both sides
RANKS = {"validation": 0, "train": 1, "test": 2}  # in this order a sentence is held out; 04 judges by those of "test"
AVOIDED = RANKS["test"]  # from this rank on it is held out only where there is nothing else


@dataclass(frozen=True)
class Split:
    """Two sides of a corpus of `count` clips: their indices, and what was held out, in words."""

    train: np.ndarray
    held: np.ndarray
    count: int
    what: str

    @property
    def lost(self) -> int:
        """Return how many clips are on neither side."""
        return self.count - len(self.train) - len(self.held)

    def is_good(self, fewest: float = 1) -> bool:
        """Return whether there are clips to train on, `fewest` and more are held out, and at most a tenth is lost."""
        return len(self.train) > 0 and len(self.held) >= max(1, fewest) and self.lost <= MOST_LOST * self.count

    def __str__(self):
        lost = f"; {self.lost} of {self.count} clips are left out of both, to keep the sides apart" if self.lost else ""
        return f"{_count(len(self.held), 'clip')} of {self.what}{lost}"


def split_rows(rows, max_tokens: int | None = None, seed: int = 0):
    """Return (train, held out, how it was split); each side is a Dataset or list as `rows` is, the same for the same rows.

    One clip in ten is held out, at least 1 and at most 128. The first of these rules is used that leaves at most a tenth
    of the clips out of both sides:

    - With 10 speakers and more, speakers are held out with their sentences: as few speakers as that takes, at most one in
      ten. Clips of other speakers with a held-out sentence are left out; so are the clips of held-out speakers that are
      not needed.
    - Sentences are held out, whoever says them, or speakers, whatever they say: whichever keeps more clips.

    Lots decide among equals, by a hash of sentence or speaker: where clips are added, one that was held out goes to the training
    only where new ones take its place, where its sentence or speaker became too large, or where another rule is used.

    Two spellings of the same words are one sentence. The split "validation" (sentences.split_of) is held out first. "test",
    by which 04 judges, is held out only where there is nothing else; so are clips that no row of `max_tokens` holds. Raises
    TrainingError when no rule will do; it says what the best one would cost.
    """
    speakers, texts = read_column(rows, "speaker_id"), read_column(rows, "text")
    voice, voices = pd.factorize(np.array(speakers, object), sort=True)
    known = {text: (_words(text), RANKS[split_of(text)]) for text in set(texts)}
    sentence, sentences = pd.factorize(np.array([known[text][0] for text in texts], object), sort=True)
    rank = np.array([known[text][1] for text in texts], int)
    first = int((rank == 0).sum())
    if max_tokens is not None:
        rank[np.array(count_frames(rows), int) + 1 >= max_tokens - np.array([len(text) for text in texts], int)] = AVOIDED
    wanted = min(VALIDATION_CLIPS, max(-(-len(texts) // 10), min(first, len(texts) // 2)))
    lots = _draw_lots(sentences, seed), _draw_lots(voices, seed)  # who is held out among equals
    split, why = None, f"{_count(len(voices), 'speaker')}: too few to hold one out"
    if len(voices) >= FEWEST_SPEAKERS:
        split = _hold_out_both(sentence, voice, rank, wanted, lots)
        cost = f"leave out {split.lost} of {len(texts)} clips" if split.lost else f"give only {_count(len(split.held), 'clip')}"
        why = f"speakers are on both sides: to hold them out too would {cost}"
    if split is None or not split.is_good(wanted / 2):
        split = _hold_out(sentence, rank, wanted, lots[0], "sentence", why)
        why = f"sentences are on both sides: to hold out {'one' if len(sentences) > 1 else 'the only one'} "
        why += f"instead would leave out {split.lost} of {len(texts)} clips" if len(sentences) > 1 else "is not possible"
        other = _hold_out(voice, rank, wanted, lots[1], "speaker", why)
        split = max((split, other), key=lambda way: (way.is_good(), len(way.held) > 0, -way.lost))
    if not split.is_good():
        raise TrainingError(
            f"{_count(len(texts), 'clip')} of {_count(len(voices), 'speaker')} with {_count(len(sentences), 'sentence')} "
            f"can not be split: at best {len(split.train)} are left to train on, {len(split.held)} are held out and {split.lost} "
            "neither, where a tenth of all is allowed. Give more clips, with other sentences or of other "
            "speakers (corpus_clips says how many are drawn)")
    return _take(rows, split.train), _take(rows, split.held), str(split)


def _draw_lots(groups, seed):
    """Return the place of each group among them by a hash of its own, which no other group changes."""
    return np.argsort(np.argsort(pd.util.hash_array(np.asarray(groups, object), hash_key=f"{seed:016d}", categorize=False)))


def _count(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def _words(text):
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())) or text


def _hold_out(group, rank, wanted, lot, noun, why):
    """Hold out whole groups of clips (a sentence or a speaker each): at most `wanted` clips, or else the smallest group."""
    sizes, best, chosen, left = np.bincount(group), np.full(len(lot), AVOIDED), [], wanted
    np.minimum.at(best, group, rank)
    for number in np.lexsort((lot, best)):
        if left == 0 or chosen and best[number] >= AVOIDED:
            break
        if sizes[number] <= left and len(chosen) < len(lot) - 1:
            chosen.append(number)
            left -= sizes[number]
    if not chosen and len(lot) > 1:
        chosen = [np.lexsort((lot, best, sizes))[0]]
    mine = np.isin(group, chosen)
    held = np.flatnonzero(mine)
    held = held[rank[held] < AVOIDED] if (rank[held] < AVOIDED).any() else held
    what = f"{_count(len(chosen), f'held-out {noun}')} of {len(lot)} ({why})"
    return Split(np.flatnonzero(~mine), held[:VALIDATION_CLIPS], len(group), what)


def _hold_out_both(sentence, voice, rank, wanted, lots):
    """Hold out speakers with the sentences of their held-out clips; the sentences that others say least come first."""
    sizes, worth = np.bincount(voice), np.bincount(voice, rank < AVOIDED).astype(int)  # worth: clips that can be looked at
    chosen, left = np.zeros(len(sizes), bool), wanted
    while left > 0 and chosen.sum() < len(sizes) // 10:
        free = np.flatnonzero(~chosen & (worth > 0) & (sizes <= left + MOST_LOST * len(voice)))
        if not len(free):
            break
        enough = free[worth[free] >= left]  # the smallest of these, or else the largest of all; among equals by lot
        free, size = (enough, sizes[enough]) if len(enough) else (free, -worth[free])
        pick = free[np.argmin(size * len(sizes) + lots[1][free])]
        chosen[pick], left = True, left - worth[pick]
    mine = chosen[voice]
    elsewhere = np.bincount(sentence[~mine], minlength=len(lots[0]))
    able = np.flatnonzero(mine & (rank < AVOIDED))
    able = able[np.lexsort((lots[0][sentence[able]], rank[able], elsewhere[sentence[able]]))][:wanted]
    costs, seen = np.zeros(len(able), int), np.unique(sentence[able], return_index=True)[1]
    costs[seen] = elsewhere[sentence[able[seen]]]
    held = np.sort(able[costs.cumsum() <= MOST_LOST * len(voice) - (mine.sum() - len(able))])
    train = np.flatnonzero(~mine & ~np.isin(sentence, sentence[held]))
    what = f"{_count(int(chosen.sum()), 'held-out speaker')} of {len(sizes)}, with their sentences"
    return Split(train, held, len(voice), what)


def _take(rows, indices):
    return rows.select(indices) if isinstance(rows, datasets.Dataset) else [rows[i] for i in indices]
