"""One thread that speaks for everybody: requests wait in a bounded queue, take rows of a batch, and hear their samples."""

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy as np
import torch

from csm_nb.codec.stream import decode_stream
from csm_nb.csm.load import encode_text, inner_model
from csm_nb.csm.tags import pick_tag
from csm_nb.serve.voices import Reader, Shelf, count_positions, fill_shelf, list_folders
from csm_nb.speak.batch import Batch, Utterance
from csm_nb.speak.generate import SpeechError, check_text, count_frames, make_utterance
from csm_nb.speak.stream import RAMP
from csm_nb.text.breaks import split_sentences
from csm_nb.text.spoken import read_out

LONGEST = 300  # characters that are said at once; longer texts are split at their sentences
PAUSE = 0.3  # s of silence between the parts of a text that was split
LOOK = 2.0  # s from one look at the adapters' folder to the next
HELLO = "Good morning."  # has to be spoken before the server calls itself ready


class FullError(RuntimeError):
    """More requests than may wait, or a server that is going down: to be tried again later."""


@dataclass(eq=False)
class Job:
    """One request: texts that are said one after the other, by a reader of the shelf that it was asked of.

    `tell` hears, in the engine's thread: samples (float32) as they come, last a finish ("end" or "length") or an exception.
    """

    shelf: Shelf
    reader: Reader
    parts: list[str]
    voice: str
    tag: str
    seed: int
    frames: int
    tell: Callable[[object], None]
    finish: str = "end"
    codes: list = field(default_factory=list)
    gone: bool = False


class Engine:
    """Steps a batch of up to `slots` utterances, across languages; up to `most` requests wait. One thread computes.

    `start` begins with a sentence; `ready` says whether it was spoken. Every answer is what the same request gets alone.
    """

    def __init__(self, model, processor, folder, slots: int = 8, most: int = 32, licence: str = ""):
        self.inner, self.processor, self.folder, self.licence = inner_model(model), processor, folder, licence
        self.rate = self.inner.codec_model.config.sampling_rate
        self.frame_rate = self.inner.codec_model.config.frame_rate
        self.slots, self.most, self.waiting = slots, most, deque()
        self.ready, self.fault, self.ended = False, "", False
        self.batches: dict[Shelf, Batch] = {}
        self.state = threading.Condition()  # over waiting and ended
        self.reading = threading.Lock()  # a tokenizer has one state
        self.filling = threading.Lock()
        self.shelf = fill_shelf(model, folder, licence)
        self.threads = [threading.Thread(target=self._run, name="engine", daemon=True),
                        threading.Thread(target=self._watch, name="adapters", daemon=True)]

    def start(self) -> None:
        """Begin to speak, first a sentence that nobody hears."""
        for thread in self.threads:
            thread.start()
        self.submit(self.prepare(HELLO, "en", "", 0, 10.0, self._greet))

    def _greet(self, event):
        self.ready |= isinstance(event, str)
        self.fault = f"{type(event).__name__}: {event}" if isinstance(event, Exception) else ""

    def stop(self) -> None:
        """End: whoever waits or is spoken for gets FullError."""
        with self.state:
            self.ended = True
            self.state.notify_all()
        for thread in self.threads:
            if thread.is_alive():
                thread.join()

    def count_taken(self) -> int:
        """Return how many utterances are being spoken."""
        return sum(map(len, list(self.batches.values())))

    def prepare(self, text: str, language: str, voice: str, seed: int, seconds: float, tell) -> Job:
        """Return a request that `submit` takes, for at most `seconds` of speech.

        Raises SpeechError for a text that can not be spoken, KeyError for a language that nobody reads, and ValueError for a
        voice that its reader does not have.
        """
        shelf = self.shelf
        reader = shelf.readers[language]
        speaker, tag = reader.pick(voice), pick_tag(reader.tags, language if reader.tags else "")
        with self.reading:
            parts = self._split(text, language, reader, speaker, tag, count_positions(shelf))
            for part in parts:
                check_text(self.inner, self.processor, part, speaker, tag)
        return Job(shelf, reader, parts, speaker, tag, seed, int(seconds * self.frame_rate), tell)

    def _split(self, text, language, reader, speaker, tag, positions, longest=LONGEST):
        """Parts of a text, as the reader was trained to have them, that each fit the model: itself, its sentences, or less."""
        said = read_out(text, language) if reader.read_out else text
        room = positions - count_frames(self.inner, said) - len(encode_text(self.processor, said, speaker, tag))
        if len(text) <= longest and room >= 0:
            return [said]
        parts = [part for part in split_sentences(text, language, longest) if any(map(str.isalnum, part))]
        if not parts:
            raise SpeechError(f"there is nothing to say in {text[:60]!r}: it holds neither letter nor digit")
        longest = longest // 2 if len(parts) == 1 else longest
        return [piece for part in parts for piece in self._split(part, language, reader, speaker, tag, positions, longest)]

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn. Raises FullError where as many wait as may."""
        with self.state:
            if self.ended:
                raise FullError("the server is going down")
            self.waiting = deque(one for one in self.waiting if not one.gone)
            if len(self.waiting) >= self.most:
                raise FullError(f"{len(self.waiting)} requests are waiting, which is as many as may")
            self.waiting.append(job)
            self.state.notify_all()

    def hang_up(self, job: Job) -> None:
        """Forget a request whose asker is gone: its row is free after the frame that is being said."""
        job.gone = True

    def refresh(self) -> bool:
        """Take up adapters that have appeared in the folder, drop those that are gone; return whether anything changed.

        What is being spoken, and waits already, is spoken with those that it was asked of.
        """
        with self.filling:
            if list_folders(self.folder) == self.shelf.seen:
                return False
            self.shelf = fill_shelf(self.shelf.model, self.folder, self.licence)
            return True

    def _watch(self):
        while not self.ended:
            self.refresh()
            with self.state:
                self.state.wait_for(lambda: self.ended, LOOK)

    @torch.inference_mode()
    def _run(self):
        while True:
            with self.state:
                self.state.wait_for(lambda: self.ended or self.waiting or self.count_taken())
                if self.ended:
                    break
            self._admit()
            for shelf in list(self.batches):
                self._step(shelf)
        for job in [*self.waiting, *(row.key.job for batch in self.batches.values() for row in batch.rows if row)]:
            self._tell(job, FullError("the server is going down"))

    def _admit(self):
        while self.count_taken() < self.slots:
            with self.state:
                job = self.waiting.popleft() if self.waiting else None
            if job is None:
                return
            if not job.gone:
                self._begin(job)

    def _begin(self, job):
        """Give the next part of a request a row; what goes wrong is told to this one alone."""
        try:
            with self.reading:
                one = make_utterance(job.shelf.decoders, self.inner, self.processor, job.parts[0], job.voice, job.reader.worn,
                                     job.tag, job.seed)
            one.cap, one.key = min(one.cap, job.frames), Sound(job, self.inner.codec_model)
            if job.shelf not in self.batches:
                self.batches[job.shelf] = Batch(job.shelf.decoders, self.slots, count_positions(job.shelf))
            self.batches[job.shelf].admit(one)
        except Exception as error:
            self._tell(job, error)

    def _step(self, shelf):
        batch = self.batches[shelf]
        for row in [row for row in batch.rows if row and row.key.job.gone]:
            batch.drop(row)
        try:
            said = batch.step()
        except Exception as error:
            for row in filter(None, batch.rows):
                self._tell(row.key.job, error)
            del self.batches[shelf]
            return
        for row in said:
            try:
                self._hand_on(row)
            except Exception as error:
                self._tell(row.key.job, error)
        if not len(batch) and shelf is not self.shelf:  # its adapters were changed, and nobody speaks with it any more
            del self.batches[shelf]

    def _hand_on(self, row: Utterance):
        job, wav = row.key.job, row.key.decode(row)
        if len(wav):
            self._tell(job, wav)
        if not row.finish:
            return
        job.codes.append(row.codes)
        job.frames -= len(row.codes) + math.ceil(PAUSE * self.frame_rate)
        job.parts = job.parts[1:]
        if row.finish == "length" or job.parts and job.frames < 1:
            job.finish = "length"
        if job.parts and job.frames >= 1 and not job.gone:
            self._tell(job, np.zeros(int(PAUSE * self.rate), np.float32))
            self._begin(job)
        else:
            self._tell(job, job.finish)

    def _tell(self, job, event):
        job.gone |= isinstance(event, Exception)
        try:
            job.tell(event)
        except Exception:  # nobody is there to hear it
            job.gone = True


class Sound:
    """The samples of one utterance while its frames come: in chunks that grow, so that the first is there early."""

    def __init__(self, job: Job, codec):
        self.job, self.sent, self.chunks = job, 0, deque()
        self.sizes = chain(RAMP, repeat(RAMP[-1]))
        self.size, self.wavs = next(self.sizes), decode_stream(codec, _take_all(self.chunks))

    def decode(self, row: Utterance) -> np.ndarray:
        """Return the samples of frames that have not been heard; none where they are too few yet."""
        count = len(row.codes) - self.sent
        if not count or count < self.size and not row.finish:
            return np.zeros(0, np.float32)
        self.chunks.append(np.array(row.codes[self.sent :], np.uint16))
        self.sent, self.size = len(row.codes), next(self.sizes)
        return next(self.wavs)


def _take_all(chunks):
    while True:
        yield chunks.popleft()
