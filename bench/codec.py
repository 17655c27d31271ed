"""How fast the codec is: a full-size Mimi at random by transformers and by moshi, eager and compiled, on CPU and GPU.

    python bench/codec.py --seconds 10 --batches 1 8 32 --threads 2

prints one line for each: seconds of audio encoded and decoded per second, both over the first line's, and how long measuring
and compiling took. On a GPU where there is one as well.
"""

import argparse
import logging
import time

import torch
from moshi.models.loaders import get_mimi
from torch._dynamo.utils import counters
from transformers import MimiModel

from csm_nb.codec.moshi import MoshiCodec, convert_config, convert_moshi

COLUMNS = "{:<13}{:<7}{:<9}{:>6}{:>13}{:>13}{:>9}{:>9}  {}"
REPEATS, LIMIT = 3, 10.0  # the best of so many, or of those that LIMIT seconds allow


def make_codecs(device: str) -> dict:
    """Return one full-size random Mimi by transformers and by moshi.

    They are made anew for each device: MimiModel.to leaves the codebooks behind once it was used.
    """
    torch.manual_seed(0)
    mimi, config = get_mimi(None), convert_config(None)
    model = MimiModel(config)
    model.load_state_dict(convert_moshi(mimi.state_dict()))
    codecs = {"transformers": model, "moshi": MoshiCodec(mimi, config)}
    return {name: codec.to(device).eval().requires_grad_(False) for name, codec in codecs.items()}


def measure_codec(codec, batch: int, frames: int, codebooks: int, compiled: bool) -> tuple[list[float], str]:
    """Return seconds of audio encoded and decoded per second, `batch` clips of `frames` at once, and a note.

    Where one of them fails, which a compiler may, it is missing and the note says why.
    """
    torch._dynamo.reset()
    counters.clear()
    encode, decode = (torch.compile(f) if compiled else f for f in (codec.encode, codec.decode))
    wavs = 0.2 * torch.randn(batch, 1, frames * codec.config.frame_size, device=codec.device)
    codes = torch.randint(codec.config.codebook_size, (batch, codebooks, frames), device=codec.device)
    start, speeds = time.perf_counter(), []
    try:
        for call in (lambda: encode(wavs, num_quantizers=codebooks), lambda: decode(codes)):
            speeds.append(batch * frames / codec.config.frame_rate / time_call(call, codec.device))
    except Exception as error:
        return speeds, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:80]}"
    breaks = sum(counters["graph_break"].values())
    return speeds, f"{time.perf_counter() - start:.0f} s" + (f", {breaks} graph breaks" if breaks else "")


def time_call(call, device) -> float:
    """Return how many seconds `call` takes once it is warm (and compiled)."""
    call()
    times = []
    while len(times) < REPEATS and sum(times) < LIMIT:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="length of a clip; default 10 on a GPU, 1 on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="clips in a batch")
    parser.add_argument("--codebooks", type=int, default=32)
    parser.add_argument("--threads", type=int, help="threads on the CPU; default torch's own choice")
    parser.add_argument("--no-compile", action="store_true", help="eager alone: compiling takes a minute per line and more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch._logging.set_logs(all=logging.ERROR)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.codebooks} codebooks, float32")
    print(COLUMNS.format("backend", "device", "mode", "batch", "encode x rt", "decode x rt", "encode", "decode", "took"))
    first = None
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name, codec in make_codecs(device).items():
            frames = round((args.seconds or (10 if device == "cuda" else 1)) * codec.config.frame_rate)
            for mode in ["eager"] if args.no_compile else ["eager", "compiled"]:
                for batch in args.batches:
                    speeds, note = measure_codec(codec, batch, frames, args.codebooks, mode == "compiled")
                    first = first or speeds
                    cells = [f"{speed:.1f}" for speed in speeds] + ["-"] * (2 - len(speeds))
                    cells += [f"{speed / base:.2f}" for speed, base in zip(speeds, first, strict=False)]
                    cells += ["-"] * (4 - len(cells))
                    print(COLUMNS.format(name, device, mode, batch, *cells, note), flush=True)


if __name__ == "__main__":
    main()
