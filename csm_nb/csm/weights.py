"""The weights in a model's folder: which files count, which tensors they hold, and a hash that tells bases apart."""

import functools
import hashlib
import json
import mmap
from pathlib import Path

from safetensors import safe_open

from csm_nb.hub import find_weights
from csm_nb.provenance import hash_value

SETTINGS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # of a config, that change with who wrote it


def list_weights(folder) -> list[Path]:
    """Return the safetensors files of a model's folder that from_pretrained reads, shards in order; [] where there are none."""
    return [path for path in find_weights(Path(folder)) if path.suffix == ".safetensors"]


def hash_weights(folder) -> str:
    """Return 16 hex digits of the tensors in a model's folder: names, types, shapes and every byte; "" where there are none.

    They are those of the checkpoint, so that it is the same in whatever precision it is loaded, however it is cut into
    files, wherever it lies. 6 GB take about 5 s; the same files are read once per process.
    """
    files = list_weights(folder)
    return _hash_tensors(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)) if files else ""


@functools.cache
def _hash_tensors(files):
    tensors = {}
    for path, *_ in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, \
                memoryview(content) as data:
            begin = 8 + int.from_bytes(data[:8], "little")  # the format: length of the header, header, data
            for name, entry in json.loads(bytes(data[8:begin])).items():
                if name != "__metadata__":
                    first, last = (begin + place for place in entry["data_offsets"])
                    with data[first:last] as part:
                        tensors[name] = entry["dtype"], entry["shape"], hashlib.sha256(part).hexdigest()
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16]


def hash_config(config: dict, left_out=()) -> str:
    """Return a hash of a model's config (to_dict) without SETTINGS, at any depth, and without the entries `left_out`."""
    return hash_value(_drop({key: value for key, value in config.items() if key not in left_out}))


def _drop(value):
    if isinstance(value, dict):
        return {str(key): _drop(item) for key, item in value.items() if key not in SETTINGS}
    return [_drop(item) for item in value] if isinstance(value, list | tuple) else value


def list_tensors(folder) -> set[str]:
    """Return the names of the tensors in a model's folder."""
    names = set()
    for file in list_weights(folder):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names
