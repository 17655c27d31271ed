"""The loss of packed rows, which does not depend on the size of a batch, and the model made ready for it."""

import torch
from torch.nn.functional import cross_entropy

from csm_nb.csm.attention import use_attention
from csm_nb.csm.load import inner_model
from csm_nb.recipe import Recipe, TrainingError
from csm_nb.train.packing import IGNORED


def build_inputs(model, batch: dict) -> dict:
    """Return what the model's forward takes: inputs_embeds, position_ids and labels (rows, positions, codebooks).

    `batch` is from packing.collate. Labels are -100 on text and padding and, in codebooks 1 and up, on frames that the depth
    decoder does not learn from. No audio is encoded here, as codes were stored before.
    """
    frames = model.backbone_model.embed_tokens(batch["codes"][batch["is_frame"]][None])[0]
    embeds = model.embed_text_tokens(batch["input_ids"]).to(frames.dtype)
    embeds = embeds.index_put((batch["is_frame"],), frames)
    labels = batch["codes"].masked_fill(~batch["is_frame"][..., None], IGNORED)
    labels[..., 1:] = labels[..., 1:].masked_fill(~batch["depth_frames"][..., None], IGNORED)
    return {"inputs_embeds": embeds, "position_ids": batch["position_ids"], "labels": labels}


def compute_loss(model, batch: dict, codebook_weights=(), text_weight: float = 0.0):
    """Return the model's output with .loss = mean over backbone frames + mean over depth-decoder codes, in nats.

    Both are means over what they label, so that neither depends on the batch's size. Passing the Trainer's
    num_items_in_batch to the model instead makes the depth loss codebooks - 1 times too large (31 on CSM-1B).

    `codebook_weights` weigh codebook 0 (the backbone's) and the others, relative to their mean. `text_weight` adds the loss
    on the next text token, with the text table as the head; its mean is in .text_loss. Raises TrainingError for weights that
    are not one per codebook, are negative or all 0.
    """
    inner = inner_model(getattr(model, "module", model))
    inputs = build_inputs(inner, batch)
    output = model(**inputs, use_cache=False, output_hidden_states=text_weight > 0)
    if len(codebook_weights):
        weights = torch.tensor(codebook_weights, dtype=torch.float32, device=output.loss.device)
        if len(weights) != inputs["labels"].shape[-1] or weights.min() < 0 or weights.sum() == 0:
            raise TrainingError(f"codebook_weights holds {list(codebook_weights)}; allowed are {inputs['labels'].shape[-1]} "
                                "numbers of 0 and more, not all 0, one per codebook, or none at all")
        weights = weights / weights.mean()
        targets = inputs["labels"][batch["depth_frames"]][:, 1:]
        logits = output.depth_decoder_logits.float()
        depth = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(0)
        output.loss = weights[0] * output.backbone_loss + (weights[1:] * depth).mean()
    if text_weight > 0:
        is_text = find_text_targets(batch)
        hidden = output.hidden_states[-1][:, :-1][is_text]
        logits = hidden @ inner.embed_text_tokens.weight.to(hidden.dtype).T
        output.text_loss = cross_entropy(logits.float(), batch["input_ids"][:, 1:][is_text])
        output.loss = output.loss + text_weight * output.text_loss
    return output


def find_text_targets(batch: dict) -> torch.Tensor:
    """Return which positions, from the second on, hold a text token that follows another one of the same clip.

    The shape is (rows, positions - 1), bool: what the loss on text is over.
    """
    is_text = ~batch["is_frame"][:, :-1] & ~batch["is_frame"][:, 1:] & (batch["position_ids"].diff() == 1)
    return is_text & (batch["input_ids"][:, 1:] != 0)  # not the padding


def prepare_model(model, recipe: Recipe):
    """Make `model` ready to be trained and return it.

    What is trained becomes float32, and attention does not mix packed clips. The recipe's gradient_checkpointing is for the
    backbone alone, as the depth decoder writes into its input. Raises TrainingError where nothing is trainable.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("nothing in the model is trainable; add an adapter (adapters.add_adapter) or adapters.train_fully")
    for parameter in trained:
        parameter.data = parameter.data.float()
    inner = inner_model(model)
    use_attention(inner, training=True)
    if recipe.gradient_checkpointing:
        inner.backbone_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def restore_model(model) -> None:
    """Undo what prepare_model changed for the training alone, and go back to eval mode. Weights stay float32."""
    inner = inner_model(model)
    use_attention(inner, training=False)
    if inner.backbone_model.is_gradient_checkpointing:
        inner.backbone_model.gradient_checkpointing_disable()
        inner.backbone_model.disable_input_require_grads()  # the hook on the embeddings, which transformers leaves there
    model.eval()
