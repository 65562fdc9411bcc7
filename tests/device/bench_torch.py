#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The work of `fdhpc bench input/e2eflux.cfg` in PyTorch, with the best that it offers, to be compared on the same GPU (tests/device/bench.sh).

Training step: FLUX's VAE encodes pixels, Gemma-2B encodes captions, noise, the 3B transformer forward and backward on a flow-matching loss,
clipping by the norm, AdamW, moving average. Random weights; nothing is read but two config.json. What is the same as in fdhpc: shapes, batch,
caption lengths (the same numbers, from the same Philox stream), bf16 activations and weights, fp32 master weights, moments, moving average, norms
and loss; no autocast. What differs, in PyTorch's favour or as its users do it: gradients of weights are bf16 until the optimiser reads them, Gemma's
residual stream is bf16; captions are not packed but padded to the longest that there can be (--most_tokens rounded up to 8; the longest of a batch of
32 is nearly that), so that shapes are static and nothing is compiled again.
Used: torch.compile of whole modules (or of each layer by itself: --compile layers, which starts faster), F.scaled_dot_product_attention (with grouped queries; the fastest of its ways for this shape is measured
first), fused qkv and gate/up weights, AdamW with clipping, moving average and bf16 copy compiled to one kernel, channels_last convolutions.

  bench_torch.py --what step,sample,vae --json FILE          on a GPU
  bench_torch.py --tiny --device cpu --what step,sample,vae  does it run at all
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DIT_PARAMETERS = 2660490816  # `fdhpc plan input/e2eflux.cfg`
GEMMA_PARAMETERS = 2506172416
VAE_PARAMETERS = 83819683


@dataclass
class DitShape:  # input/base-3b.cfg
    D: int = 2048
    layers: int = 30
    A: int = 16
    K: int = 4
    E: int = 128
    F: int = 8192
    P: int = 2
    C: int = 16
    G: int = 64
    sample_size: int = 32
    text_width: int = 2048
    eps: float = 1e-6


# ---- Philox, as src/base/rng.c, for the caption lengths -------------------------------------------------------------------------------------


def philox_uniform(seed, purpose, sample, i):
    c = [i // 4, purpose, sample & 0xFFFFFFFF, sample >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[i % 4] >> 8) * 2.0**-24


def caption_lengths(step, batch, least, most):
    synthetic = 11  # FD_RNG_SYNTHETIC
    return [least + int(philox_uniform(1, synthetic, step * batch + i, 0) * (most - least + 1)) for i in range(batch)]


# ---- attention ------------------------------------------------------------------------------------------------------------------------------


def attend_gqa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_expanded(q, k, v, mask):
    n = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), attn_mask=mask)


def attend_cudnn(q, k, v, mask):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_efficient(q, k, v, mask):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return attend_expanded(q, k, v, mask)


ATTENTION = {"gqa": attend_gqa, "expanded": attend_expanded, "cudnn": attend_cudnn, "efficient": attend_efficient}


def fastest_attention(run, batch, shape, n_image, n_text):
    """Seconds of forward and backward for each way at the step's shape; the name of the fastest. What does not work is named."""
    times = {}
    for name, attend in ATTENTION.items():
        try:
            q = torch.randn(batch, shape.A, n_image, shape.E, device=run.device, dtype=run.dtype, requires_grad=True)
            k = torch.randn(batch, shape.K, n_image + n_text, shape.E, device=run.device, dtype=run.dtype, requires_grad=True)
            v = torch.randn_like(k, requires_grad=True)
            mask = torch.ones(batch, 1, 1, n_image + n_text, device=run.device, dtype=torch.bool)
            mask[:, :, :, -n_text // 2 :] = False
            mask = mask.expand(batch, shape.A, n_image, n_image + n_text)
            best = math.inf
            for _ in range(5):
                run.sync()
                t0 = time.perf_counter()
                for _ in range(4):
                    attend(q, k, v, mask).sum().backward()
                run.sync()
                best = min(best, (time.perf_counter() - t0) / 4)
            times[name] = best
        except Exception as e:  # pylint: disable=broad-except
            print(f"attention {name}: does not work here: {str(e).splitlines()[0]}")
    for name, s in times.items():
        print(f"attention {name}: {1e3 * s:.3f} ms forward and backward")
    if not times:
        sys.exit("no way of attention works")
    return min(times, key=times.get)


# ---- the transformer ------------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x.dtype)


class AdaNorm(nn.Module):
    def __init__(self, D, n, eps):
        super().__init__()
        self.linear = nn.Linear(D, n * D)
        self.norm = RMSNorm(D, eps)


class SelfAttention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.q_norm, self.k_norm = RMSNorm(s.E, s.eps), RMSNorm(s.E, s.eps)
        self.qkv_proj = nn.Linear(s.D, (s.A + 2 * s.K) * s.E, bias=False)
        self.text_kv_proj = nn.Linear(s.D, 2 * s.K * s.E, bias=False)
        self.o_proj = nn.Linear(s.A * s.E, s.D, bias=False)

    def forward(self, y, text, mask, attend):
        s = self.s
        B, N, L = y.shape[0], y.shape[1], text.shape[1]
        q, k, v = self.qkv_proj(y).view(B, N, s.A + 2 * s.K, s.E).split([s.A, s.K, s.K], 2)
        tk, tv = self.text_kv_proj(text).view(B, L, 2 * s.K, s.E).split([s.K, s.K], 2)
        q, k, tk = self.q_norm(q), self.k_norm(k), self.k_norm(tk)
        k, v = torch.cat([k, tk], 1), torch.cat([v, tv], 1)
        o = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o_proj(o.transpose(1, 2).reshape(B, N, s.A * s.E))


class Mlp(nn.Module):
    def __init__(self, D, hidden):
        super().__init__()
        self.gate_up_proj = nn.Linear(D, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.input_layernorm = AdaNorm(s.D, 6, s.eps)
        self.self_attn = SelfAttention(s)
        self.post_attention_layernorm = RMSNorm(s.D, s.eps)
        self.mlp = Mlp(s.D, s.F)

    def forward(self, x, e_silu, text, mask, attend):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.input_layernorm.linear(e_silu).unsqueeze(1).chunk(6, -1)
        y = self.input_layernorm.norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.self_attn(y, text, mask, attend)
        z = self.post_attention_layernorm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(z)


class PatchEmbed(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.proj = nn.Conv2d(s.C, s.D, s.P, s.P)


def positions(s, n):
    """The middle n x n of the table of sinusoids, [n n, D]."""
    base, q = s.sample_size // s.P, s.D // 4
    w = 1 / 10000 ** (torch.arange(q, dtype=torch.float64) / q)
    first = (s.G - n) // 2
    at = (torch.arange(first, first + n, dtype=torch.float32) / (s.G / base)).double()
    a = at[:, None] * w
    row = torch.cat([a.sin(), a.cos()], 1)
    return torch.cat([row[None].expand(n, n, -1), row[:, None].expand(n, n, -1)], 2).reshape(n * n, s.D).float()


class DiT(nn.Module):
    """Attention over [image | text], GQA, adaLN-zero: the formulas of the original, parameters as its state dict with q, k, v and gate, up joined."""

    def __init__(self, s, attend):
        super().__init__()
        self.s, self.attend = s, attend
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.patch_embed = PatchEmbed(s)
        self.timestep_embedder = nn.Sequential(nn.Linear(256, s.D), nn.SiLU(), nn.Linear(s.D, s.D))
        self.context_embedder = nn.Sequential(RMSNorm(s.text_width, s.eps), nn.Linear(s.text_width, s.D))
        self.norm_out = AdaNorm(s.D, 2, s.eps)
        self.proj_out = nn.Linear(s.D, s.P * s.P * s.C)
        self.register_buffer("pos", torch.empty(0), persistent=False)
        self.register_buffer("frequencies", torch.empty(0), persistent=False)

    def set_tables(self, n, device):
        self.pos = positions(self.s, n).to(device)
        self.frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128).float().to(device)

    def forward(self, x, t, text, text_mask):
        s = self.s
        B, _, H, W = x.shape
        h, w = H // s.P, W // s.P
        y = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        y = (y + self.pos).to(x.dtype)
        a = t[:, None] * self.frequencies
        e_silu = F.silu(self.timestep_embedder(torch.cat([a.cos(), a.sin()], 1).to(x.dtype)))
        text = self.context_embedder(text)
        mask = torch.cat([text_mask.new_ones(B, h * w), text_mask], 1)[:, None, None, :].expand(B, s.A, h * w, h * w + text.shape[1])
        for layer in self.layers:
            y = layer(y, e_silu, text, mask, self.attend)
        scale, shift = self.norm_out.linear(e_silu).unsqueeze(1).chunk(2, -1)
        y = self.proj_out(self.norm_out.norm(y) * (1 + scale) + shift)
        return y.view(B, h, w, s.P, s.P, s.C).permute(0, 5, 1, 3, 2, 4).reshape(B, s.C, H, W)


# ---- Gemma ----------------------------------------------------------------------------------------------------------------------------------


class GemmaLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.A, self.K, self.E = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        D, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.qkv_proj = nn.Linear(D, (self.A + 2 * self.K) * self.E, bias=False)
        self.o_proj = nn.Linear(self.A * self.E, D, bias=False)
        self.mlp = Mlp(D, c["intermediate_size"])

    def forward(self, x, cos, sin):
        B, L, _ = x.shape
        q, k, v = self.qkv_proj(self.input_layernorm(x)).view(B, L, self.A + 2 * self.K, self.E).split([self.A, self.K, self.K], 2)

        def rotate(y):
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        o = F.scaled_dot_product_attention(rotate(q).transpose(1, 2), rotate(k).transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + self.o_proj(o.transpose(1, 2).reshape(B, L, self.A * self.E))
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma(nn.Module):
    """Hidden state after the final norm. Captions are padded on the right, so the causal mask alone keeps padding out of real rows."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(GemmaLayer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, ids):
        E = self.c["head_dim"]
        f = self.c["rope_theta"] ** (-2 * torch.arange(E // 2, device=ids.device, dtype=torch.float32) / E)
        a = (torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * f).repeat(1, 2)[:, None]
        x = self.embed_tokens(ids) * math.sqrt(self.c["hidden_size"])
        cos, sin = a.cos().to(x.dtype), a.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


# ---- AutoencoderKL --------------------------------------------------------------------------------------------------------------------------


class Resnet(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, cin, 1e-6), nn.GroupNorm(groups, cout, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, 1, 1), nn.Conv2d(cout, cout, 3, 1, 1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class VaeAttention(nn.Module):
    def __init__(self, C, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, C, 1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, C)
        y = self.to_out(F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + y.reshape(B, H, W, C).permute(0, 3, 1, 2)


class Down(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, 2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, 1, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def vae_encoder(c):
    ch, G, n = c["block_out_channels"], c["norm_num_groups"], c["layers_per_block"]
    parts, at = [nn.Conv2d(c["in_channels"], ch[0], 3, 1, 1)], ch[0]
    for i, C in enumerate(ch):
        for _ in range(n):
            parts.append(Resnet(at, C, G))
            at = C
        if i < len(ch) - 1:
            parts.append(Down(C))
    parts += [Resnet(at, at, G), VaeAttention(at, G), Resnet(at, at, G), nn.GroupNorm(G, at, 1e-6), nn.SiLU()]
    return nn.Sequential(*parts, nn.Conv2d(at, 2 * c["latent_channels"], 3, 1, 1))


def vae_decoder(c):
    ch, G, n = c["block_out_channels"][::-1], c["norm_num_groups"], c["layers_per_block"]
    at = ch[0]
    parts = [nn.Conv2d(c["latent_channels"], at, 3, 1, 1), Resnet(at, at, G), VaeAttention(at, G), Resnet(at, at, G)]
    for i, C in enumerate(ch):
        for _ in range(n + 1):
            parts.append(Resnet(at, C, G))
            at = C
        if i < len(ch) - 1:
            parts.append(Up(C))
    return nn.Sequential(*parts, nn.GroupNorm(G, at, 1e-6), nn.SiLU(), nn.Conv2d(at, c["out_channels"], 3, 1, 1))


# ---- the run --------------------------------------------------------------------------------------------------------------------------------


class Run:
    """Device, models, and how they are compiled."""

    def __init__(self, o):
        self.o = o
        self.device = torch.device(o.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        with open(os.path.join(o.input, "models/google/gemma-2b/config.json"), encoding="utf-8") as f:
            self.gemma_config = json.load(f)
        with open(os.path.join(o.input, "models/REPA-E/e2e-flux-vae/config.json"), encoding="utf-8") as f:
            self.vae_config = json.load(f)
        self.shape = DitShape()
        self.check_counts()
        self.resolution, self.batch = o.resolution, o.batch
        if o.tiny:
            self.shape = DitShape(D=64, layers=2, A=4, K=2, E=16, F=96, text_width=64)
            self.gemma_config.update(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32, vocab_size=512)
            self.vae_config.update(block_out_channels=[32, 32, 64, 64])
            self.resolution, self.batch = 32, 2
        self.latent = self.resolution // 8
        self.results = {
            "torch": torch.__version__, "device": torch.cuda.get_device_name() if self.cuda else "cpu", "batch": self.batch,
            "resolution": self.resolution, "compile": o.compile, "peak_flop_per_s": None, "bytes_per_s": None,
        }

    def check_counts(self):
        """The shapes are right: as many parameters as `fdhpc plan` counts."""
        with torch.device("meta"):
            got = {
                "DiT": (DiT(self.shape, None), self.o.dit_parameters),
                "Gemma": (Gemma(self.gemma_config), GEMMA_PARAMETERS),
                "VAE": (nn.ModuleList([vae_encoder(self.vae_config), vae_decoder(self.vae_config)]), VAE_PARAMETERS),
            }
        for name, (module, want) in got.items():
            n = sum(p.numel() for p in module.parameters())
            print(f"{name}: {n} parameters")
            if n != want:
                sys.exit(f"{name}: {n} parameters, expected {want}")

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def place(self, make, std=0.02):
        """On the device in bf16, random: matrices normal, the rest as PyTorch does."""
        with torch.device(self.device):
            torch.set_default_dtype(self.dtype)
            module = make()
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for p in module.parameters():
                if p.ndim > 1:
                    p.normal_(0, std)
        return module

    def compiled(self, f):
        if self.o.compile == "no":
            return f
        return torch.compile(f, mode=self.o.compile_mode, dynamic=False)

    def compiled_around(self, f, *modules):
        """f as a whole, or the layers of the modules that it calls."""
        if self.o.compile != "layers":
            return self.compiled(f)
        for module in modules:
            for layer in module.layers:
                layer.compile(mode=self.o.compile_mode, dynamic=False)
        return f

    def frozen(self, make):
        module = self.place(make).eval().requires_grad_(False)
        return module.to(memory_format=torch.channels_last) if any(p.ndim == 4 for p in module.parameters()) else module

    def gemma(self):
        module = self.frozen(lambda: Gemma(self.gemma_config))
        return self.compiled_around(module, module)

    def encoder(self):
        return self.compiled(self.frozen(lambda: vae_encoder(self.vae_config)))

    def decoder(self):
        return self.compiled(self.frozen(lambda: vae_decoder(self.vae_config)))

    def padded(self, lengths):
        """ids [B, L] and mask, L the longest that there can be, rounded up to 8."""
        L = (self.o.most_tokens + 7) // 8 * 8
        n = torch.tensor(lengths)
        mask = torch.arange(L)[None] < n[:, None]
        ids = torch.randint(1, self.gemma_config["vocab_size"], (len(lengths), L)) * mask
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    def attention(self):
        if self.o.attention == "auto":
            self.o.attention = fastest_attention(self, self.batch, self.shape, (self.latent // self.shape.P) ** 2, (self.o.most_tokens + 7) // 8 * 8)
        self.results["attention"] = self.o.attention
        return ATTENTION[self.o.attention]

    def dit(self, attend):
        module = self.place(lambda: DiT(self.shape, attend))
        module.set_tables(self.latent // self.shape.P, self.device)
        return module

    def write(self):
        """What there is so far: a later part may find no memory or no time."""
        if self.o.json:
            with open(self.o.json + ".part", "w", encoding="utf-8") as f:
                json.dump(self.results, f, indent=1)
            os.replace(self.o.json + ".part", self.o.json)

    def measure_machine(self):
        """Rate of a large matrix product of random numbers, and of a copy: what the rest is compared with."""
        n, bytes_ = (8192, 1 << 30) if self.cuda else (256, 1 << 20)
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        x = torch.empty(bytes_, device=self.device, dtype=torch.uint8)
        y = torch.empty_like(x)
        for key, work, amount in (("peak_flop_per_s", lambda: a @ b, 2 * n**3), ("bytes_per_s", lambda: y.copy_(x), 2 * bytes_)):
            work()
            best = math.inf
            for _ in range(5):
                self.sync()
                t0 = time.perf_counter()
                for _ in range(5):
                    work()
                self.sync()
                best = min(best, (time.perf_counter() - t0) / 5)
            self.results[key] = amount / best
        print(f"matrix products {self.results['peak_flop_per_s'] * 1e-12:.1f} TFLOP/s, copies {self.results['bytes_per_s'] * 1e-9:.0f} GB/s")


class Optimizer:
    """fp32 master weights, AdamW, moving average, bf16 weights: one pass over memory (36 bytes a parameter), compiled once for each size."""

    def __init__(self, params, compiled):
        self.params, self.flat = params, [p.detach().view(-1) for p in params]
        self.master = [p.float() for p in self.flat]
        self.ema = [m.clone() for m in self.master]
        self.m, self.v = ([torch.zeros_like(x) for x in self.master] for _ in range(2))
        self.steps = torch.zeros((), device=params[0].device)
        torch._dynamo.config.recompile_limit = 64  # sizes
        self.update = torch.compile(self.one, dynamic=False) if compiled else self.one

    @staticmethod
    def one(p, master, m, v, ema, grad, scale, steps):
        lr, b1, b2, eps, decay, average = 1e-4, 0.9, 0.999, 1e-8, 1e-4, 0.9999
        g = grad.float() * scale
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (v / (1 - b2**steps)).sqrt() + eps
        master.mul_(1 - lr * decay).sub_(lr / (1 - b1**steps) * m / root)
        ema.lerp_(master, 1 - average)
        p.copy_(master)

    @torch.no_grad()
    def step(self, max_norm=1.0):
        grads = [p.grad for p in self.params]
        norm = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        self.steps += 1
        for p, flat, *state, grad in zip(self.params, self.flat, self.master, self.m, self.v, self.ema, grads):
            self.update(flat, *state, grad.reshape(-1), scale, self.steps)
            p.grad = None
        return norm


def bench_step(run):
    o = run.o
    attend = run.attention()
    gemma, encoder, dit = run.gemma(), run.encoder(), run.dit(attend)
    optimizer = Optimizer(list(dit.parameters()), o.compile != "no")
    B, C, n, R = run.batch, run.shape.C, run.latent, run.resolution
    shift, scale = run.vae_config["shift_factor"], run.vae_config["scaling_factor"]
    i = torch.arange(1000, dtype=torch.float64)
    f = (1000 - i) / 1000
    sigmas = (3 * f / (1 + 2 * f)).float().to(run.device)
    host = torch.randint(0, 256, (B, R, R, 3), dtype=torch.uint8)
    host = host.pin_memory() if run.cuda else host

    def loss_of(x, noise, sigma, text, mask):
        s = sigma[:, None, None, None]
        x_t = ((1 - s) * x + s * noise).to(run.dtype)
        out = dit(x_t, sigma * 1000, text, mask)
        return (out.float() - (noise - x)).square().mean()

    forward = run.compiled_around(loss_of, dit)

    @run.compiled
    def to_input(pixels):
        return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(run.dtype).contiguous(memory_format=torch.channels_last)

    @run.compiled
    def to_latent(moments, noise):
        mean, logvar = moments.float().chunk(2, 1)
        return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise - shift) * scale

    def mark():
        if not run.cuda:
            return time.perf_counter()
        e = torch.cuda.Event(enable_timing=True)
        e.record()
        return e

    def step(k):
        marks = [mark()]
        with torch.no_grad():
            moments = encoder(to_input(host.to(run.device, non_blocking=True)))
            x = to_latent(moments, torch.randn(B, C, n, n, device=run.device))
            marks.append(mark())
            ids, mask = run.padded(caption_lengths(k, B, o.least_tokens, o.most_tokens))
            text = gemma(ids)
            marks.append(mark())
            u = torch.sigmoid(torch.randn(B, device=run.device))
            sigma = sigmas[(u * 1000).long().clamp(max=999)]
            noise = torch.randn_like(x)
        loss = forward(x, noise, sigma, text, mask)
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        optimizer.step()
        marks.append(mark())
        if not math.isfinite(loss.item()):  # waits, as fdhpc does when it reads the loss
            sys.exit(f"step {k}: the loss is not finite")
        run.sync()
        names = ("vae", "text", "forward", "backward", "optimizer")
        between = [(b - a if not run.cuda else 1e-3 * a.elapsed_time(b)) for a, b in zip(marks, marks[1:])]
        return dict(zip(names, between))

    t0 = time.perf_counter()
    for k in range(o.warmup):
        step(k)
    run.sync()
    print(f"warm-up of {o.warmup} steps (with compiling): {time.perf_counter() - t0:.1f} s")
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    walls, phases = [], {}
    for k in range(o.warmup, o.warmup + o.steps):
        run.sync()
        t0 = time.perf_counter()
        parts = step(k)
        run.sync()
        walls.append(time.perf_counter() - t0)
        for name, s in parts.items():
            phases[name] = phases.get(name, 0) + s / o.steps
    lengths = [n for k in range(o.warmup, o.warmup + o.steps) for n in caption_lengths(k, B, o.least_tokens, o.most_tokens)]
    run.results["step"] = {
        "seconds": walls, "best": min(walls), "median": sorted(walls)[len(walls) // 2], "images_per_s": B / min(walls),
        "phase_seconds": phases, "tokens_per_image": sum(lengths) / len(lengths),
        "memory_bytes": torch.cuda.max_memory_allocated() if run.cuda else None,
    }
    print(f"{B / min(walls):.2f} images/s: {min(walls):.4f} s per step at best, {run.results['step']['median']:.4f} s median of {o.steps}")
    for name, s in phases.items():
        print(f"  {name:<12} {1e3 * s:10.3f} ms")


def timed(run, work, warmup, rounds):
    for _ in range(warmup):
        work()
    walls = []
    for _ in range(rounds):
        run.sync()
        t0 = time.perf_counter()
        work()
        run.sync()
        walls.append(time.perf_counter() - t0)
    return walls


def bench_sample(run):
    """25 Euler steps with guidance from captions to pictures."""
    o = run.o
    B, C, n, steps, guidance = (2 if o.tiny else o.sample_batch), run.shape.C, run.latent, (3 if o.tiny else 25), 6.0
    attend = run.attention()
    gemma, decoder, module = run.gemma(), run.decoder(), run.dit(attend).eval().requires_grad_(False)
    dit = run.compiled_around(module, module)
    shift, scale = run.vae_config["shift_factor"], run.vae_config["scaling_factor"]

    def shifted(x):
        return 3 * x / (1 + 2 * x)

    first, last = shifted(1.0), shifted(1 / 1000)
    s = [shifted(first + (last - first) * i / (steps - 1)) for i in range(steps)] + [0.0]

    @torch.no_grad()
    def work():
        ids, mask = run.padded([1] * B + caption_lengths(0, B, o.least_tokens, o.most_tokens))
        text = gemma(ids)
        x = torch.randn(B, C, n, n, device=run.device)
        for i in range(steps):
            t = torch.full((2 * B,), s[i] * 1000, device=run.device)
            negative, positive = dit(x.to(run.dtype).repeat(2, 1, 1, 1), t, text, mask).float().chunk(2)
            x = x + (s[i + 1] - s[i]) * (negative + guidance * (positive - negative))
        y = decoder((x / scale + shift).to(run.dtype).contiguous(memory_format=torch.channels_last))
        return (y.float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

    walls = timed(run, work, 1, o.rounds)
    run.results["sample"] = {"batch": B, "steps": steps, "seconds": walls, "images_per_s": B / min(walls)}
    print(f"sampling, {steps} steps with guidance, batch {B}: {B / min(walls):.2f} images/s")


def bench_vae(run):
    B, R, n, C = run.batch, run.resolution, run.latent, run.shape.C
    encoder, decoder = run.encoder(), run.decoder()
    pixels = torch.rand(B, 3, R, R, device=run.device).mul(2).sub(1).to(run.dtype).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(B, C, n, n, device=run.device, dtype=run.dtype).contiguous(memory_format=torch.channels_last)
    out = {"batch": B}
    with torch.no_grad():
        for name, module, x in (("encode", encoder, pixels), ("decode", decoder, latents)):
            walls = timed(run, lambda m=module, y=x: m(y), 2, 3 * run.o.rounds)
            out[name] = {"seconds": walls, "images_per_s": B / min(walls)}
            print(f"VAE {name}, batch {B}: {B / min(walls):.1f} images/s")
    run.results["vae"] = out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--what", default="step", help="step, sample, vae, or several with commas")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="small shapes: whether it runs")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--sample_batch", type=int, default=8)
    p.add_argument("--resolution", type=int, default=256)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--rounds", type=int, default=3, help="of sampling")
    p.add_argument("--least_tokens", type=int, default=24)
    p.add_argument("--most_tokens", type=int, default=200)
    p.add_argument("--attention", default="auto", choices=["auto", *ATTENTION])
    p.add_argument("--compile", default="whole", choices=["whole", "layers", "no"])
    p.add_argument("--compile_mode", default="default")
    p.add_argument("--dit_parameters", type=int, default=DIT_PARAMETERS, help="as `fdhpc plan` counts them")
    p.add_argument("--input", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../input"))
    p.add_argument("--json")
    o = p.parse_args()
    words = o.what.split(",")
    for w in words:
        if w not in ("step", "sample", "vae"):
            p.error(f"--what {w}: step, sample or vae is wanted")
    if o.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that this PyTorch can use")
        sys.exit(77)
    torch.manual_seed(1)
    torch.backends.cudnn.benchmark = True
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if o.device == 'cuda' else 'cpu'}, {' '.join(sys.argv[1:])}")
    run = Run(o)
    run.measure_machine()
    run.write()
    failed = False
    for w in words:
        try:
            {"step": bench_step, "sample": bench_sample, "vae": bench_vae}[w](run)
        except torch.OutOfMemoryError as e:
            print(f"{w}: no memory: {str(e).splitlines()[0]}")
            failed = True
        run.write()
        if run.cuda:
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
