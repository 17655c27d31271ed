"""What speech is made of: the weights that speak, how they are sampled, and the code; what is kept of it is named by that."""

import re

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer

from csm_nb import paths
from csm_nb.csm.load import inner_model
from csm_nb.csm.weights import hash_config, hash_weights
from csm_nb.provenance import hash_code, hash_tensors, hash_value

# What speaking imports and that changes no code of an utterance, or that counts by its content: how files are found and kept,
# texts and voices, and the codec, which only decodes what was said.
GIVEN = ("text", "synth", "codec", "hub", "paths", "claims", "keep", "provenance", "csm.record", "csm.save",
         "csm.speakers", "csm.tags", "csm.weights")


def describe_speech(model, settings: dict) -> dict:
    """Return all that decides what `model` says to a text and voice, in words and hashes: as it is now, adapter on or off.

    `settings` are those of sampling. Weights count as they are in memory (provenance.hash_tensors), without the codec's; of
    several adapters the active one, under whichever name. A text's tokens are in its own key, so that a tokenizer is not.
    """
    inner = inner_model(model)
    device = next(model.parameters()).device.type
    return {
        "weights": hash_model(model), "config": hash_config(inner.config.to_dict(), ("codec_config",)), "settings": settings,
        "frame rate": inner.codec_model.config.frame_rate,
        "computed": {"device": device, "layers": type(inner.backbone_model).__module__},
        "code": hash_code("from csm_nb.speak import generate", paths.PACKAGE, GIVEN),
    }


def name_active(model) -> str:
    """Return the name of the adapter that `model` speaks with; "" for a base, or where it is switched off."""
    on = isinstance(model, PeftModel) and model.get_model_status().enabled is not False
    return model.active_adapter if on else ""


def hash_model(model) -> str:
    """Return a hash of the weights that `model` speaks with, without the codec's: base, and active adapter with its scale.

    It is the same whatever the adapter is called, whether it is trained or only used, and whichever others lie beside it.
    """
    inner, active = inner_model(model), name_active(model) or None
    tensors = {}
    for name, value in inner.named_parameters():
        part = re.fullmatch(r"(.*\.(?:lora_\w+|modules_to_save|trainable_tokens_delta))\.([^.]+)(.*)", name)
        if name.startswith("codec_model.") or part and part[2] != active:
            continue
        tensors[part[1] + part[3] if part else re.sub(r"\.(token_adapter|base_layer|original_module)\b", "", name)] = value
    scales = {name: module.scaling[active] for name, module in inner.named_modules()
              if isinstance(module, LoraLayer) and active in module.scaling}
    scales |= {name: module.token_indices[active] for name, module in inner.named_modules()  # which rows were trained
               if isinstance(module, TrainableTokensLayer) and active in module.token_indices}
    stored = hash_weights(inner.loaded_from) if getattr(inner, "is_loaded_in_4bit", False) else ""  # 4 bits have a scale beside
    return hash_value([hash_tensors(tensors), scales, stored])
