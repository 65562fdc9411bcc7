#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""table.py DIR BATCH RESOLUTION [trial]: the files fdhpc-*.json (fdhpc bench --json) and torch-*.json (bench_torch.py --json) of a folder as one text table, with the targets.

FLOP are counted once for both sides, by formula: what the mathematics of input/e2eflux.cfg needs for these captions, padding and recomputation left
out; a backward pass is two forward passes. "trial": other shapes than those, so no such rates and no targets. Exit code 1 if a target is missed, 77 if nothing can be compared.
"""
import glob
import json
import os
import sys

LARGE = ("matmul", "attention_fwd", "attention_bwd", "conv2d_fwd", "conv2d_bwd_data", "conv2d_bwd_weights")


def read(folder, side, key):
    out = []
    for name in sorted(glob.glob(os.path.join(folder, f"{side}-*.json"))):
        try:
            with open(name, encoding="utf-8") as f:
                j = json.load(f)
        except ValueError:
            continue  # stopped while it was written
        if key in j:
            out.append(j)
    return out


def dit_flop(batch, resolution, tokens):
    """Forward pass of the 3B transformer: products of a row's width, attention over image and text, text keys and values, modulation."""
    D, layers, A, K, E, F = 2048, 30, 16, 4, 128, 8192
    N = (resolution // 16) ** 2
    row = 2 * D * ((A + 2 * K) * E + A * E + 3 * F)
    layer = N * row + 4 * N * (N + tokens) * A * E + tokens * 2 * D * 2 * K * E + 2 * D * 6 * D
    return batch * (layers * layer + 2 * N * D * 64 * 2 + tokens * 2 * 2048 * D)


def gib(n):
    return "" if not n else f"{n / 2**30:.1f} GiB"


def main():
    folder, batch, resolution = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trial = sys.argv[4:] == ["trial"]
    missed = compared = unknown = 0
    ours, theirs = read(folder, "fdhpc", "images_per_s"), read(folder, "torch", "step")
    row = "{:<34} {:>14} {:>14} {:>8}"
    print(row.format("", "fdhpc", "PyTorch", "ratio"))

    def pair(name, a, b, form="{:.2f}", ratio=None):
        text = [form.format(v) if v is not None else "not run" for v in (a, b)]
        print(row.format(name, *text, f"{ratio:.2f}" if ratio else ""))

    def target(name, value, bound, at_least, form):
        nonlocal missed, compared, unknown
        if value is None:
            unknown += 1
            print(f"target {name}: not measured")
            return
        compared += 1
        met = value >= bound if at_least else value <= bound
        missed += not met
        print(f"target {name}: {form.format(value)}, wanted {'at least' if at_least else 'at most'} {form.format(bound)}: "
              + ("met" if met else f"missed by {form.format(abs(value - bound))}"))

    a = max(ours, key=lambda j: j["images_per_s"]) if ours else None
    b = max(theirs, key=lambda j: j["step"]["images_per_s"]) if theirs else None
    ta, tb = (a or {}).get("tokens_per_image"), (b or {}).get("step", {}).get("tokens_per_image")
    speed = a["images_per_s"] / b["step"]["images_per_s"] if a and b else None
    machine = read(folder, "torch", "bytes_per_s")  # whatever became of the step
    peaks = [j["matmul_flop_per_s"] for j in ours if j["matmul_flop_per_s"]] + [j["peak_flop_per_s"] for j in machine if j["peak_flop_per_s"]]
    peak = max(peaks) if peaks else None
    pair("training, images/s (best)", a and a["images_per_s"], b and b["step"]["images_per_s"], ratio=speed)
    pair("training, s per step, best", a and a["seconds_per_step"], b and b["step"]["best"], "{:.4f}")
    pair("training, s per step, median", a and a["median_seconds_per_step"], b and b["step"]["median"], "{:.4f}")
    pair("rounds", len(ours), len(theirs), "{}")
    for n, (x, y) in enumerate(zip(ours, theirs), 1):
        pair(f"  round {n}, images/s", x["images_per_s"], y["step"]["images_per_s"], ratio=x["images_per_s"] / y["step"]["images_per_s"])
    pair("caption tokens per image", ta, tb, "{:.1f}")
    pair("matrix peak measured, TFLOP/s", a and a["matmul_flop_per_s"] * 1e-12, b and b["peak_flop_per_s"] * 1e-12, "{:.0f}")
    print(row.format("memory", gib(a and a["planned_bytes"]) + " plan" if a else "", gib(b and b["step"]["memory_bytes"]), ""))

    rates = []
    for j, tokens, phases, wall in ((a, ta, a and a["phase_seconds_per_step"], a and a["seconds_per_step"]),
                                    (b, tb, b and b["step"]["phase_seconds"], b and b["step"]["best"])):
        if not j or trial:
            rates.append((None, None))
            continue
        f = 3 * dit_flop(batch, resolution, tokens)
        rates.append((f / (phases["forward"] + phases["backward"]), f / wall))
    pair("DiT forward + backward, TFLOP/s", *[r[0] and r[0] * 1e-12 for r in rates], "{:.1f}")
    pair("  share of the measured peak, %", *[r[0] and 100 * r[0] / peak for r in rates], "{:.1f}")
    print()
    print(row.format("phase, ms per step", "", "", ""))
    names = list((a or {}).get("phase_seconds_per_step", {})) or list((b or {}).get("step", {}).get("phase_seconds", {}))
    for p in names:
        x, y = a and a["phase_seconds_per_step"].get(p), b and b["step"]["phase_seconds"].get(p)
        pair(f"  {p}", x is not None and 1e3 * x or x, y is not None and 1e3 * y or y, "{:.2f}", y / x if x and y else None)

    outside = None
    if a:
        bandwidth = max((j["bytes_per_s"] for j in machine if j["bytes_per_s"]), default=None)
        steps, wall = a["clocked_steps"], a["seconds_per_step"]
        print(f"\n{'op of fdhpc':<24} {'calls':>8} {'ms / step':>10} {'% of step':>10} {'TFLOP/s':>9} {'GB/s':>8}")
        over = 0
        for name, o in sorted(a["ops"].items(), key=lambda e: -e[1]["seconds"]):
            s = o["seconds"] / steps
            print(f"{name:<24} {o['calls'] / steps:8.1f} {1e3 * s:10.3f} {100 * s / wall:10.2f} {o['flop'] / o['seconds'] * 1e-12:9.1f} "
                  f"{o['bytes'] / o['seconds'] * 1e-9:8.0f}")
            if name not in LARGE and bandwidth:
                over += max(0, s - o["bytes"] / steps / bandwidth)
        idle = max(0, wall - sum(o["seconds"] for o in a["ops"].values()) / steps)
        outside = 100 * (over + idle) / wall if bandwidth else None
        if bandwidth:
            print(f"copies run at {bandwidth * 1e-9:.0f} GB/s; {1e3 * over:.2f} ms of the other ops are more than their bytes take at that rate, "
                  f"{1e3 * idle:.2f} ms are in no op")

    print()
    for name, at in (("sample", "sampling, images/s"), ("encode", "VAE encode, images/s"), ("decode", "VAE decode, images/s")):
        x = [j[name]["images_per_s"] for j in read(folder, "fdhpc", name)]
        y = [j["sample" if name == "sample" else "vae"] for j in read(folder, "torch", "sample" if name == "sample" else "vae")]
        y = [j["images_per_s"] if name == "sample" else j[name]["images_per_s"] for j in y]
        pair(at, max(x, default=None), max(y, default=None), ratio=max(x) / max(y) if x and y else None)

    print()
    if trial:
        print("trial with other shapes: the two sides are not comparable, no targets")
        sys.exit(0 if a and b else 1)
    target("images/s against PyTorch", speed, 1.3, True, "{:.2f}")
    target("DiT forward + backward, % of the measured peak", rates[0][0] and 100 * rates[0][0] / peak, 55, True, "{:.1f}")
    target("outside of matrix products, attention and unavoidable memory passes, % of a step", outside, 3, False, "{:.1f}")
    sys.exit(77 if not compared else 1 if missed or unknown else 0)


if __name__ == "__main__":
    main()
