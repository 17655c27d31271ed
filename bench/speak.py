"""Speaking beside transformers' `generate`, in one run: `python bench/speak.py [--model FOLDER] [--frames 50]`.

Every way says the same number of frames, with end of speech switched off, and the ways take turns. Audio-seconds a second, and
as a ratio to `generate` at batch 1. `--model` may be CSM-1B's real shape with random weights (bench/full_size.py).
"""

import argparse
import time
from statistics import median

import torch

from csm_nb.csm.adapters import add_adapter
from csm_nb.csm.load import inner_model, load_base
from csm_nb.speak.batch import Batch, Sampling
from csm_nb.speak.decoders import Decoders
from csm_nb.speak.generate import make_utterance
from csm_nb.text.sentences import make_sentences


def wear(model, count):
    """Put `count` adapters of rank 32 on the model, none of which is zero."""
    for number in range(count):
        if number == 0:
            model = add_adapter(model, 32, 64, 0.0, mlp=True)
        else:
            model.add_adapter(f"a{number}", model.peft_config["default"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02)
    return model


@torch.inference_mode()
def say(model, processor, decoders, texts, adapters, frames):
    """Speak `texts` side by side, `frames` frames each."""
    inner = inner_model(model)
    batch = Batch(decoders, len(texts), 64 + frames + 256)
    for number, text in enumerate(texts):
        one = make_utterance(decoders, inner, processor, text, "0", adapters[number % len(adapters)], sampling=Sampling())
        one.cap, one.drawn = frames, torch.rand(frames, decoders.codebooks)
        batch.admit(one)
    while len(batch):
        batch.step()


@torch.inference_mode()
def generate(model, processor, texts, frames):
    """Speak one text as transformers does."""
    inputs = processor(f"<|begin_of_text|>[0]{texts[0]}<|end_of_text|>", return_tensors="pt").to(model.device)
    model.generate(**inputs, max_new_tokens=frames, min_new_tokens=frames, do_sample=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/csm-mini")
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    plain, processor = load_base(args.model, args.device)
    plain.config.codebook_eos_token_id = -1
    texts, rate = make_sentences("en", 32, 0, "validation"), plain.codec_model.config.frame_rate
    base = Decoders(plain)
    worn = wear(load_base(args.model, args.device)[0], 3)
    three, one = Decoders(worn, ["default", "a1", "a2"]), Decoders(worn, ["default"])
    for decoders in (base, three, one):
        decoders.end = -1
    ways = {
        "transformers' generate, 1": (1, lambda: generate(plain, processor, texts, args.frames)),
        "ours, 1": (1, lambda: say(plain, processor, base, texts[:1], [""], args.frames)),
        "ours, 8": (8, lambda: say(plain, processor, base, texts[:8], [""], args.frames)),
        "ours, 32": (32, lambda: say(plain, processor, base, texts, [""], args.frames)),
        "ours, 32, one adapter": (32, lambda: say(worn, processor, one, texts, ["default"], args.frames)),
        "ours, 32, three adapters": (32, lambda: say(worn, processor, three, texts, ["default", "a1", "a2"], args.frames)),
    }
    for _, run in ways.values():
        run()
    seconds = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, (_, run) in ways.items():
            start = time.perf_counter()
            run()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: ways[name][0] * args.frames / rate / median(taken) for name, taken in seconds.items()}
    first = speeds["transformers' generate, 1"]
    print(f"{torch.get_num_threads()} threads, {args.device}, {args.frames} frames each, median of {args.turns} turns")
    print("| way, utterances at once | audio-s/s | times generate |\n| --- | --- | --- |")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / first:.1f} |")
    lost = 1 - speeds["ours, 32, three adapters"] / speeds["ours, 32, one adapter"]
    print(f"three adapters lose {100 * lost:.0f} % of what one says")


if __name__ == "__main__":
    main()
