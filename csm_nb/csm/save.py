"""A trained model in a folder that anyone can load: an adapter or all weights, with a card and what it was made of."""

import contextlib
import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel

from csm_nb.cards import write_card
from csm_nb.csm.adapters import check_whole, describe_adapter, describe_base
from csm_nb.csm.load import BACKBONE_TABLE, DEPTH_TABLE, inner_model, quiet_transformers, tie_codebooks
from csm_nb.csm.record import get_record
from csm_nb.csm.speakers import get_speakers, list_speakers, pick_voice
from csm_nb.csm.tags import get_tags, name_kind, pick_tag
from csm_nb.csm.weights import list_tensors
from csm_nb.paths import show_path


def save_trained(model, processor, folder, card: dict | None = None, base_id: str = "") -> Path:
    """Write what was trained and return its folder: an adapter (save_adapter), or the whole model as it is (save_full)."""
    if isinstance(model, PeftModel):
        return save_adapter(model, folder, card, base_id, processor)
    return save_full(model, processor, folder, card, base_id, dtype=None)


def save_adapter(model: PeftModel, folder, card: dict | None = None, base_id: str = "", processor=None) -> Path:
    """Write a plain PEFT folder with a model card and return it; it replaces what was there when all is written.

    `card` is the card's table (data, licence, figures ...); what was trained and the git commit are added to it. An adapter
    whose tags are rows of the text table takes the tokenizer of `processor` along, which knows them by name.
    """
    with _write_folder(folder) as partial:
        if base_id:
            model.peft_config["default"].base_model_name_or_path = show_path(base_id)
        model.save_pretrained(partial, save_embedding_layers=False)  # peft would ask the hub; a trained table is saved anyway
        write_record(model, partial, (card or {}).get("language", ""))
        if processor is not None and name_kind(get_tags(model)) == "token":
            processor.tokenizer.save_pretrained(partial)
        _write_card(partial, Path(folder), model, card, base_id)
    return Path(folder)


def write_record(model, folder, language: str = "") -> None:
    """Write base.json: the base that an adapter needs (describe_base), its speakers and tags, its language.

    `read_out` is in it where its texts were trained as they are read out (text.spoken): speaking does the same to a text.
    """
    record = describe_base(model) | {"speakers": get_speakers(model), "tags": get_tags(model)}
    record |= {"language": language} if language else {}
    record |= {"read_out": True} if get_record(model).get("read_out") else {}
    (Path(folder) / "base.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def save_full(model, processor, folder, card: dict | None = None, base_id: str = "",
              dtype: torch.dtype | None = torch.bfloat16) -> Path:
    """Write a fully trained model as save_base does, with a model card as save_adapter does, and return the folder."""
    with _write_folder(folder) as partial:
        _write_base(model, processor, partial, dtype)
        write_record(model, partial, (card or {}).get("language", ""))
        _write_card(partial, Path(folder), model, card, base_id)
    return Path(folder)


def save_base(model, processor, folder, dtype: torch.dtype | None = torch.bfloat16,
              codec_dtype: torch.dtype | None = None) -> Path:
    """Write model and processor as a published CSM is laid out, with one of the two codebook tables, for load_base.

    The language model is written in `dtype` (None: as it is), the codec in `codec_dtype` (as it is: bfloat16 would round
    it). Replaces what was there when all is written. Raises BaseModelError for a model in 4 bits or with an adapter on it.
    """
    with _write_folder(folder) as partial:
        _write_base(model, processor, partial, dtype, codec_dtype)
    return Path(folder)


def _write_base(model, processor, folder, dtype, codec_dtype=None):
    check_whole(model, "saved whole")
    tie_codebooks(model)  # or there is no leaving out one of the two
    state = {}
    for name, value in model.state_dict().items():
        if name != DEPTH_TABLE:
            wanted = codec_dtype if name.startswith("codec_model.") else dtype
            state[name] = value.to("cpu", wanted if value.is_floating_point() else None)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


@contextlib.contextmanager
def _write_folder(folder):
    """Yield a folder beside `folder` to write to, which takes its place when all is written; a reader never finds a part."""
    folder = Path(folder)
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk above all
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_card(folder, place, model, card, base_id):
    adapter, inner, speakers = isinstance(model, PeftModel), inner_model(model), get_speakers(model)
    table = {"licence": "of the data: not stated"} | (card or {}) | describe_adapter(model)
    table |= {"speakers": list_speakers(speakers) or "not stated"}
    said = get_tags(model)
    table |= {f"before text in {code}": f"`{tag}`".replace("|", "\\|") for code, tag in said.items() if tag}
    table |= {"sampling rate": f"{inner.codec_model.config.sampling_rate} Hz"}
    held = list_tensors(inner.loaded_from) if adapter and getattr(inner, "loaded_from", None) else set()
    turned = DEPTH_TABLE in held and BACKBONE_TABLE not in held
    tables = (BACKBONE_TABLE, DEPTH_TABLE) if turned else (DEPTH_TABLE, BACKBONE_TABLE)
    write_card(folder, place, table, base_id, adapter, pick_voice(speakers), tables, pick_tag(said))
