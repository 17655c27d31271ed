"""Both decoders of CSM as plain products over the model's own weights, with static caches: what a frame costs, and no more.

Rows lie in blocks of BLOCK, and a block speaks with one adapter. In float32 on a CPU a row of a product comes out the same to the
last bit whatever lies in the others, and for every number of rows that is a multiple of BLOCK; attention likewise over every
length that is a multiple of STRIDE (tests/speak/test_decoders.py). So an utterance does not depend on the batch that it is in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight

from csm_nb.csm.load import inner_model

BLOCK, STRIDE = 4, 64


@dataclass(frozen=True)
class Product:
    """A linear layer (out, in), and what LoRA adds to it by adapter: (in, rank) and (rank, out), its scale within."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    added: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, rows: torch.Tensor, parts) -> torch.Tensor:
        """Return the product of `rows` (rows, in). `parts` are (adapter, first row, last row) of those with an adapter."""
        out = F.linear(rows, self.weight, self.bias)
        for adapter, first, last in parts:
            if pair := self.added.get(adapter):
                out[first:last].addmm_(rows[first:last] @ pair[0], pair[1])
        return out


def read_product(modules, adapters) -> Product:
    """Return linear layers that read the same rows as one, with the LoRA of `adapters` on any of them."""
    bases = [module.base_layer if isinstance(module, LoraLayer) else module for module in modules]
    weight = torch.cat([dequantize_module_weight(base).detach() for base in bases])
    bias = torch.cat([base.bias.detach() for base in bases]) if bases[0].bias is not None else None
    sizes, added = [base.out_features for base in bases], {}
    for adapter in adapters:
        worn = [module if isinstance(module, LoraLayer) and adapter in module.lora_A else None for module in modules]
        if any(worn):
            down = torch.cat([one.lora_A[adapter].weight.detach() for one in worn if one]).T
            ups = [one.lora_B[adapter].weight.detach() * one.scaling[adapter] if one else weight.new_zeros(size, 0)
                   for one, size in zip(worn, sizes, strict=True)]
            up = torch.block_diag(*ups).T
            added[adapter] = down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()
    return Product(weight, bias, added)


class Stack:
    """The layers of one decoder, read out of transformers' modules.

    Rows are flat, (rows, width). How a row attends to earlier ones, and where its keys and values are kept, is handed to `run`.
    """

    def __init__(self, model, config, adapters, positions: int):
        self.layers = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight,
                        read_product([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], adapters),
                        read_product([layer.self_attn.o_proj], adapters),
                        read_product([layer.mlp.gate_proj, layer.mlp.up_proj], adapters),
                        read_product([layer.mlp.down_proj], adapters)) for layer in model.layers]
        self.norm, self.eps, self.act = model.norm.weight, config.rms_norm_eps, model.layers[0].mlp.act_fn
        self.heads, self.kv, self.head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale, weight = self.head**-0.5, self.layers[0][2].weight
        cos, sin = model.rotary_emb(weight.new_zeros(1), torch.arange(positions, device=weight.device)[None])
        half = self.head // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # x.roll(half) * this turns x

    def make_cache(self, rows: int, positions: int) -> torch.Tensor:
        """Return room for the keys and values of `rows` rows: (layers, 2, rows, heads of keys, positions, width of a head)."""
        weight = self.layers[0][2].weight
        return weight.new_zeros(len(self.layers), 2, rows, self.kv, positions, self.head)

    def run(self, rows: torch.Tensor, positions, parts, attend) -> torch.Tensor:
        """Return the last hidden state of `rows` (rows, width) at `positions` (rows,); `attend(layer, q, k, v)` is theirs.

        q is (rows, heads, head), k and v (rows, heads of keys, head), q and k turned by their positions.
        """
        cos, sin, both = self.cos[positions][:, None], self.sin[positions][:, None], self.heads + self.kv
        for number, (before, after, qkv, output, gate_up, down) in enumerate(self.layers):
            found = qkv(self.normalise(rows, before), parts).view(len(rows), -1, self.head)
            turned = torch.addcmul(found[:, :both] * cos, found[:, :both].roll(self.head // 2, -1), sin)
            seen = attend(number, turned[:, : self.heads], turned[:, self.heads :], found[:, both:])
            rows = rows + output(seen.reshape(len(rows), -1), parts)
            gate, up = gate_up(self.normalise(rows, after), parts).chunk(2, -1)
            rows = rows + down(self.act(gate) * up, parts)
        return self.normalise(rows, self.norm)

    def normalise(self, rows, weight):
        """Return `rows` scaled to a root mean square of 1, then by `weight`."""
        return F.rms_norm(rows, rows.shape[-1:], weight, self.eps)

    def attend(self, q, keys, values, bias=None) -> torch.Tensor:
        """Return what q (rows, heads, head) finds among keys and values (rows, heads of keys, length, head).

        Heads of q share those of the keys in order. `bias` (rows, 1, 1, length) is -inf at what is not to be seen.
        """
        q = q.reshape(len(q), self.kv, -1, self.head)
        scores = (q * self.scale) @ keys.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return scores.softmax(-1) @ values


class Decoders:
    """What speaks: both decoders, heads and tables of a model, with the adapters that lie on it side by side.

    `adapters` are names of those on a PeftModel; a row may have any of them, or none (""). The codec is not in it. The weights
    of the layers are copied (2.5 GB for CSM-1B in bfloat16), those that read the same rows side by side.
    """

    def __init__(self, model, adapters=()):
        inner = inner_model(model)
        config, depth = inner.config, inner.depth_decoder.config
        self.codebooks, self.positions = config.num_codebooks, config.max_position_embeddings
        self.end = config.codebook_eos_token_id  # in all codebooks of a frame it is the end of speech
        self.backbone = Stack(inner.backbone_model, config, adapters, self.positions)
        self.depth = Stack(inner.depth_decoder.model, depth, adapters, self.codebooks)
        codes = inner.codec_model.config.codebook_size  # the vocabulary has a few ids more, which the codec can not decode
        self.head = inner.lm_head.weight[:codes].detach()
        self.depth_heads = inner.depth_decoder.codebooks_head.weight.detach()[..., :codes].transpose(1, 2).contiguous()
        audio = inner.backbone_model.embed_tokens
        self.audio, self.offsets = audio.embed_audio_tokens.weight.detach(), audio.audio_tokens_offsets
        self.project = inner.depth_decoder.model.inputs_embeds_projector.weight.detach()
        table = inner.depth_decoder.model.embed_tokens.weight.detach()
        self.depth_table = F.linear(table, self.project).view(self.codebooks, -1, len(self.project))  # a look-up a step
        self.texts = {name: _read_texts(inner.embed_text_tokens, name) for name in ("", *adapters)}

    def embed_text(self, ids: list[int], adapter: str = "") -> torch.Tensor:
        """Return the rows (length, width) of text tokens, from the adapter's own table where it has one."""
        return self.texts[adapter](torch.tensor(ids, device=self.audio.device)).to(self.audio.dtype)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the rows (frames, width) of frames of codes (frames, codebooks)."""
        return F.embedding(codes + self.offsets, self.audio).sum(1)

    def read_prompt(self, rows: torch.Tensor, adapter: str, cache: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state (width,) after the rows of one prompt (length, width), and fill its part of a cache.

        A prompt is read alone, so that nothing depends on what others are read at the same time. `cache` is (layers, 2, heads of
        keys, positions, head).
        """
        length, stack = len(rows), self.backbone

        def attend(layer, q, k, v):
            cache[layer, 0, :, :length], cache[layer, 1, :, :length] = k.transpose(0, 1), v.transpose(0, 1)
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        return stack.run(rows, torch.arange(length, device=rows.device), [(adapter, 0, length)] * bool(adapter), attend)[-1]

    def read_frame(self, codes: torch.Tensor, positions: torch.Tensor, parts, cache: torch.Tensor, length: int) -> torch.Tensor:
        """Return the hidden states (rows, width) after the next frame `codes` (rows, codebooks), at its rows' `positions`.

        `cache` is (layers, 2, rows, heads of keys, positions, head), of which the first `length` positions are looked at.
        """
        number, stack = torch.arange(len(codes), device=codes.device), self.backbone
        seen = torch.arange(length, device=codes.device) <= positions[:, None]
        bias = torch.zeros(seen.shape, dtype=self.audio.dtype, device=codes.device).masked_fill_(~seen, -torch.inf)[:, None, None]

        def attend(layer, q, k, v):
            keys, values = cache[layer, 0], cache[layer, 1]
            keys[number, :, positions], values[number, :, positions] = k, v
            return stack.attend(q, keys[:, :, :length], values[:, :, :length], bias)

        return stack.run(self.embed_codes(codes), positions, parts, attend)

    def say_frame(self, hidden: torch.Tensor, parts, cache: torch.Tensor, choose) -> torch.Tensor:
        """Return the codes (rows, codebooks) of one frame after `hidden` (rows, width).

        `choose(codebook, logits)` takes one code of each row. `cache` is the depth decoder's, of at least as many rows.
        """
        count, stack = len(hidden), self.depth
        first = choose(0, F.linear(hidden, self.head))
        rows = torch.stack([F.linear(hidden, self.project), self.depth_table[0][first]], 1).flatten(0, 1)
        places = torch.arange(2, device=hidden.device).repeat(count)
        doubled = [(adapter, 2 * start, 2 * end) for adapter, start, end in parts]
        causal = hidden.new_zeros(2, 2).masked_fill_(torch.ones(2, 2, dtype=torch.bool, device=hidden.device).triu(1), -torch.inf)

        def attend_first(layer, q, k, v):
            k, v = (part.view(count, 2, stack.kv, stack.head).transpose(1, 2) for part in (k, v))
            cache[layer, 0, :count, :, :2], cache[layer, 1, :count, :, :2] = k, v
            q = q.view(count, 2, stack.kv, -1, stack.head).permute(0, 2, 3, 1, 4)
            scores = (q * stack.scale) @ k[:, :, None].transpose(-1, -2) + causal
            return (scores.softmax(-1) @ v[:, :, None]).permute(0, 3, 1, 2, 4)

        codes, hidden = [first], stack.run(rows, places, doubled, attend_first)[1::2]
        for number in range(1, self.codebooks):
            codes.append(choose(number, F.linear(hidden, self.depth_heads[number - 1])))
            if number + 1 == self.codebooks:
                return torch.stack(codes, 1)
            place = slice(number + 1, number + 2)

            def attend(layer, q, k, v, end=number + 2, place=place):
                keys, values = cache[layer, 0, :count], cache[layer, 1, :count]
                keys[:, :, place], values[:, :, place] = k[:, :, None], v[:, :, None]
                return stack.attend(q, keys[:, :, :end], values[:, :, :end])

            hidden = stack.run(self.depth_table[number][codes[-1]], place, parts, attend)


def _read_texts(module, adapter):
    """Return the look-up of an adapter's text tokens: the base's table, or its own where it has trained it or rows of it."""
    if not isinstance(module, AuxiliaryTrainingWrapper):
        return module
    trained = getattr(module, "modules_to_save", {})
    if adapter in trained:
        return trained[adapter]
    rows = getattr(getattr(module, "token_adapter", None), "trainable_tokens_delta", {})
    base = getattr(module, "original_module", None) or module.token_adapter.base_layer
    if adapter not in rows:
        return base
    indices = torch.as_tensor(module.token_adapter.token_indices[adapter], device=base.weight.device)

    def look_up(ids):
        found, own = base(ids), ids[:, None] == indices
        return torch.where(own.any(1)[:, None], rows[adapter][own.int().argmax(1)].to(found.dtype), found)

    return look_up
