"""Long recordings with one transcript each: cut at pauses into clips with their text, by CTC alignment; bad stretches listed.

python -m csm_nb.corpora.align FOLDER --lang no --out FOLDER2 [--model models/asr-mini]
"""

import argparse
import json
import sys
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import torch

from csm_nb.audio import SAMPLE_RATE, AudioError, read_audio
from csm_nb.corpora.sources import list_rows
from csm_nb.hub import ModelError
from csm_nb.judge.judges import load_asr
from csm_nb.manifest import CorpusError, write_manifest
from csm_nb.paths import resolve_path
from csm_nb.prosody.marks import WORST_CER, place_letters, score_frames
from csm_nb.provenance import hash_file, hash_value, read_json, write_json
from csm_nb.text.normalise import character_error_rates, normalise_text
from csm_nb.text.numbers import spell_numbers

LONG = 30.0  # s; what is shorter is a clip as it is
SHORTEST, LONGEST = 2.0, 20.0  # s, of a piece
PAUSE = 0.3  # s between the letters of two words: where a piece may end
EDGE = 0.3  # s of a pause that a piece keeps on either side, at most
WINDOW, MARGIN = 30.0, 2.0  # s that the recogniser hears at once, and of it on either side what is not used
# Where recogniser and transcript agree for so many letters, both are at the same place (Moreno et al. 1998, ICSLP); between two
# such places, at least SPAN s apart, letters are aligned. Without one for UNSURE s nothing is: the alignment takes two bytes per
# frame and letter, .15 GB at 300 s, 50 frames and 15 letters per second.
ANCHOR, SPAN, UNSURE = 10, 30.0, 300.0
# Geometric mean of the letters' probabilities. By espeak-ng and asr-mini the 45 pieces of three languages have .6 and more, with
# the text of other sentences .001 and less.
LEAST_SCORE = 0.1


def align_recording(asr, wav, text: str, language: str) -> tuple[list[dict], list[dict]]:
    """Return (pieces, bad stretches) of a recording (24 kHz) and its transcript, in their order.

    Each is {"start", "end" (s), "text", "score" (geometric mean of its letters' probabilities), "cer" (of what the recogniser
    hears in it)}; a bad one has the `reason` as well: a score below LEAST_SCORE, a CER above marks.WORST_CER, no pause for
    LONGEST s, or no place for its letters. `asr` is a CTC recogniser (judges.load_asr). It hears WINDOW s at a time: an hour
    takes no more memory than its scores, .1 GB with 100 tokens. Raises ValueError for another model, and for no text.
    """
    words = [(word, normalise_text(spell_numbers(word, language))) for word in text.split()]
    if not any(letters for _, letters in words):
        raise ValueError("no text to align")
    scores, times = _score_recording(asr, wav)
    heard = _read_heard(asr, scores, times)
    placed, bad = _place_words(asr, scores, times, words, heard)
    pieces, unpaused = _join_words(wav, placed)
    pieces = [_judge(piece, heard, language) for piece in pieces]
    bad += unpaused + [piece for piece in pieces if "reason" in piece]
    return [piece for piece in pieces if "reason" not in piece], sorted(bad, key=lambda stretch: stretch["start"])


def _score_recording(asr, wav):
    """Return the log probabilities of all frames, and the time of each (s): windows that overlap, without their margins."""
    parts, times, seconds = [], [], len(wav) / SAMPLE_RATE
    for start in np.arange(0, seconds, WINDOW - 2 * MARGIN):
        window = wav[int(start * SAMPLE_RATE) : int((start + WINDOW) * SAMPLE_RATE)]
        last = start + WINDOW >= seconds
        if len(window) < 0.1 * SAMPLE_RATE:
            break
        scores = score_frames(asr, window)
        at = start + (np.arange(len(scores)) + 0.5) * len(window) / SAMPLE_RATE / len(scores)
        inside = (at >= start + MARGIN * (start > 0)) & (last | (at < start + WINDOW - MARGIN))
        parts.append(scores[torch.from_numpy(inside)])
        times.append(at[inside])
        if last:
            break
    return torch.cat(parts), np.concatenate(times)


def _read_heard(asr, scores, times):
    """Return [(letter, frame, time)] of what the recogniser writes itself, words parted by single spaces."""
    tokens, special = scores.argmax(-1).numpy(), set(asr.tokenizer.all_special_ids)
    letters, heard = asr.tokenizer.convert_ids_to_tokens(range(scores.shape[-1])), []
    delimiter = getattr(asr.tokenizer, "word_delimiter_token", None)
    for frame, token in enumerate(tokens):
        if frame and tokens[frame - 1] == token or token in special and letters[token] != delimiter:
            continue
        letter = " " if letters[token] == delimiter else letters[token].lower()
        if len(letter) == 1 and (letter != " " or heard and heard[-1][0] != " "):
            heard.append((letter, frame, times[frame]))
    return heard


def _find_anchors(words, heard, times):
    """Return [(first word, first frame)] of stretches to align one by one, and the end of all."""
    reference = " ".join(letters for _, letters in words)
    said = "".join(letter for letter, _, _ in heard)
    starts = np.cumsum([len(reference.lstrip()) - len(reference), *(len(letters) + 1 for _, letters in words)])
    anchors = [(0, 0)]
    for chunk in jiwer.process_characters(reference.strip() or "-", said.strip() or "-").alignments[0]:
        if chunk.type != "equal" or chunk.ref_end_idx - chunk.ref_start_idx < ANCHOR:
            continue
        for number in np.flatnonzero((starts[:-1] > chunk.ref_start_idx + 3) & (starts[:-1] < chunk.ref_end_idx - 3)):
            at = starts[number] - chunk.ref_start_idx + chunk.hyp_start_idx
            frame = (heard[at - 2][1] + heard[at][1]) // 2 + 1  # between the last letter of a word and the first of the next
            if words[number][1] and times[frame] - times[anchors[-1][1]] >= SPAN:
                anchors.append((int(number), frame))
    return [*anchors, (len(words), len(times))]


def _place_words(asr, scores, times, words, heard):
    """Return ([word, start, end, log probabilities of its letters], None between words that do not follow), and bad stretches."""
    placed, bad, anchors = [], [], _find_anchors(words, heard, times)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    for (word, frame), (next_word, next_frame) in zip(anchors, anchors[1:], strict=False):
        some, at = words[word:next_word], times[frame:next_frame]
        letters = " ".join(letters for _, letters in some)
        try:
            if len(at) * step > UNSURE:
                raise ValueError(f"for {len(at) * step:.0f} s recogniser and transcript agree nowhere")
            spans = iter(place_letters(asr, scores[frame:next_frame], letters))
        except ValueError as error:
            bad.append({"start": round(float(at[0]), 3), "end": round(float(at[-1]), 3), "score": 0.0, "cer": None,
                        "text": " ".join(word for word, _ in some), "reason": str(error)})
            placed.append(None)
            continue
        for number, (text, spelled) in enumerate(some):
            own = [span for span in [next(spans, None) for _ in spelled] if span]
            if number < len(some) - 1:
                next(spans, None)  # the space
            if own:
                scores_of = [np.log(max(probability, 1e-9)) for *_, probability in own]
                placed.append([text, float(at[own[0][0]]), float(at[own[-1][1] - 1]) + step, scores_of])
            elif placed and placed[-1]:  # a sign, or letters that the recogniser does not have
                placed[-1][0] += f" {text}"
    return placed, bad


def _join_words(wav, placed):
    """Return (pieces, stretches without a pause that is long enough): words from pause to pause, SHORTEST to LONGEST s."""
    runs, seconds = [], len(wav) / SAMPLE_RATE
    for before, word in zip([None, *placed], placed, strict=False):
        if word and (before is None or word[1] - before[2] >= PAUSE):
            runs.append([before is not None, []])  # whether it follows on what was before
        if word:
            runs[-1][1].append(word)
    joined = []
    for follows, words in runs:
        last = joined[-1] if joined and follows else None
        short = last and (last[-1][2] - last[0][1] < SHORTEST or words is runs[-1][1] and words[-1][2] - words[0][1] < SHORTEST)
        if short and words[-1][2] - last[0][1] <= LONGEST - 2 * EDGE:
            last += words
        else:
            joined.append(list(words))
    pieces, bad = [], []
    for number, words in enumerate(joined):
        start = _find_cut(wav, joined[number - 1][-1][2] if number else 0.0, words[0][1])
        end = _find_cut(wav, words[-1][2], joined[number + 1][0][1] if number + 1 < len(joined) else seconds)
        start, end = max(start, words[0][1] - EDGE), min(end, words[-1][2] + EDGE)
        piece = {"start": round(start, 3), "end": round(end, 3), "text": " ".join(word for word, *_ in words),
                 "score": round(float(np.exp(np.mean(sum((word[3] for word in words), [])))), 3), "cer": None}
        if not SHORTEST <= end - start <= LONGEST:
            bad.append(piece | {"reason": f"{end - start:.1f} s from a pause of {PAUSE:g} s to the next that a piece may end in; "
                                          f"allowed are {SHORTEST:g} to {LONGEST:g} s"})
        else:
            pieces.append(piece)
    return pieces, bad


def _find_cut(wav, start, end):
    """Return where between two times it is quietest, in s: the middle of the 100 ms of least energy."""
    part, width = wav[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)], int(0.1 * SAMPLE_RATE)
    if len(part) <= width:
        return (start + end) / 2
    energy = np.cumsum(np.concatenate([[0.0], part.astype(np.float64) ** 2]))
    energy = energy[width::240] - energy[: len(energy) - width : 240]
    quiet = np.flatnonzero(energy <= energy.min() + 1e-6 * width)  # of digital silence the middle
    return start + (float(np.mean(quiet)) * 240 + width / 2) / SAMPLE_RATE


def _judge(piece, heard, language):
    said = "".join(letter for letter, _, time in heard if piece["start"] <= time < piece["end"])
    cer = round(float(character_error_rates([piece["text"]], [said], language)[0]), 3)
    piece |= {"cer": cer}
    if piece["score"] < LEAST_SCORE:
        piece["reason"] = f"its letters have a probability of {piece['score']:.1%}; at least {LEAST_SCORE:.0%} are allowed"
    elif cer > WORST_CER:
        piece["reason"] = f"the recogniser hears {said.strip()!r:.80}: CER {cer:.0%}, at most {WORST_CER:.0%} is allowed"
    return piece


def align_corpus(source, language: str, out, model: str = "models/asr-mini") -> tuple[Path, list[dict]]:
    """Write out/manifest.jsonl, the pieces of each recording of `source` (sources.list_rows); return (path, bad stretches).

    Clips of up to LONG s stay as they are. Pieces are rows with `start`, `end`, `score` and `cer` of the recording where it
    lies; bad stretches, and recordings that can not be read, are in out/bad.jsonl with their reason. Each recording is kept
    below out/aligned by its bytes, text and model, so that what was done is not done again. Raises CorpusError where nothing
    is of use, ModelError for a model that is not there or is no CTC recogniser.
    """
    out, rows, asr = resolve_path(out), list_rows(source, language), None
    kept, bad = [], []
    for row in rows:
        try:
            if row.get("text_fault"):
                raise AudioError(row["text_fault"])
            seconds = soundfile.info(row["audio_path"]).duration if Path(row["audio_path"]).is_file() else 0.0
            if "parquet_row" in row or row.get("start") or row.get("end") or 0 < seconds <= LONG:
                kept.append(row)
                continue
            mark = hash_value([hash_file(Path(row["audio_path"]), 24), row["text"], language, model]) if seconds else ""
            found = read_json(out / "aligned" / f"{mark}.json") if mark else {}
            if not found:
                wav = read_audio(row["audio_path"])
                asr = asr or load_asr(model, "auto", language)
                pieces, faults = align_recording(asr, wav, row["text"], language)
                found = {"pieces": pieces, "bad": faults}
                (out / "aligned").mkdir(parents=True, exist_ok=True)
                write_json(out / "aligned" / f"{mark}.json", found)
            kept += [row | piece for piece in found["pieces"]]
            bad += [row | stretch for stretch in found["bad"]]
            print(f"{Path(row['audio_path']).name}: {seconds:.0f} s, {len(found['pieces'])} pieces, {len(found['bad'])} bad "
                  "stretches", flush=True)
        except ModelError:
            raise
        except (ValueError, soundfile.LibsndfileError, OSError) as error:
            bad.append(row | {"reason": str(error)})
    if not kept:
        raise CorpusError(f"{source}: none of {len(rows)} recordings gave a piece; the first: {bad[0]['reason']}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bad.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad), encoding="utf-8")
    return write_manifest(kept, out / "manifest.jsonl"), bad


def main(words=None) -> int:
    """Cut long recordings with one transcript each into clips with their text; return 0, or 1 and say why not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", help="a folder of recordings with texts, or a manifest.jsonl")
    parser.add_argument("--lang", required=True, help="the language")
    parser.add_argument("--out", required=True, help="the folder of the new manifest.jsonl")
    parser.add_argument("--model", default="models/asr-mini", help="a CTC recogniser: a folder or hub id")
    options = parser.parse_args(words)
    try:
        path, bad = align_corpus(options.folder, options.lang, options.out, options.model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for stretch in bad[:20]:
        place = f" from {stretch['start']:g} to {stretch['end']:g} s" if "score" in stretch else ""
        print(f"left out: {Path(stretch['audio_path']).name}{place}: {stretch['reason']}")
    print(f"{path}: written; {len(bad)} stretches are left out (bad.jsonl)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
