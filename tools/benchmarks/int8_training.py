"""Speed and memory of INT8 training against float32: kernels, layers, whole iterations; on the CPU, two threads.

Layers: every kind of convolution of ResNet-50 but the stem, at 224 pixels, forward and backward with quantisation
included. Iterations: forward, backward and SGD of ResNet-50 (mmdet) and VGG-16 (mmcv). All arms run in turn in one
process, after a warm-up; a ratio is the median over the rounds, with its quartiles. The float32 to beat is the faster
of the two memory layouts. Before a layer is timed, its integer products are compared bit for bit with float64's.

glibc gives each block above 32 MB back to the system and takes it anew, which costs more than many a convolution and
strikes one arm or the other by chance. So the process keeps its memory (mallopt), for all arms;
``--default-malloc`` leaves that out. Peak memory is measured in processes of their own, with the default.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from alimm.extras import require
from alimm.projects.int8_training import Int8Options, convert, layers_of
from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.layers import int8_class
from alimm.projects.int8_training.planner import total
from alimm.projects.int8_training.quantized import Stored
from alimm.projects.int8_training.state import Context, LayerState, products_for
from alimm.registry import MODELS
from alimm.report.benchmark import Claim, Outcome, print_table
from alimm.report.statistics import Ratio, interleave, ratio

# in, out, kernel, stride, input size, how often in ResNet-50
LAYERS = [
    (64, 64, 1, 1, 56, 1), (64, 64, 3, 1, 56, 3), (64, 256, 1, 1, 56, 4), (256, 64, 1, 1, 56, 2),
    (256, 128, 1, 1, 56, 1),
    (128, 128, 3, 2, 56, 1), (128, 512, 1, 1, 28, 4), (256, 512, 1, 2, 56, 1), (512, 128, 1, 1, 28, 3),
    (128, 128, 3, 1, 28, 3), (512, 256, 1, 1, 28, 1), (256, 256, 3, 2, 28, 1), (256, 1024, 1, 1, 14, 6),
    (512, 1024, 1, 2, 28, 1), (1024, 256, 1, 1, 14, 5), (256, 256, 3, 1, 14, 5), (1024, 512, 1, 1, 14, 1),
    (512, 512, 3, 2, 14, 1), (512, 2048, 1, 1, 7, 3), (1024, 2048, 1, 2, 14, 1), (2048, 512, 1, 1, 7, 2),
    (512, 512, 3, 1, 7, 2),
]  # fmt: skip
LAYER_BOUND, STASH_BOUND = 1.3, 0.27
ITERATION_BOUNDS = {"resnet50": 1.15, "vgg16": 1.4}
GOALS = {"resnet50": 1.4, "vgg16": 1.8}
FLOAT_ARMS = ("float32 NCHW", "float32 NHWC")
ARMS = (*FLOAT_ARMS, "bfloat16 AMP", "fake INT8", "INT8", "INT8 with AMP")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, default=16, help="pictures a batch")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--parts", nargs="+", default=["layers", "resnet50", "vgg16"], help="which parts to run")
    parser.add_argument("--default-malloc", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the parts that are asked for."""
    unknown = [part for part in arguments.parts if part not in ("layers", *ITERATION_BOUNDS)]
    if unknown or arguments.batch < 1:
        raise ValueError(
            f"--parts takes layers, resnet50, vgg16 and --batch a positive number; got {unknown or arguments.batch}"
        )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not arguments.default_malloc:
        _keep_memory()
    batch, size, repeats = arguments.batch, 224, arguments.repeats
    if arguments.quick:
        batch, repeats = 1, 1
    claims: list[Claim] = []
    data: dict[str, Any] = {}
    products = products_for("auto", torch.device("cpu"))
    print(f"integer products: {products.name}, {'bytes up to 255' if products.wide else 'bytes up to 127'} exact\n")
    if "layers" in arguments.parts:
        chosen = LAYERS[:3] if arguments.quick else LAYERS
        claims += _layers(chosen, batch, repeats, data)
    for name in ITERATION_BOUNDS:
        if name in arguments.parts:
            claims += _iterations(name, batch, size, repeats, data)
    return Outcome(claims, data)


def _keep_memory() -> None:
    """Tell glibc to neither map large blocks one by one nor give memory back; elsewhere nothing is done."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 30)
        ctypes.CDLL(None).mallopt(trim_threshold, (1 << 31) - 1)


def _layers(chosen: list[tuple[int, ...]], batch: int, repeats: int, data: dict[str, Any]) -> list[Claim]:
    rows, ratios, weights, slower = [], [], [], []
    for spec in chosen:
        inputs, outputs, kernel, stride, size, count = spec
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        x = torch.randn(batch, inputs, size, size).relu_()
        _check_exact(Geometry.of(conv), x)
        arms, state = _layer_arms(conv, x)
        times = interleave(arms, repeats, 2)
        best = min(FLOAT_ARMS, key=lambda arm: np.median(times[arm]))
        gain = ratio(times[best], times["INT8"])
        parts = state.timings[tuple(x.shape)]
        floats = sum(parts[f"{name}_float"] for name in ("output", "grad_input", "grad_weight"))
        kernels = sum(parts[f"{name}_int8"] for name in ("output", "grad_input", "grad_weight"))
        plan = state.plans[tuple(x.shape)]
        shown = "".join(letter if on else "-" for letter, on in zip("YXW", plan, strict=True))
        label = f"{inputs} -> {outputs} {kernel}x{kernel} s{stride} @{size}"
        milliseconds = [f"{1e3 * float(np.median(times[arm])):.1f}" for arm in times]
        rows.append(
            [f"{label} x{count}", *milliseconds, f"{floats / kernels:.2f}", f"{gain.median:.2f}", _span(gain), shown]
        )
        ratios.append(gain.median)
        weights.append(count * float(np.median(times[best])))
        if gain.q3 < 1:
            slower.append(label)
        data[f"layer {label}"] = {"times": times, "plan": shown, "parts": parts, "planned": total(parts, plan)}
    header = ["layer", *(f"{arm} ms" for arm in times), "kernels", "layer", "quartiles", "in INT8"]
    title = "One layer, forward and backward: float32 time over INT8 time (Y output, X and W its gradients)"
    print_table(title, header, rows)
    order = np.argsort(ratios)
    cumulated = np.cumsum(np.asarray(weights)[order])
    median = float(np.asarray(ratios)[order][np.searchsorted(cumulated, cumulated[-1] / 2)])
    return [
        Claim("layers, time-weighted median", f"{median:.2f}x", f"at least {LAYER_BOUND}x", median >= LAYER_BOUND),
        Claim(
            "layers slower than float32", str(len(slower)) + "".join(f"; {one}" for one in slower), "none", not slower
        ),
    ]


def _layer_arms(conv: nn.Conv2d, x: Tensor) -> tuple[dict[str, Callable[[], None]], LayerState]:
    """Forward and backward of a layer as stock float32 in both layouts, fake INT8, and INT8."""

    def arm(module: nn.Module, data: Tensor) -> Callable[[], None]:
        source = data.requires_grad_()
        gradient = torch.randn_like(module(source))

        def step() -> None:
            source.grad = module.weight.grad = None
            module(source).backward(gradient)

        return step

    last = torch.channels_last
    floats = copy.deepcopy(conv).to(memory_format=last)
    fake, int8 = copy.deepcopy(floats), copy.deepcopy(floats)
    for module, options in ((fake, Int8Options(backend="fake")), (int8, Int8Options())):
        module.int8 = LayerState("conv", 0, Geometry.of(conv), options, Context())
        module.__class__ = int8_class(nn.Conv2d)
    arms = {
        FLOAT_ARMS[0]: arm(conv, x.clone()),
        FLOAT_ARMS[1]: arm(floats, x.contiguous(memory_format=last)),
        "fake INT8": arm(fake, x.contiguous(memory_format=last)),
        "INT8": arm(int8, x.contiguous(memory_format=last)),
    }
    return arms, int8.int8


def _check_exact(layer: Geometry, x: Tensor) -> None:
    """Stop where the integer output or weight gradient of two pictures is not that of float64."""
    products = products_for("auto", x.device)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 128, (2, 1, *x.shape[2:], layer.in_channels), dtype=torch.uint8, generator=generator)
    shape = (layer.out_channels, layer.in_channels, *layer.kernel[1:])
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    source = data[:, 0].permute(0, 3, 1, 2).double()
    true = nn.functional.conv2d(source, weight.double(), stride=layer.stride[1:], padding=layer.padding[1:])
    ones = np.ones(layer.out_channels, np.float32)
    y = products.output(Stored(data, 0, 1.0), weight, ones, None, layer)
    gradient = torch.randint(-127, 128, true.shape, dtype=torch.int8, generator=generator)
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, layer.out_channels)
    dw = products.grad_weight(Stored(data, 0, 1.0), rows, ones, layer).view(shape)
    true_dw = nn.grad.conv2d_weight(source, shape, gradient.double(), layer.stride[1:], layer.padding[1:])
    if not (torch.equal(y[:, 0].permute(0, 3, 1, 2), true.float()) and torch.equal(dw, true_dw.float())):
        raise RuntimeError(f"the integer products of {layer} are not those of float64: no figure here would count")


def build(name: str) -> nn.Module:
    """A stock network with 1,000 classes."""
    if name == "vgg16":
        vgg = require("mmcv.cnn", "the VGG-16 of this benchmark").VGG(16, num_classes=1000)
        # The stock module also returns the maps of its stages; a classifier is its layers in a row.
        return nn.Sequential(*vgg.features, nn.Flatten(), *vgg.classifier)
    require("mmdet", "the ResNet-50 of this benchmark")
    return MODELS.build(
        dict(
            type="alimm.ImageClassifier",
            backbone=dict(type="mmdet.ResNet", depth=50, norm_eval=False, frozen_stages=-1),
            neck=dict(type="alimm.GlobalPoolNeck"),
            head=dict(type="alimm.LinearHead", num_classes=1000, in_channels=2048),
        )
    )


def step_of(arm: str, stock: nn.Module, batch: int, size: int) -> tuple[Callable[[], None], nn.Module]:
    """One training iteration of an arm, and its model."""
    model = copy.deepcopy(stock)
    model.train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(0, 1000, (batch,), generator=generator)
    if arm != FLOAT_ARMS[0]:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if "INT8" in arm:
        convert(model, backend="fake" if arm == "fake INT8" else "auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled="AMP" in arm):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()

    return step, model


def _iterations(name: str, batch: int, size: int, repeats: int, data: dict[str, Any]) -> list[Claim]:
    stock = build(name)
    stash = _stash_share(stock, size)
    peaks = {arm: _peak_in_process(name, arm, batch, size) for arm in ARMS}
    made = {arm: step_of(arm, stock, batch, size) for arm in ARMS}
    times = interleave({arm: step for arm, (step, _) in made.items()}, repeats, 2)
    best = min(FLOAT_ARMS, key=lambda arm: np.median(times[arm]))
    rows = []
    for arm in ARMS:
        against = ratio(times[best], times[arm])
        p50, p90 = np.percentile(times[arm], [50, 90])
        rows.append([arm, f"{p50:.2f}", f"{p90:.2f}", f"{against.median:.2f}", _span(against), f"{peaks[arm]:.2f}"])
    print_table(
        f"{name}, batch {batch}, {size} px: one iteration (forward, backward, SGD)",
        ["arm", "median s", "90 % s", f"{best} / arm", "quartiles", "peak GB"],
        rows,
    )
    plans = [plan for _, state in layers_of(made["INT8"][1]) for plan in state.plans.values()]
    whole = sum(all(plan[1:]) for plan in plans)
    print(f"{len(plans)} layers planned, {whole} with both gradients in INT8")
    print(f"bytes that the converted layers keep for backward: {stash:.3f} of float32's\n")
    gain = ratio(times[best], times["INT8"])
    bound = ITERATION_BOUNDS[name]
    data[name] = {"times": times, "peaks_gb": peaks, "stash": stash, "plans": plans}
    figure = f"{gain.median:.2f}x ({_span(gain)}) of {best}, goal {GOALS[name]}x"
    return [
        Claim(f"{name} iteration", figure, f"at least {bound}x", gain.median >= bound),
        Claim(f"{name} stash of the converted layers", f"{stash:.3f}", f"at most {STASH_BOUND}", stash <= STASH_BOUND),
    ]


def _stash_share(stock: nn.Module, size: int) -> float:
    """Bytes that the converted layers keep for backward, over what the same layers keep in float32."""
    kept: dict[str, int] = {}
    for arm in ("float32", "INT8"):
        model = copy.deepcopy(stock)
        model.train()
        report = convert(copy.deepcopy(stock))
        if arm == "INT8":
            convert(model, planner=False)
        modules = dict(model.named_modules())
        counted = [0]
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def wrap(module: nn.Module, counted: list[int] = counted, weights: set[int] = weights) -> None:
            stock_forward = module.forward

            def pack(tensor: Tensor) -> Tensor:
                if tensor.data_ptr() not in weights:
                    counted[0] += tensor.numel() * tensor.element_size()
                return tensor

            def forward(x: Tensor) -> Tensor:
                with saved_tensors_hooks(pack, lambda tensor: tensor):
                    y: Tensor = stock_forward(x)
                return y

            module.forward = forward  # type: ignore[method-assign]

        for layer in report.converted:
            wrap(modules[layer])
        model(torch.randn(2, 3, size, size)).sum().backward()
        kept[arm] = counted[0]
    return kept["INT8"] / kept["float32"]


def _peak_in_process(name: str, arm: str, batch: int, size: int) -> float:
    """Peak resident memory in GB of two iterations in a process of their own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, arm, batch, size, torch.get_num_threads()))


def _peak(name: str, arm: str, batch: int, size: int, threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, _ = step_of(arm, build(name), batch, size)
    for _ in range(2):
        step()
    # Not ru_maxrss, which a process takes over from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e6


def _span(value: Ratio) -> str:
    return f"{value.q1:.2f}-{value.q3:.2f}"
