"""Batches from stored codes: clips are packed into rows, and every row of a training is known before its first step."""

import heapq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from csm_nb.corpora.tokens import count_frames, read_column
from csm_nb.csm.load import encode_text
from csm_nb.recipe import TrainingError

IGNORED = -100
GROUP = 64  # rows packed together: enough clips to fill all rows alike (with 16 rows, one is a fifth emptier), still shuffled


@dataclass
class Clips:
    """Token rows with their texts encoded. Their codes stay in a memory-mapped table until a row needs them.

    `input_ids`, `lengths` (positions: text, frames and the end-of-speech frame) and `seconds` go by the index in `rows`.
    `usable` holds the indices to train on. `set_aside` holds the rows that are too long for a packed row or for the model,
    with the `reason`.
    """

    rows: object
    input_ids: list[list[int]]
    lengths: np.ndarray
    seconds: np.ndarray
    usable: np.ndarray
    set_aside: list[dict] = field(default_factory=list)


def read_clips(rows, processor, max_tokens: int, frame_rate: float, context: int | None = None) -> Clips:
    """Return `rows` (text, codes, speaker_id; a list or a Dataset) ready to be packed into rows of `max_tokens` positions.

    What a column `tag` has (tags.tag_rows) stands before the text. `frame_rate` is the codec's, in Hz. `context` is how
    many positions the model knows (its max_position_embeddings). A packed row may be longer than that, as positions begin
    anew in each clip; a clip may not. Raises TrainingError when there is no clip, or none that fits.
    """
    if len(rows) == 0:
        raise TrainingError("there is no clip to train on; look at the clips that were set aside above")
    texts, speakers = read_column(rows, "text"), read_column(rows, "speaker_id")
    frames = np.array(count_frames(rows))
    tags = read_column(rows, "tag", "")
    input_ids = [encode_text(processor, *prompt) for prompt in zip(texts, speakers, tags, strict=True)]
    lengths = np.array([len(ids) for ids in input_ids]) + frames + 1
    beyond = context is not None and context < max_tokens
    most, limit = (context, f"the model's context is {context}") if beyond else (max_tokens, f"a row holds {max_tokens}")
    fits = lengths <= most
    set_aside = [{"text": texts[i], "speaker_id": speakers[i], "reason": f"{lengths[i]} positions; {limit}"}
                 for i in np.flatnonzero(~fits)]
    if not fits.any():
        raise TrainingError(f"none of {len(rows)} clips fits: {limit} positions, the shortest clip needs {lengths.min()}: "
                            f"{'' if beyond else 'raise max_tokens, or '}cut the clips")
    return Clips(rows, input_ids, lengths, frames / frame_rate, np.flatnonzero(fits), set_aside)


def pack_epoch(lengths: np.ndarray, indices: np.ndarray, max_tokens: int, rng: np.random.Generator) -> list[list[int]]:
    """Return one pass over `indices` in a new order, packed into rows.

    Each row is a list of indices whose lengths sum to at most `max_tokens`. The clips are shuffled and parted into equal
    groups, each enough for about 64 rows. Each group is dealt out evenly (fill_evenly), so that a step on one row gives its
    frames about the same weight as a step on another. Then the rows are shuffled.
    """
    shuffled = rng.permutation(indices)
    ends = np.cumsum(lengths[shuffled])
    count = max(1, round(ends[-1] / (GROUP * max_tokens)))
    bounds = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
    rows = [row for group in np.split(shuffled, bounds) if len(group) for row in fill_evenly(lengths, group, max_tokens)]
    return [rows[i] for i in rng.permutation(len(rows))]


def fill_evenly(lengths: np.ndarray, indices: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Return `indices` in as few rows as hold them when each clip, the longest first, goes to the emptiest row.

    So the fullest and the emptiest row differ by at most the length of one clip. This is longest-processing-time scheduling
    (Graham 1969, Bounds on multiprocessing timing anomalies) with a limit of `max_tokens` per row.
    """
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    sizes = lengths[ordered].tolist()
    count = -(-sum(sizes) // max_tokens)
    while True:
        rows, filled = [[] for _ in range(count)], [(0, row) for row in range(count)]  # a heap: the emptiest comes first
        for index, size in zip(ordered.tolist(), sizes, strict=True):
            full, row = filled[0]
            if full + size > max_tokens:
                break
            rows[row].append(index)
            heapq.heapreplace(filled, (full + size, row))
        else:
            return rows
        count += 1


def plan_rows(clips: Clips, max_tokens: int, count: int, seed: int) -> list[list[int]]:
    """Return the `count` rows of a whole training; the same for the same seed.

    Epoch follows epoch, each shuffled and packed anew.
    """
    plan, epoch = [], 0
    while len(plan) < count:
        plan += pack_epoch(clips.lengths, clips.usable, max_tokens, np.random.default_rng([seed, epoch]))
        epoch += 1
    return plan[:count]


class PackedRows(Dataset):
    """The rows of a plan as tensors (pack_row), each with its number as `row`.

    Row i is the same whenever and wherever it is asked for, as its draw of depth frames comes from `seed` and i alone. So a
    resumed training sees the same data as one that was never stopped, and two processes the same as one.
    """

    def __init__(self, clips: Clips, plan: list[list[int]], depth_ratio: float, seed: int):
        self.clips, self.plan, self.depth_ratio, self.seed = clips, plan, depth_ratio, seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, index]).integers(2**62)))
        return pack_row(self.clips, self.plan[index], self.depth_ratio, generator) | {"row": torch.tensor(index)}

    def describe(self, index: int) -> str:
        """Return the clips of a row for an error message: number, speaker and text of each."""
        rows = self.clips.rows
        return "; ".join(f"clip {i} [{rows[i]['speaker_id']}] {rows[i]['text']!r}" for i in self.plan[index])


def pack_row(clips: Clips, indices, depth_ratio: float, generator: torch.Generator | None = None) -> dict:
    """Return clips one after the other in one row: of each its text, its frames and the end-of-speech frame.

    All entries have one value per position:

    - input_ids: the text's tokens; 0 at frames.
    - codes (positions, codebooks): the frames, with zeros as end of speech; 0 at text.
    - is_frame (bool).
    - position_ids: begins at 0 in each clip, which keeps the clips from seeing each other.
    - labels: codebook 0 at frames, else -100.
    - depth_frames (bool): the frames that the depth decoder learns from. They are `depth_ratio` of the frames, rounded and
      at least one, drawn evenly from all, so that the mean over them is in expectation the mean over all.
    """
    input_ids, codes, positions, is_frame = [], [], [], []
    for index in indices:
        ids = clips.input_ids[index]
        stored = np.asarray(clips.rows[index]["codes"]).astype(np.int64)
        frames, codebooks = len(stored) + 1, stored.shape[1]
        input_ids += [*ids, *[0] * frames]
        codes += [np.zeros((len(ids), codebooks), np.int64), stored, np.zeros((1, codebooks), np.int64)]
        positions.append(np.arange(len(ids) + frames))
        is_frame += [False] * len(ids) + [True] * frames
    codes, is_frame = torch.from_numpy(np.concatenate(codes)), torch.tensor(is_frame)
    frames = is_frame.nonzero()[:, 0]
    drawn = frames[torch.randperm(len(frames), generator=generator)[: max(1, round(depth_ratio * len(frames)))]]
    depth_frames = torch.zeros_like(is_frame)
    depth_frames[drawn] = True
    return {
        "input_ids": torch.tensor(input_ids), "codes": codes, "is_frame": is_frame, "depth_frames": depth_frames,
        "position_ids": torch.from_numpy(np.concatenate(positions)), "labels": codes[:, 0].masked_fill(~is_frame, IGNORED),
    }


def collate(rows: list[dict]) -> dict:
    """Return rows (pack_row) as one batch, padded on the right.

    The padding of a row is a sequence of its own, without labels.
    """
    batch = {key: pad_sequence([row[key] for row in rows], batch_first=True, padding_value=IGNORED if key == "labels" else 0)
             for key in ("input_ids", "codes", "is_frame", "depth_frames", "labels")}
    length = batch["labels"].shape[1]
    batch["position_ids"] = torch.stack([torch.cat([row["position_ids"], torch.arange(length - len(row["position_ids"]))])
                                         for row in rows])
    if "row" in rows[0]:
        batch["row"] = torch.stack([row["row"] for row in rows])
    depth = batch["depth_frames"]
    if depth.sum() == batch["codes"].shape[-1]:
        # transformers 5.17 fails on as many depth frames as codebooks: it takes its 1-D position_ids for a batch of them
        place = depth.nonzero()[int(batch["codes"].sum()) % int(depth.sum())]
        depth[tuple(place)] = False
    return batch


def batch_clips(clips: Clips, indices, depth_ratio: float = 1.0, generator: torch.Generator | None = None) -> dict:
    """Return a batch with one clip per row: what a loss is computed on outside of a training."""
    return collate([pack_row(clips, [index], depth_ratio, generator) for index in indices])
