"""Utterances side by side: each in a row of its own, whose place another takes when it is done (continuous batching)."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256

import torch

from csm_nb.speak.decoders import BLOCK, STRIDE, Decoders


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn: from the `top_k` likeliest, of these from the likeliest that together have `top_p`; 0 is greedy."""

    temperature: float = 0.6
    top_k: int = 30
    top_p: float = 1.0


@dataclass(eq=False)
class Utterance:
    """What is to be said: a prompt as rows (Decoders.embed_text), the adapter that says it, and at most how many frames.

    `drawn` are its random numbers, uniform in 0 to 1, (frames, codebooks). `codes` are its frames so far, `finish` is "end", or
    "length" at the cap, or "" while it is spoken.
    """

    prompt: torch.Tensor
    cap: int
    drawn: torch.Tensor
    adapter: str = ""
    sampling: Sampling = Sampling()
    key: object = None
    codes: list = field(default_factory=list)
    finish: str = ""


def draw_numbers(text: str, speaker: str, seed: int, frames: int, codebooks: int) -> torch.Tensor:
    """Return the random numbers of one utterance, uniform in 0 to 1, (frames, codebooks): of what it is alone."""
    digest = sha256(f"{seed}\0{speaker}\0{text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.rand(frames, codebooks, generator=generator)


class Sampler:
    """How each row of a batch draws: temperature, top_k and top_p, one value per row (rows,)."""

    def __init__(self, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, vocabulary: int):
        self.most = min(int(top_k.max()), vocabulary)  # 1: all take the likeliest
        self.temperature = temperature[:, None]
        self.beyond = torch.arange(self.most, device=top_k.device) >= top_k[:, None]
        self.top_p = top_p[:, None] if float(top_p.min()) < 1 else None

    def draw(self, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return one index per row of logits (rows, vocabulary), by its number `drawn` (rows,), uniform in 0 to 1.

        Those that may be drawn share the line from 0 to 1 by their probabilities, in the order of their indices: by rank, two
        that are as likely but for rounding change places, and one of 64 utterances came out otherwise in another batch.
        """
        if self.most == 1:
            return logits.argmax(-1)
        values, indices = logits.topk(self.most)
        shares = ((values - values[:, :1]).float() / self.temperature).exp().masked_fill(self.beyond, 0)
        if self.top_p is not None:
            sums = shares.cumsum(-1)
            shares = shares.masked_fill(sums - shares >= self.top_p * sums[:, -1:], 0)
        order = indices.argsort(-1)
        shares = shares.gather(-1, order).cumsum(-1)
        whole = shares[:, -1:]
        place = ((shares <= drawn[:, None] * whole) & (shares < whole)).sum(-1, keepdim=True)
        return indices.gather(-1, order.gather(-1, place))[:, 0]


class Batch:
    """Up to `slots` utterances at once, of at most `positions` positions each (prompt and frames).

    Rows of one adapter lie in blocks (decoders.BLOCK) of their own, and there are a few rows more than slots, so that a block
    that is begun takes nobody's place.
    """

    def __init__(self, decoders: Decoders, slots: int, positions: int):
        self.decoders, self.slots = decoders, slots
        count = -(-slots // BLOCK) * BLOCK + BLOCK * (len(decoders.texts) - 1)
        positions = -(-positions // STRIDE) * STRIDE
        device, width = decoders.audio.device, decoders.audio.shape[1]
        self.rows: list[Utterance | None] = [None] * count
        self.cache = decoders.backbone.make_cache(count, positions)
        self.depth_cache = decoders.depth.make_cache(count, decoders.codebooks + 1)
        self.hidden = decoders.audio.new_zeros(count, width)
        self.positions = torch.zeros(count, dtype=torch.long, device=device)
        self.settings = torch.ones(3, count, device=device)  # temperature, top_k, top_p

    def __len__(self) -> int:
        return sum(row is not None for row in self.rows)

    def free(self, adapter: str) -> int:
        """Return how many more utterances of `adapter` find room now."""
        return min(len(self._list_room(adapter)), self.slots - len(self))

    def admit(self, utterance: Utterance) -> None:
        """Give an utterance a row and read its prompt. Raises ValueError where there is no room: ask `free` first."""
        room, length, sampling = self._list_room(utterance.adapter), len(utterance.prompt), utterance.sampling
        if not room or length + utterance.cap > self.cache.shape[4]:
            raise ValueError(f"no room for an utterance of {length} + {utterance.cap} positions: {len(self)} of {self.slots} "
                             f"rows are taken, and a row has {self.cache.shape[4]}")
        row = room[0]
        self.rows[row] = utterance
        self.hidden[row] = self.decoders.read_prompt(utterance.prompt, utterance.adapter, self.cache[:, :, row])
        self.positions[row] = length
        greedy = sampling.temperature <= 0
        self.settings[:, row] = torch.tensor([sampling.temperature or 1.0, 1 if greedy else sampling.top_k, sampling.top_p])

    def drop(self, utterance: Utterance) -> None:
        """Take an utterance out before its end, as when whoever asked for it has hung up."""
        self.rows[self.rows.index(utterance)] = None

    def step(self) -> list[Utterance]:
        """Say one more frame of every utterance and return them all; those with a `finish` have left."""
        self._close_ranks()
        count = max((number + 1 for number, row in enumerate(self.rows) if row), default=0)
        count = -(-count // BLOCK) * BLOCK
        if not count:
            return []
        parts, rows = self._list_parts(count), self.rows[:count]
        decoders, device = self.decoders, self.hidden.device
        nothing = torch.zeros(decoders.codebooks)
        drawn = torch.stack([row.drawn[len(row.codes)] if row else nothing for row in rows]).to(device)
        sampler = Sampler(*self.settings[:, :count], len(decoders.head))
        frame = decoders.say_frame(self.hidden[:count], parts, self.depth_cache,
                                   lambda codebook, logits: sampler.draw(logits, drawn[:, codebook]))
        said = [row for row in rows if row]
        for row, codes in zip(rows, frame.tolist(), strict=True):
            ends = row and all(code == decoders.end for code in codes)
            if row and not (ends and row.codes):  # of one that ends at once, a frame is left
                row.codes.append(codes)
            if row:
                row.finish = "end" if ends else "length" if len(row.codes) >= row.cap else ""
        self.rows = [None if row and row.finish else row for row in self.rows]
        if any(self.rows):
            longest = int(self.positions[:count].max()) + 1
            length = -(-longest // STRIDE) * STRIDE
            self.hidden[:count] = decoders.read_frame(frame, self.positions[:count], parts, self.cache[:, :, :count], length)
            alive = torch.tensor([row is not None for row in self.rows[:count]], device=device)
            self.positions[:count] = torch.where(alive, self.positions[:count] + 1, 0)
        return said

    def _list_room(self, adapter):
        """Rows that an utterance of `adapter` may take, those of blocks that speak with it already first."""
        if len(self) >= self.slots:
            return []
        room = [(not any(block), number * BLOCK + place) for number, block in enumerate(self._blocks())
                for place, row in enumerate(block) if row is None and {one.adapter for one in block if one} <= {adapter}]
        return [row for _, row in sorted(room)]

    def _blocks(self):
        return [self.rows[first : first + BLOCK] for first in range(0, len(self.rows), BLOCK)]

    def _list_parts(self, count):
        """(adapter, first row, last row) of blocks beside each other that speak with one adapter; none for the base."""
        parts = []
        for number, block in enumerate(self._blocks()[: count // BLOCK]):
            adapter = next((row.adapter for row in block if row), "")
            first = number * BLOCK
            if parts and parts[-1][0] == adapter and parts[-1][2] == first:
                parts[-1] = adapter, parts[-1][1], first + BLOCK
            else:
                parts.append((adapter, first, first + BLOCK))
        return [part for part in parts if part[0]]

    def _close_ranks(self):
        """Move rows together, so that no more blocks are computed than each adapter needs."""
        rows = Counter(row.adapter for row in self.rows if row)
        for adapter, count in rows.items():
            mine = [number for number, block in enumerate(self._blocks()) if any(row and row.adapter == adapter for row in block)]
            while len(mine) > -(-count // BLOCK):
                for number in [n for n in range(mine[-1] * BLOCK, (mine[-1] + 1) * BLOCK) if self.rows[n]]:
                    self._move(number, next(n for block in mine[:-1] for n in range(block * BLOCK, (block + 1) * BLOCK)
                                            if not self.rows[n]))
                mine.pop()
        empty = [number for number, block in enumerate(self._blocks()) if not any(block)]
        for number in reversed(range(len(self.rows) // BLOCK)):
            if empty and empty[0] < number and any(self._blocks()[number]):
                first, other = number * BLOCK, empty.pop(0) * BLOCK
                for place in range(BLOCK):
                    if self.rows[first + place]:
                        self._move(first + place, other + place)

    def _move(self, row, other):
        length = int(self.positions[row])
        self.cache[:, :, other, :, :length] = self.cache[:, :, row, :, :length]
        self.hidden[other], self.positions[other] = self.hidden[row], self.positions[row]
        self.settings[:, other] = self.settings[:, row]
        self.rows[other], self.rows[row] = self.rows[row], None
        self.positions[row] = 0
