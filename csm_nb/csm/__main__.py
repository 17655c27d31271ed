"""An adapter merged into its base, as one model that transformers loads alone.

python -m csm_nb.csm merge models/lora_no --out models/csm-no [--base models/csm-mini] [--dtype float32]
"""

import argparse
import json
import sys
from pathlib import Path

from csm_nb.cards import read_table
from csm_nb.csm.adapters import AdapterError, load_adapter
from csm_nb.csm.load import DTYPES, BaseModelError, load_base
from csm_nb.csm.record import get_record, read_record, set_record
from csm_nb.csm.save import save_full
from csm_nb.hub import ModelError
from csm_nb.paths import resolve_path, show_path

KEPT = ("data", "licence", "commercial use", "hours", "languages")  # of the adapter's card: true of what it is merged into


def merge(adapter, out, base: str = "", dtype: str = "float32", device: str = "cpu") -> Path:
    """Write the base with the adapter in its weights to `out`, with speakers, tags and card, and return the folder.

    It is computed in float32 and written in `dtype`; without `base`, the one that the adapter names is taken. The card says the
    data and the licence that the adapter's says. Raises
    AdapterError for an adapter that does not fit, ModelError for a base that is not here.
    """
    adapter, out = resolve_path(adapter), resolve_path(out)
    base = base or _name_base(adapter)
    model, processor = load_base(base, device, "float32")
    worn = load_adapter(model, adapter)
    record, language = get_record(worn), read_record(adapter).get("language", "")
    merged = worn.merge_and_unload()
    merged.loaded_from = None  # another model than the one in that folder
    set_record(merged, **record)
    card = {"what": f"{show_path(base)} with the adapter {adapter.name} merged into its weights", "language": language}
    card |= {what: said for what, said in read_table(adapter).items() if what in KEPT}
    return save_full(merged, processor, out, card, base, DTYPES[dtype])


def _name_base(adapter):
    try:
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"{adapter} names no base ({error}); give an adapter's folder, or name the base: --base "
                           "FOLDER") from error


def main(arguments=None) -> int:
    """Do what the command line says; return 0, or 2 with what is wrong."""
    parser = argparse.ArgumentParser("python -m csm_nb.csm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["merge"])
    parser.add_argument("adapter", help="folder of an adapter, such as models/lora_no")
    parser.add_argument("--out", required=True, help="folder that gets the model")
    parser.add_argument("--base", default="", help="folder or hub id of the base (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is written")
    options = parser.parse_args(arguments)
    try:
        folder = merge(options.adapter, options.out, options.base, options.dtype)
    except (AdapterError, BaseModelError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{show_path(folder)}: a model of its own; load_base and transformers load it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
