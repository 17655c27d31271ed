"""Attention that takes a packed row clip by clip: on a CPU no mask of row by row positions is made, and none is computed."""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

NAME = "by_clip"


def attend_by_clip(module, query, key, value, mask, scaling, position_ids=None, **kwargs):
    """Compute causal attention within each clip of a packed row, as transformers' attention functions have it.

    A clip begins where `position_ids` is 0. Full-size rows of 1,060 positions of 10 clips, two cores: 152 positions/s forward
    and backward; transformers' sdpa with a packed mask 119, eager 65.
    """
    shared = position_ids is None or len(position_ids) == 1
    rows = [slice(None)] if shared else [slice(i, i + 1) for i in range(len(query))]
    outputs = []
    for number, row in enumerate(rows):
        if position_ids is None:
            starts = [0]
        else:
            starts = (position_ids[0 if shared else number] == 0).nonzero()[:, 0].tolist()
        bounds = zip(starts, [*starts[1:], query.shape[2]], strict=True)
        clips = [[part[row, :, a:b] for part in (query, key, value)] for a, b in bounds]
        outputs.append(torch.cat([_attend(module, *clip, scaling) for clip in clips], 2))
    return torch.cat(outputs).transpose(1, 2).contiguous(), None


def _attend(module, query, key, value, scaling):
    groups, (count, heads, length, width) = module.num_key_value_groups, query.shape
    grouped = query.reshape(count, heads // groups, groups * length, width)
    weights = (grouped @ key.transpose(2, 3) * scaling).view(count, heads // groups, groups, length, length)
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = weights.masked_fill(ahead, float("-inf")).softmax(-1).to(query.dtype)
    return (weights.view(count, heads // groups, groups * length, length) @ value).view(count, heads, length, width)


AttentionInterface.register(NAME, attend_by_clip)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def use_attention(model, training: bool) -> None:
    """Set both decoders' attention: clip by clip for training on a CPU, otherwise sdpa, which masks packed clips itself.

    Generation needs sdpa: clip by clip knows neither a cache nor padding.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the settings of other parts change as well; they are not run meanwhile
    for part in (model.backbone_model, model.depth_decoder):
        part.set_attn_implementation(NAME if training and model.device.type == "cpu" else "sdpa")
    logging.set_verbosity(level)
