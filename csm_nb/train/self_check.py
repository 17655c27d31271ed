"""The self_check of a loaded model: faults that raise no error elsewhere are found here, on a known batch, before training."""

import unicodedata
from collections import Counter

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from csm_nb import device
from csm_nb.clean import clean_text
from csm_nb.csm.attention import use_attention
from csm_nb.csm.load import inner_model
from csm_nb.recipe import TrainingError
from csm_nb.train import loss, packing
from csm_nb.train.packing import batch_clips, collate, pack_row, read_clips

TOLERANCE = 0.02  # relative, of the depth loss; bfloat16 keeps two to three digits
FRAMES = (11, 7)  # of the known clips; so few take CSM-1B seconds on a CPU
# What to do when a check fails.
WAYS_OUT = {
    "codebook tables are one": "load with load.load_base, which ties them (transformers 5.17 does not)",
    "depth loss is a mean": "the loss would train the depth decoder out of proportion (31 times on CSM-1B, where transformers "
                            "divides by frames instead of codes); use loss.compute_loss, and look at transformers' version",
    "end of speech is labelled": "a model that never learns to stop runs on; look at loss.build_inputs",
    "clips do not see each other": "a clip in a packed row would learn to lean on its neighbours, which are not there when it "
                                   "is spoken; load with load.load_base, and look at attention.use_attention and transformers' "
                                   "version (packed clips are told by position_ids that restart)",
    "positions restart in each clip": "a clip would be trained at positions where it is never spoken; look at packing.pack_row",
    "no clip is beyond the context": "the model has no position for the end of such a clip; packing.read_clips sets it aside "
                                     "where it is given the context",
    "text survives the tokenizer": "letters of the language itself are lost before the model sees them; use the tokenizer of the "
                                   "base model, whole, or a base whose tokenizer has them",
    "trained: backbone": "attach with adapters.start_training, which names both decoders by full path",
    "trained: depth decoder": "attach with adapters.start_training, which names both decoders by full path",
    "not trained: codec": "names such as q_proj alone also match Mimi's layers; attach with adapters.start_training",
    "gradients reach the backbone": "something on the way is frozen or detached; load anew, and attach with "
                                 "adapters.start_training",
    "gradients reach the depth decoder": "something on the way is frozen or detached; load anew and attach with "
                                         "adapters.start_training",
}


class ProofError(RuntimeError):
    """A model that is not fit for training; names each check that failed, what was found and what to do."""


def prove_model(model, processor, texts=(), corpus=()) -> pd.DataFrame:
    """Return a table of what was checked of `model`: one row per check, with the columns holds and found.

    Checked of every model:

    - There is one codebook table.
    - The depth decoder's loss is the mean over its codes, computed again by hand from random clips.
    - The frame that ends speech is labelled in every codebook.
    - In a packed row, other codes in one clip move no logit of the next, whose positions begin anew.
    - A clip longer than the model's context is set aside, however long a row may be.
    - `texts`, which hold the language's own letters, come back from the tokenizer unchanged (after clean_text). Of `corpus`,
      a list of texts, it counts those that lose characters (list_unknown names them); it fails only where all do.

    Checked also where something is trained (an adapter, or adapters.train_fully): it is in both decoders and not in the
    codec, and gradients reach both. Weights, modes and random numbers are left as they were; gradients are cleared. Raises
    ProofError where a check fails.
    """
    inner, checks = inner_model(model), {}
    tables = inner.backbone_model.embed_tokens.embed_audio_tokens.weight, inner.depth_decoder.model.embed_tokens.weight
    checks["codebook tables are one"] = tables[0].data_ptr() == tables[1].data_ptr(), " x ".join(map(str, tables[0].shape))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    training = model.training
    use_attention(inner, training=True)
    try:
        model.eval()  # no dropout
        clips = make_clips(inner, processor, texts)
        checks |= _check_loss(model, inner, make_batch(inner, clips), trained) | _check_packing(model, inner, clips)
    finally:
        use_attention(inner, training)
        model.train(training)
        model.zero_grad()
    checks["no clip is beyond the context"] = _check_context(inner, processor)
    checks["text survives the tokenizer"] = _check_texts(processor.tokenizer, texts, corpus)
    if trained:
        for part, name in (("backbone_model", "trained: backbone"), ("depth_decoder", "trained: depth decoder")):
            found = [tensor for tensor in trained if f"{part}." in tensor]
            checks[name] = bool(found), f"{len(found)} tensors"
    if trained or isinstance(model, PeftModel):
        found = [name for name, _ in model.named_parameters() if "codec_model." in name and ("lora_" in name or name in trained)]
        checks["not trained: codec"] = not found, found[0] if found else "0 tensors"
    table = pd.DataFrame.from_dict(checks, orient="index", columns=["holds", "found"]).rename_axis("check")
    failed = [f"{name} (found: {row.found}): {WAYS_OUT[name]}" for name, row in table.iterrows() if not row.holds]
    if failed:
        raise ProofError("the model is not what a training needs. " + "; ".join(failed))
    return table


def make_clips(model, processor, texts=()):
    """Return two short clips of random codes, the same every time, with the first of `texts` as theirs (packing.Clips)."""
    rng, config = np.random.default_rng(0), model.config
    shape = config.num_codebooks, model.codec_model.config.codebook_size
    rows = [{"text": text, "speaker_id": "0", "codes": rng.integers(1, shape[1], (frames, shape[0]), dtype=np.uint16)}
            for text, frames in zip((*texts, "Hello.", "No.")[:2], FRAMES, strict=True)]
    return read_clips(rows, processor, config.max_position_embeddings, model.codec_model.config.frame_rate)


def make_batch(model, clips) -> dict:
    """Return both clips of make_clips as a batch on the model's device, with all frames for the depth decoder."""
    batch = batch_clips(clips, [0, 1], generator=torch.Generator().manual_seed(0))
    return {key: value.to(model.device) for key, value in batch.items()}


def _check_loss(model, inner, batch, trained):
    checks, parts = {}, (("backbone", "backbone_model."), ("depth decoder", "depth_decoder."))
    with torch.set_grad_enabled(bool(trained)), device.half_precision(inner.device.type):
        output = loss.compute_loss(model, batch)
        labels = loss.build_inputs(inner, batch)["labels"]
    targets, logits = batch["codes"][batch["is_frame"]][:, 1:].flatten(), output.depth_decoder_logits.detach().flatten(0, -2)
    if len(logits) == len(targets):
        said, by_hand = output.depth_decoder_loss.item(), cross_entropy(logits.float(), targets).item()
        checks["depth loss is a mean"] = (abs(said / by_hand - 1) < TOLERANCE,
                                          f"{said:.3f}, by hand {by_hand:.3f}: {said / by_hand:.2f} times")
    else:
        checks["depth loss is a mean"] = False, f"of {len(logits)} codes, where the frames have {len(targets)}"
    ends = [labels[row, positions.nonzero()[-1, 0]] for row, positions in enumerate(batch["is_frame"])]
    right = sum(bool((end == inner.config.codebook_eos_token_id).all()) for end in ends)
    checks["end of speech is labelled"] = right == len(ends), f"in {right} of {len(ends)} clips"
    if trained:
        output.loss.backward()
        for name, part in parts:
            norm = sum(value.grad.float().square().sum().item() for key, value in trained.items()
                       if part in key and value.grad is not None) ** 0.5
            checks[f"gradients reach the {name}"] = 0 < norm < float("inf"), f"norm {norm:.3g}"
    return checks


def _check_packing(model, inner, clips):
    """Compare a row of both clips with one that has other codes in the first: the second's logits must be the same bits."""
    row, split = collate([pack_row(clips, [0, 1], 1.0, torch.Generator().manual_seed(0))]), int(clips.lengths[0])
    other = row | {"codes": row["codes"].clone()}
    first = row["is_frame"].clone()
    first[:, split:] = False
    other["codes"][first] = row["codes"][first] % (inner.codec_model.config.codebook_size - 1) + 1
    logits = []
    with torch.no_grad(), device.half_precision(inner.device.type):
        for batch in (row, other):
            batch = {key: value.to(inner.device) for key, value in batch.items()}
            positions = loss.build_inputs(inner, batch)["position_ids"][0].tolist()
            output = loss.compute_loss(model, batch)
            logits.append((output.logits[0], output.depth_decoder_logits.flatten(0, -2)))
    (backbone, depth), (backbone_too, depth_too) = logits
    drawn = row["depth_frames"]
    second = len(depth) * int((drawn & first).sum()) // int(drawn.sum())  # where the second clip's codes begin
    moved = [(a - b).abs().float().max().item() for a, b in ((backbone[split:], backbone_too[split:]),
                                                             (depth[second:], depth_too[second:]))]
    own = (backbone[:split] - backbone_too[:split]).abs().float().max().item()  # must move, or the check sees nothing
    expected = [*range(split), *range(int(clips.lengths[1]))]
    return {
        "clips do not see each other": (max(moved) == 0 < own, f"logits of the next clip move by {max(moved):.3g}, its own by "
                                                               f"{own:.3g}"),
        "positions restart in each clip": (positions == expected, f"the second clip begins at {positions[split]}"),
    }


def _check_context(model, processor):
    context, codebooks = model.config.max_position_embeddings, model.config.num_codebooks
    row = {"text": "No.", "speaker_id": "0", "codes": np.ones((context, codebooks), np.uint16)}
    try:
        packing.read_clips([row], processor, 2 * len(row["codes"]), model.codec_model.config.frame_rate, context)
    except TrainingError:
        return True, f"{context} positions"
    return False, f"a clip of {context} frames is trained on"


def list_unknown(processor, texts) -> pd.DataFrame:
    """Return the characters of `texts` that the model never sees, one row each, the most frequent first.

    It is for a look at a corpus before a training. Columns: character, code point, name, count, texts (how many hold it),
    example, what to do. Listed are characters that the tokenizer has no token for or drops, and those of no script: control
    characters, and U+FFFD where an encoding went wrong. A byte-level tokenizer such as Llama's accepts the latter. Characters
    that clean_text maps are not listed.
    """
    texts, counts, holders, examples = [clean_text(text) for text in texts], Counter(), Counter(), {}
    for text, lost in zip(texts, _find_lost(processor.tokenizer, texts), strict=True):
        found = Counter(text[i] for i in lost)
        counts.update(found)
        holders.update(found.keys())
        examples |= {character: text for character in found if character not in examples}
    rows = [(character, f"U+{ord(character):04X}", unicodedata.name(character, "no character"), count, holders[character],
             examples[character], _advise(character)) for character, count in counts.most_common()]
    return pd.DataFrame(rows, columns=["character", "code point", "name", "count", "texts", "example", "what to do"])


def _find_lost(tokenizer, texts):
    """Yield for each text the indices of its characters that no known token stands for."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    for text, ids, spans in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        seen = {i for token, (start, end) in zip(ids, spans, strict=True) if token != tokenizer.unk_token_id
                for i in range(start, end)}
        yield [i for i, character in enumerate(text) if i not in seen and not character.isspace() or _is_broken(character)]


def _is_broken(character):
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


def _advise(character):
    if _is_broken(character):
        return "the text's encoding went wrong on the way: save it again as UTF-8"
    if unicodedata.category(character)[0] in "LM":
        return "a letter that this base can not read: respell the word, or leave the clip out"
    return "write it as the word that is said"


def _check_texts(tokenizer, texts, corpus):
    lost = []
    for text in map(clean_text, texts):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # Llama's would tidy the space of "livre ?" away
        lost += [] if back == text else [f"{text!r} came back as {back!r}"]
    corpus = [clean_text(text) for text in corpus]
    losing = sum(map(bool, _find_lost(tokenizer, corpus)))
    if corpus and losing == len(corpus):
        lost.append(f"every text of the corpus loses characters, the first is {corpus[0]!r}")
    found = f"{len(texts)} of {len(texts)}" + (f"; of the corpus {len(corpus) - losing} of {len(corpus)}" if corpus else "")
    return not lost, lost[0] if lost else found
