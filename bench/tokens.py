"""How fast a corpus becomes tokens, beside the loop that the field writes: one clip at a time into one HDF5 file.

    python bench/tokens.py                          # everything: some 70 minutes on two cores with nothing beside it
    python bench/tokens.py --parts speed --codecs mini --clips 64 --formats wav

Parts: speed (the loop on one thread and on torch's own, write_tokens by one process and two, by Ray), memory (peak from 1,000 to
100,000 clips), reading (packed rows per second, beside what training takes), plan (a million lines of a manifest). Each
measurement is a process of its own, and each ratio is of one call. With CUDA the encoder's busy share is printed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from csm_nb.audio import read_audio
from csm_nb.codec.mimi import load_codec
from csm_nb.corpora import split, tokens, workers
from csm_nb.manifest import read_manifest
from csm_nb.paths import ROOT

SOURCES = {"mp3": 48_000, "flac": 16_000, "wav": 44_100}  # Hz, as Common Voice, LibriSpeech and studios have it
MINI = 6  # so that what starts two processes, some 8 s, weighs as little
TRAINING = 7.1  # seconds of audio that a training reads per second, on these two cores: docs/benchmarks.md
GPU_TRAINING = 40 * 1.6  # what bench/train.py aims at on a GPU


def make_clips(folder, suffix, count, seconds=(1.0, 7.0)):
    """Return the manifest of `count` clips of noise in `folder`, written when they are not there yet."""
    manifest, rng, rate = folder / f"{suffix}-{count}.jsonl", np.random.default_rng(0), SOURCES[suffix]
    if not manifest.exists():
        (folder / suffix).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            file, length = folder / suffix / f"{i}.{suffix}", int(rate * rng.uniform(*seconds))
            if not file.exists():
                soundfile.write(file, (0.1 * rng.standard_normal(length)).astype(np.float32), rate)
            lines.append({"text": f"Nr. {i}", "audio_path": f"{suffix}/{i}.{suffix}", "speaker_id": str(i % 20), "language": "da",
                          "duration": length / rate})
        manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return manifest


def make_codec(name, data):
    """Return the folder of csm-mini, or of a Mimi of the real shape with random weights."""
    if name == "mini":
        return ROOT / "models" / "csm-mini"
    folder = data / "mimi-random"
    if not (folder / "model.safetensors").exists():
        from transformers import MimiConfig, MimiModel

        torch.manual_seed(0)
        model = MimiModel(MimiConfig())
        for side in (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer):
            for layer in side.layers:
                layer.codebook.embed_sum.normal_(std=0.02)  # zeros otherwise: every clip would be the code 0
        model.save_pretrained(folder)
    return folder


def run_loop(rows, codec, data):
    """The field's way: read, resample, encode and write each clip, in one process."""
    try:
        import h5py
    except ImportError:
        h5py = None
    file = h5py.File(data / "codes.h5", "w") if h5py else None
    for number, row in enumerate(rows):
        wav = torch.from_numpy(read_audio(row["audio_path"], codec.config.sampling_rate))
        with torch.inference_mode():
            codes = codec.encode(wav[None, None].to(codec.device)).audio_codes[0].cpu().numpy().astype(np.uint16)
        if file:
            group = file.create_group(str(number))
            group.create_dataset("codes", data=codes)
            group.attrs.update({name: row[name] for name in ("text", "speaker_id", "language")})
        else:
            np.save(data / f"{number}.npy", codes)
    return "HDF5" if file else "np.save: h5py is not installed"


def watch_gpu(shares, stop):
    """Collect the share of time in which the GPU was busy (NVML, by nvidia-smi), four times a second."""
    while not stop.wait(0.25):
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        shown = subprocess.run(command, capture_output=True, text=True)
        shares += [float(line) for line in shown.stdout.split()[:1]]


def measure(variant, manifest, codec_folder):
    """Run one variant in this process, and print what it took as JSON."""
    if variant != "loop, torch's threads":
        torch.set_num_threads(2 if variant == "2 processes" else 1)
    rows, codec = read_manifest(manifest), load_codec(codec_folder, "auto")
    shares, stop, note = [], threading.Event(), ""
    workers.FEWEST_CLIPS = 1 if variant == "2 processes" else workers.FEWEST_CLIPS
    if codec.device.type == "cuda":
        threading.Thread(target=watch_gpu, args=(shares, stop), daemon=True).start()
    with tempfile.TemporaryDirectory() as data:
        start = time.perf_counter()
        if variant.startswith("loop"):
            note = run_loop(rows, codec, Path(data))
        else:
            tokens.write_tokens(rows, codec, data, "ray" if variant == "ray" else "local")
        seconds = time.perf_counter() - start
    stop.set()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6
    note = "; ".join(filter(None, [note, f"GPU busy {np.mean(shares):.0f} %" if shares else ""]))
    print(json.dumps({"seconds": seconds, "peak": peak, "note": note}))


def call(*words):
    """Run this file with `words` in a process of its own and return what it printed last, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, __file__, "--one", *map(str, words)]
    shown = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(shown.stdout.splitlines()[-1])


def compare_speed(args):
    """Print a line per codec, source and variant: clips and seconds of audio per second, over the loop's on one thread."""
    print(f"{'codec':<6}{'source':<7}{'variant':<23}{'clips/s':>8}{'x rt':>8}{'x loop':>8}{'GB':>6}")
    for name in args.codecs:
        codec = make_codec(name, args.data)
        for suffix in args.formats:
            count = args.clips * (MINI if name == "mini" else 1)
            manifest = make_clips(args.data, suffix, count)
            audio, first = sum(row["duration"] for row in read_manifest(manifest)), None
            for variant in ("loop, one thread", "loop, torch's threads", "1 process", "2 processes", "ray"):
                took = call("speed", variant, manifest, codec)
                first = first or took["seconds"]
                print(f"{name:<6}{suffix:<7}{variant:<23}{count / took['seconds']:>8.1f}{audio / took['seconds']:>8.1f}"
                      f"{first / took['seconds']:>8.2f}{took['peak']:>6.1f}  {took['note']}", flush=True)


def compare_memory(args):
    """Print the peak of one process that encodes 1,000, 10,000 and 100,000 clips of a tenth of a second."""
    for count in (1_000, 10_000, 100_000):
        if count <= args.most:
            manifest = make_clips(args.data / "short", "flac", count, (0.1, 0.2))
            took = call("speed", "1 process", manifest, make_codec("mini", args.data))
            print(f"memory  {count:>7} clips  {took['peak']:.2f} GB, {count / took['seconds']:.0f} clips/s", flush=True)


def measure_reading(data):
    """Pack rows of 50 h of tokens as a training does, and print how many per second."""
    from csm_nb.csm.load import load_base
    from csm_nb.train.packing import PackedRows, plan_rows, read_clips

    folder, rng = Path(data) / "many", np.random.default_rng(0)
    if not (folder / "part-00000.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        codec = load_codec(ROOT / "models" / "csm-mini")
        codes = [rng.integers(0, 512, (int(frames), 8), dtype=np.uint16) for frames in rng.integers(25, 200, 10_000)]
        table = tokens.pa.table({"text": [f"Nr. {i} af mange." for i in range(len(codes))], "codes": tokens._list_codes(codes),
                                 "speaker_id": ["1"] * len(codes), "language": ["da"] * len(codes),
                                 "duration": [len(code) / 25 for code in codes]}, schema=tokens._SCHEMA)
        tokens.pq.write_table(table, folder / "part-00000.parquet", row_group_size=tokens.GROUP_CLIPS)
        tokens.write_json(folder / tokens.ABOUT, tokens._describe(codec, "bench", codes, len(codes)))
    _, processor = load_base(ROOT / "models" / "csm-mini")
    clips = read_clips(tokens.read_tokens(folder), processor, 1024, 25.0)
    packed = PackedRows(clips, plan_rows(clips, 1024, 300, 0), 1 / 16, 0)
    start = time.perf_counter()
    for i in range(len(packed)):
        packed[i]
    rate = len(packed) / (time.perf_counter() - start)
    print(json.dumps({"rate": rate, "audio": rate * 1024 / 25 * 0.9}))


def measure_plan(data, lines):
    """Take a manifest of `lines` lines to a fingerprint and a split, and print seconds and memory of each step."""
    from csm_nb import paths

    data, lines, steps = Path(data), int(lines), {}
    kept = data / "plan.parquet"
    manifest = data / "plan.jsonl"
    sources = [data / "plan" / f"{i}.wav" for i in range(100)]
    if not manifest.exists():
        (data / "plan").mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(sources):
            source.write_bytes(bytes([number]) * 64)
        with open(manifest, "w", encoding="utf-8") as file:
            for i in range(lines):
                path = data / "plan" / f"{i // 1000:04d}" / f"{i}.wav"
                if i % 1000 == 0:
                    path.parent.mkdir(exist_ok=True)
                os.link(sources[i % 100], path)  # another name of the same bytes takes no room
                row = {"text": f"Det er sætning nummer {i} af mange, og den er lang.", "speaker_id": f"s{i % 500}",
                       "audio_path": str(path.relative_to(data)), "language": "da", "duration": 3.2}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not kept.exists():
        with tokens.pq.ParquetWriter(kept, tokens._SCHEMA) as writer:
            for start in range(0, lines, 10_000):
                numbers = range(start, min(lines, start + 10_000))
                writer.write_table(tokens.pa.table({
                    "text": [f"Det er sætning nummer {i} af mange, og den er lang." for i in numbers],
                    "codes": tokens._list_codes([np.zeros((40, 1), np.uint16)] * len(numbers)),
                    "speaker_id": [f"s{i % 500}" for i in numbers], "language": ["da"] * len(numbers),
                    "duration": [3.2] * len(numbers)}, schema=tokens._SCHEMA))
    paths.ROOT = data  # where hashes.json is kept
    (data / "data").mkdir(exist_ok=True)

    def step(name, function):
        start = time.perf_counter()
        made = function()
        steps[name] = [round(time.perf_counter() - start, 1), round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)]
        return made

    known = (data / "data" / "hashes.json").exists()
    rows = step("read_manifest", lambda: read_manifest(manifest))
    how = "hashes, known" if known else "hashes, every byte read"
    hashes = step(how, lambda: tokens.hash_files(row["audio_path"] for row in rows))
    step("fingerprint", lambda: tokens.hash_value([
        [row["text"], audio, row["speaker_id"], row["language"]] for row, audio in zip(rows, hashes, strict=True)
    ]))  # fmt: skip
    side = step("tokens, mapped", lambda: tokens.read_tokens(kept))
    step("split", lambda: split.split_rows(side))
    print(json.dumps(steps))


def main():
    if sys.argv[1:2] == ["--one"]:
        part, *words = sys.argv[2:]
        return {"speed": measure, "reading": measure_reading, "plan": measure_plan}[part](*words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["speed", "memory", "reading", "plan"])
    parser.add_argument("--codecs", nargs="+", default=["mini", "full"])
    parser.add_argument("--formats", nargs="+", default=list(SOURCES))
    parser.add_argument("--clips", type=int, default=400, help=f"for the full-size Mimi; csm-mini takes {MINI} times as many")
    parser.add_argument("--most", type=int, default=100_000, help="clips of the largest corpus of the part memory")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "bench", help="where clips and random weights are kept")
    args = parser.parse_args()
    args.data = args.data.resolve()
    args.data.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA: {torch.cuda.is_available()}", flush=True)
    if "speed" in args.parts:
        compare_speed(args)
    if "memory" in args.parts:
        compare_memory(args)
    if "reading" in args.parts:
        took = call("reading", args.data)
        print(f"reading  {took['rate']:.0f} packed rows/s, about {took['audio']:.0f} s of audio/s; a training takes {TRAINING} "
              f"on two cores, {GPU_TRAINING:.0f} on a GPU if it gets as fast as is aimed at")
    if "plan" in args.parts:
        for _ in range(2):
            for name, (seconds, memory) in call("plan", args.data, args.lines).items():
                print(f"plan  {name:<26}{seconds:>7.1f} s, peak so far {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
