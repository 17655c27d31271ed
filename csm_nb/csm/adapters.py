"""What is trained of a model: adapters put on it side by side, taken off and checked, or all of its weights."""

import json
import re
import warnings
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file

from csm_nb.csm.load import BACKBONE_TABLE, DEPTH_TABLE, BaseModelError, inner_model, tie_codebooks
from csm_nb.csm.record import drop_records, read_entries, set_record
from csm_nb.csm.tags import TagError, check_before, read_tags
from csm_nb.csm.weights import hash_weights
from csm_nb.recipe import TRAINED

ATTENTION = "q_proj|k_proj|v_proj|o_proj"
MLP = "gate_proj|up_proj|down_proj"
TRAINED_NAMES = r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\."  # of an adapter's parameters, before its name


def _ask_own(method):
    """Make a method of TrainableTokensWrapper answer for the adapters that train rows, and {} for the others beside them."""
    return lambda wrapper, name, *more: method(wrapper, name, *more) if name in wrapper._get_available_adapters() else {}


# peft 0.21 asks every wrapped table for every adapter's tensors, and fails (KeyError) where one beside it trains no rows.
TrainableTokensWrapper.adapter_state_dict = _ask_own(TrainableTokensWrapper.adapter_state_dict)
TrainableTokensWrapper.adapter_state_dict_load_map = _ask_own(TrainableTokensWrapper.adapter_state_dict_load_map)


class AdapterError(ValueError):
    """An adapter that is missing or not whole, does nothing, or was trained on another base model."""


def add_adapter(model, rank: int = 64, alpha: int = 128, dropout: float = 0.05, mlp: bool = False,
                text_embeddings: bool = False, seed: int = 0, rows=()) -> PeftModel:
    """Return `model` with a fresh LoRA adapter on the attention (and with `mlp` the MLP layers) of backbone and depth decoder.

    The targets are full paths: bare names such as q_proj would also match Mimi's transformer inside the model.
    `text_embeddings` trains the text table as well, for letters that the base has never seen; without it, `rows` of it alone
    (tags.find_rows). It begins with the weights that `seed` draws, whatever was drawn before.
    """
    layers = rf"(backbone_model|depth_decoder\.model)\.layers\.\d+\.(self_attn|mlp)\.({ATTENTION}{'|' + MLP if mlp else ''})"
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers,
        modules_to_save=["embed_text_tokens"] if text_embeddings else None,
        trainable_token_indices={"embed_text_tokens": list(rows)} if len(rows) and not text_embeddings else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_adapter(model, folder, trainable: bool = False, name: str = "default") -> PeftModel:
    """Return `model` with the adapter in `folder` on it and active under `name`, beside those that it has on already.

    Raises AdapterError when there is none, when it is not whole or fits only in part, when it belongs to another base, and
    when `model` says with it what it says without: each time `model` is left as it was.
    """
    folder, worn = Path(folder), model if isinstance(model, PeftModel) else None
    weights = _read_adapter(folder)
    _check_base(model, folder)
    if worn is not None and name in worn.peft_config:
        raise AdapterError(f"an adapter of the name {name!r} is on the model already; give another name")
    try:  # step by step, as peft's own from_pretrained passes over keys that match nothing
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = not trainable
        trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
        if worn is None:
            worn = get_peft_model(model, config, name)
        else:
            _check_tables(worn, config, folder)
            worn.add_adapter(name, config)
        config.base_model_name_or_path = trained_on
        _check_keys(worn, folder, name, weights)
        set_peft_model_state_dict(worn, weights, name)
        worn.set_adapter(name, inference_mode=not trainable)
        _check_effect(worn, folder)
    except Exception as error:
        _take_off(model, worn, name)
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{folder} can not be put on this base ({' '.join(str(error).split())[:300]}); its config and weights "
                           "do not fit each other or the base: fetch or train it again") from error
    set_record(worn, **read_entries(folder))
    return worn


def remove_adapters(model: PeftModel):
    """Take all adapters off and return the base as it was before them, to the last bit and key.

    PEFT's own unload() leaves the text table of the active adapter in the base, and where putting one on broke off halfway
    there is no PeftModel to ask.
    """
    base = model.get_base_model()
    _put_back(base)
    drop_records(base)
    return base


def _put_back(base):
    for name, module in list(base.named_modules()):
        kept = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else (
            module.base_layer if isinstance(module, LoraLayer) else None)
        if kept is not None:
            base.set_submodule(name, kept)
    base.__dict__.pop("peft_config", None)
    base.requires_grad_(False)


def _take_off(model, worn, name):
    """Undo a load that failed, however far it came."""
    if not isinstance(model, PeftModel):
        _put_back(model)
    elif name in model.peft_config:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another one is active then, which is what is wanted
            model.delete_adapter(name)


def _read_adapter(folder):
    """Return the tensors of an adapter's file by name, checked to be there and whole."""
    if not (folder / "adapter_config.json").exists():
        raise AdapterError(f"{folder} holds no adapter (no adapter_config.json); run 03_adapter for its language first")
    if not any((folder / file).is_file() for file in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{folder} holds the config of an adapter and no weights (adapter_model.safetensors): it was not "
                           "copied whole; fetch it again, or train it again")
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        read_entries(folder)
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # half a file fails in as many ways as there are formats
        raise AdapterError(f"{folder} can not be read ({type(error).__name__}: {error}): half a file, or none of an adapter's; "
                           "fetch it again, or train it again") from error
    if kind != "LORA":
        raise AdapterError(f"{folder} holds an adapter of type {kind}; allowed is LORA")
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise AdapterError(f"{folder}: {len(bad)} of {len(weights)} tensors hold weights that are no numbers, such as {bad[0]}; "
                           "take an earlier one, or train it again with a lower lr")
    return weights


def _check_base(model, folder):
    trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    kept, here = json.loads((folder / "base.json").read_text()) if (folder / "base.json").exists() else {}, describe_base(model)
    wrong = {key: (kept[key], value) for key, value in here.items() if value and kept.get(key) and kept[key] != value}
    if wrong:
        what = "a base of the same shape with other weights" if wrong.keys() == {"weights"} else "another base"
        raise AdapterError(f"{folder} was trained on {what}, {trained_on}; (its own, this one's): {wrong}. Choose the base model "
                           "it was trained on, or train it again")


def _check_tables(worn, config, folder):
    """Refuse what peft 0.21 can not have side by side: it wraps the table in one way, for the whole or for rows."""
    whole = [bool(one.modules_to_save) for one in (config, *worn.peft_config.values())
             if one.modules_to_save or one.trainable_token_indices]
    if len(set(whole)) > 1:
        own, other = ("all", "rows") if whole[0] else ("rows", "all")
        raise AdapterError(f"{folder} trained {own} of the text table, and another adapter on the model {other} of it: peft can "
                           "not have both on one base. Put one on after the other (remove_adapters), or train them alike "
                           "(train_text)")


def _check_keys(model, folder, name, weights):
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    for keys, what in ((weights.keys() - wanted, "match nothing in this base"), (wanted - weights.keys(), "are missing in it")):
        if keys:
            whole = len(weights) if what.startswith("match") else len(wanted)
            raise AdapterError(f"{folder}: {len(keys)} of {whole} keys {what}, such as {min(keys)}: it is of another model or of "
                               "another version of its layers, and would be put on in part; train it again")


@torch.inference_mode()
def _check_effect(model, folder):
    """Raise AdapterError where the logits of both decoders on a known prompt are the same with the adapter and without."""
    inner = model.get_base_model()
    tokens = torch.arange(min(256, inner.config.text_vocab_size), device=inner.device)[None]  # all letters, in any tokenizer

    def compute_logits():
        embeds = inner.embed_text_tokens(tokens).to(inner.backbone_model.embed_tokens.embed_audio_tokens.weight.dtype)
        hidden = inner.backbone_model(inputs_embeds=embeds).last_hidden_state
        codes = torch.ones(1, 2, dtype=torch.long, device=inner.device)
        depth = inner.depth_decoder(input_ids=codes, backbone_last_hidden_state=hidden[:, -1]).logits
        return [inner.lm_head(hidden), depth]

    model.eval()
    with_it = compute_logits()
    with model.disable_adapter():
        without = compute_logits()
    if all(map(torch.equal, with_it, without)):
        raise AdapterError(f"{folder} changes nothing: the model says with it exactly what its base says. Its weights are still "
                           "those that a training begins with (all zero), or too small to count; train it, or train it longer")


def describe_base(model) -> dict:
    """Return what an adapter depends on, for base.json: layers, widths, codebooks, vocabularies, hash of the weights.

    The hash is that of the checkpoint which load_base read (hash_weights), "" for a model that was made otherwise.
    """
    inner = inner_model(model)
    config = inner.config
    return {
        "layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "codebooks": config.num_codebooks,
        "audio_vocabulary": config.vocab_size, "text_vocabulary": config.text_vocab_size,
        "depth_layers": config.depth_decoder_config.num_hidden_layers,
        "depth_hidden_size": config.depth_decoder_config.hidden_size,
        "weights": hash_weights(inner.loaded_from) if getattr(inner, "loaded_from", None) else "",
    }


def train_fully(model, text_embeddings: bool = True):
    """Return `model` with all of it to be trained but its codec (and, without `text_embeddings`, its text table).

    Load it in float32 for this: a bfloat16 weight takes no step that is smaller than 1/256 of it. 16 bytes per parameter
    with AdamW, 25 GB for CSM-1B. Raises BaseModelError for a model in 4 bits or with an adapter on it.
    """
    check_whole(model, "trained fully")
    model.loaded_from = None  # soon it is another base than the one in that folder
    model.requires_grad_(True)
    model.codec_model.requires_grad_(False)
    model.embed_text_tokens.requires_grad_(text_embeddings)
    return model


def check_whole(model, what: str) -> None:
    """Raise BaseModelError for a model in 4 bits or with an adapter on it, which can not be `what` ("saved whole")."""
    if isinstance(model, PeftModel):
        raise BaseModelError(f"a model with an adapter on it can not be {what}; use it without (load_base), or save_adapter")
    if getattr(model, "is_loaded_in_4bit", False):
        raise BaseModelError(f"a model in 4 bits can not be {what}; load it with four_bit=False, or train an adapter on it")


def describe_adapter(model) -> dict:
    """Return what is trained in `model`, for a table and the card: {what: value}, an adapter's rank, alpha, layers first.

    An adapter that was loaded keeps its own rank, alpha and layers, whatever the parameters say: this tells which. For a
    model without one (train_fully) only the last three rows. Parameters in millions, and as a share of all.
    """
    table = {}
    if isinstance(model, PeftModel):
        config, layers = model.peft_config[model.active_adapter], {}
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                layers.setdefault(name.split(".")[0], set()).add(name.split(".")[-1])
        table = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        table |= {f"layers of {part}": ", ".join(sorted(names)) for part, names in layers.items()}
        trained = {name: value for name, value in model.named_parameters() if re.search(TRAINED_NAMES, name)}
        total = model.get_nb_trainable_parameters()[1]  # counts weights in 4 bits right
    else:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        total = sum(value.numel() for value in model.parameters())
    count = sum(value.numel() for value in trained.values())
    return table | {
        "text embeddings trained": _describe_table(trained),
        "trained parameters (M)": round(count / 1e6, 3), "share of all": round(count / total, 4),
    }


def _describe_table(trained):
    """Say whether the whole text table is trained, or how many rows of it."""
    rows = [len(value) for name, value in trained.items() if "trainable_tokens_delta" in name]
    return f"{rows[0]} of its rows" if rows else any("embed_text_tokens" in name for name in trained)


def start_training(model, method: str, before=None, rank: int = 64, alpha: int = 128, dropout: float = 0.05,
                   mlp: bool = False, text_embeddings: bool = False, speakers=(), seed: int = 0, tags=None, rows=()):
    """Return `model` ready to be trained by `method`, "lora" or "full", from the folder of the stage `before` or anew.

    An adapter that is loaded keeps its own rank, alpha, dropout and layers: describe_adapter shows them. A model that was
    trained fully lends its weights. `speakers` (speakers.number_speakers) are those that it will have: it speaks with no
    other, and they are saved with it. A fresh adapter begins with the weights that `seed` draws. `tags` (tags.make_tags) are
    those that its clips have, and `rows` the rows of the text table that they are (tags.find_rows). Raises BaseModelError for
    another method and for full training of weights that were rounded, AdapterError for a folder of another base, TagError
    where `before` was trained with tags of another kind, or without `rows`. Full training takes no part of the table: with
    `rows` it trains all of it.
    """
    if before is not None and tags is not None:
        check_before(read_tags(before), tags)
    if method not in TRAINED:
        raise BaseModelError(f"method is {method!r}; allowed are {' and '.join(TRAINED)}")
    if method == "full":
        if model.dtype != torch.float32:
            raise BaseModelError(f"the model was loaded in {model.dtype}, which rounded its weights; for method 'full' load it "
                                 "with load_base(..., method='full'), in float32")
        model = train_fully(model if before is None else load_full(model, before), text_embeddings or len(rows) > 0)
    elif before is None:
        model = add_adapter(model, rank, alpha, dropout, mlp, text_embeddings, seed, rows)
    else:
        model = load_adapter(model, before, trainable=True)
        _check_rows(model, rows, before)
    given = ({"speakers": list(speakers)} if speakers else {}) | ({} if tags is None else {"tags": tags})
    set_record(model, **read_entries(before) | given)
    return model


def _check_rows(model, rows, before):
    config = model.peft_config[model.active_adapter]
    held = (config.trainable_token_indices or {}).get("embed_text_tokens", [])
    if not config.modules_to_save and set(rows) - set(held):
        raise TagError(f"{before} trains rows {held} of the text table, and the tags of this training are {sorted(rows)}: give "
                       "the languages that it was begun with, or begin anew (init_adapter empty)")


def load_full(model, folder):
    """Return `model` with all its weights from the folder of a fully trained one (save_full), tables tied again.

    Raises AdapterError when the folder holds none, or one of another shape.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} holds no fully trained model (no *.safetensors); run the stage before it with method=full")
    try:
        state = {name: value for file in files for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder} can not be read ({error}): half a file? Fetch it again, or train it again") from error
    held = model.state_dict()
    strange = [name for name, value in state.items() if name not in held or held[name].shape != value.shape]
    if strange or not held.keys() - state.keys() <= {DEPTH_TABLE, BACKBONE_TABLE}:
        raise AdapterError(f"{folder} is a model of another shape than this base ({describe_base(model)}), such as in "
                           f"{(strange or sorted(held.keys() - state.keys()))[0]}; choose the base model it was trained on")
    model.load_state_dict(state, strict=False)
    tie_codebooks(model, held.keys() - state.keys())
    model.loaded_from = None  # it is another base than the one in that folder
    return model
