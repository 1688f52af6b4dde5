"""One training step of ours against what a user would pick instead, turn by turn on the same images and captions.

python benchmarks/train_step.py --captions data/data.json --json step.json

Peers: open_clip's own trainer (`open_clip_train.train.train_one_epoch`), Hugging Face's `CLIPModel`, and a plain loop
on OpenAI's `clip` package, each with AdamW. Weights are random: they cost what published ones cost. On a GPU the
images are there before a step begins: `ours` has them as uint8, as `train.py` copies them, the peers as floats.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import Timing, machine, print_table, ratio, take_turns, write_json
from clip_model import CLIPModel, MultimodalTrainer
from cliptune.data.formats import read_index
from cliptune.data.sample_data import distinct_scenes
from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.model.towers import CLASS_ARGUMENTS
from cliptune.preprocess.tokens import tokenize
from cliptune.runs.model import place_model
from cliptune.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from cliptune.runtime.openai_clip import import_clip
from cliptune.settings import Config, ModelSettings, RunSettings, TrainingSettings
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.optim import build_optimizer

RATE, DECAY = 1e-5, 0.01
MANY_SAMPLES = 1_000_000
"""Of an epoch: a run that is worth whatever takes a while to prepare."""
Step = Callable[[], object]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = parse(argv)
    torch.manual_seed(0)
    keep_freed_memory()  # as train.py does; the peers run in the same process, so it is theirs too
    device = resolve_device(options.device)
    images, tokens = make_inputs(options, device)
    lengths = (tokens != 0).sum(2)  # [batches, B]
    print(f"{options.model}, batch {options.batch_size}; captions of {lengths.float().mean():.1f} tokens on average, "
          f"longest {lengths.max()}; {machine(options.device)}")  # fmt: skip
    results: dict[str, Any] = {"machine": machine(options.device), "options": vars(options), "precisions": {}}
    for precision in options.precisions.split(","):
        cases = make_cases(options, options.cases, images, tokens, device, precision)
        timings = time_steps(cases, options)
        rate = matrix_rate(device, precision, largest=options.largest_side)
        flops = sum(step_flops(ARCHITECTURES[options.model], each) for each in lengths) / len(lengths)
        report(precision, timings, floor=flops / rate, rate=rate)
        later: dict[str, dict[str, list[float]]] = {}
        figures = {
            "seconds": {name: timing.seconds for name, timing in timings.items()},
            "later_seconds": later,
            "ours_compiled": any(isinstance(case, Turn) and case.is_compiled for case in cases.values()),
            "matrix_rate": rate,
            "floor_seconds": None if math.isnan(flops) else flops / rate,
        }
        results["precisions"][precision] = figures
        write_json(options.json, results)
        first = dict(itertools.islice(cases.items(), 1))
        for name, case in make_cases(options, options.later, images, tokens, device, precision).items():
            beside = time_steps(first | {name: case}, options)
            report(precision, beside, floor=flops / rate, rate=rate)
            later[name] = {each: timing.seconds for each, timing in beside.items()}
            write_json(options.json, results)
    return 0


def time_steps(cases: dict[str, Step], options: Namespace) -> dict[str, Timing]:
    """Take the cases' turns; returns the seconds of a step."""
    timings = take_turns(cases, repeats=options.repeats, warmup=options.warmup, device=options.device)
    return {name: Timing([seconds / options.steps for seconds in timing.seconds]) for name, timing in timings.items()}


def parse(argv: list[str] | None) -> Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", help="model name (the peers know only the published ones)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=1, help="so many batches of captions, taken in turn")
    parser.add_argument("--captions", help="index file whose captions are used; default: the sample data's")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="ours and open_clip's")
    parser.add_argument("--cases", default="ours,open_clip,transformers,clip", help=f"of {','.join(MAKERS)}")
    parser.add_argument(
        "--later", default="", help="cases that take long to prepare: each timed beside the first, after the others"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn, with no wait for the device in between")
    parser.add_argument(
        "--largest_side", type=int, default=8192, help="of the matrices whose products give the floor, at most"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: a small model, ours and clip alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.cases, options.batch_size, options.repeats = "ViT-Ti/32", "ours,clip", 16, 3
        options.largest_side = 256
    return options


def make_inputs(options: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make images of noise, float `[B, 3, R, R]` on the device, and tokens, `[batches, B, L]`."""
    size = ARCHITECTURES[options.model].image_resolution
    tokens, _ = tokenize(choose_captions(options))
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    return images, tokens.view(options.batches, options.batch_size, -1)


def choose_captions(options: Namespace) -> list[str]:
    """Take a caption from every n-th image, so that all of the file is seen; of too few each several times."""
    wanted = options.batch_size * options.batches
    if options.captions:
        rows = read_index(Path(options.captions)).rows
        stride = max(len(rows) // wanted, 1)
        captions = [row.captions[0] for row in rows[::stride]]
    else:
        captions = [texts[0] for _, texts in distinct_scenes(wanted)]
    return list(itertools.islice(itertools.cycle(captions), wanted))


def make_cases(
    options: Namespace, names: str, images: Tensor, tokens: Tensor, device: torch.device, precision: str
) -> dict[str, Step]:
    """Make the turns of cases, named with commas; says which are skipped, since their packages are not installed."""
    cases: dict[str, Step] = {}
    for name in filter(None, names.split(",")):
        inputs = Inputs(images, tokens, steps=options.steps, checkpointed=options.gradient_checkpointing)
        try:
            cases[name] = MAKERS[name](options.model, inputs, device, precision)
        except ImportError as error:
            print(f"{name} is skipped: {error}")
    return cases


class Inputs:
    """The batches of a case: the same images, other captions each time.

    Args:
        images: float `[B, 3, R, R]`.
        tokens: `[batches, B, L]`.
        steps: of a turn.
        checkpointed: a step saves memory by gradient checkpointing.
    """

    def __init__(self, images: Tensor, tokens: Tensor, *, steps: int = 1, checkpointed: bool = False) -> None:
        self.images, self.num_pairs, self.steps, self.checkpointed = images, len(images), steps, checkpointed
        self._tokens: Iterator[Tensor] = itertools.cycle(tokens.unbind())

    def next_tokens(self) -> Tensor:
        """Return the tokens of the next batch, `[B, L]`."""
        return next(self._tokens)

    def turn(self, step: Step, model: CLIPModel | None = None) -> Turn:
        """Make a turn of a step."""
        return Turn(step, self.steps, model)


@dataclass
class Turn:
    """Steps that are timed together."""

    step: Step
    number: int
    model: CLIPModel | None
    """What they train, if it is ours."""

    def __call__(self) -> list[object]:
        """Take them."""
        return [self.step() for _ in range(self.number)]

    @property
    def is_compiled(self) -> bool:
        """Tell whether our model has run compiled, and not given up its compiler."""
        return self.model is not None and self.model.is_compiled


def make_trainer(
    model: str | CLIPModel,
    device: torch.device,
    *,
    parallel: str = "ddp",
    texts: Tensor | None = None,
    **training: Any,
) -> MultimodalTrainer:
    """Make what `train.py` trains with, placed as its flags say.

    Args:
        model: its name, for random weights; or the model.
        device: where it is trained.
        parallel: how several ranks share it.
        texts: that micro-batches are chosen by, where their size is `auto`.
        training: settings of training, by their flags' names, where they are not the defaults.
    """
    if isinstance(model, str):
        model = CLIPModel(model, pretrained="none")
    config = Config(
        model=ModelSettings(name=model.architecture.name, pretrained="none"),
        training=TrainingSettings(**training),
        run=RunSettings(parallel=parallel),
    )
    precision = resolve_precision(config.training.precision, device)
    runner, micro_batch_size = place_model(
        config, model, precision=precision, device=device, num_samples=MANY_SAMPLES, texts=lambda: texts
    )
    optimizer = build_optimizer(model, learning_rate=RATE, backbone_lr_scale=1.0, weight_decay=DECAY)
    return MultimodalTrainer(
        model, ContrastiveLoss(), optimizer, precision=precision, micro_batch_size=micro_batch_size, parallel=runner
    )


def ours(
    model_name: str, inputs: Inputs, device: torch.device, precision: str, *, compiled: bool | None = None
) -> Step:
    """Make steps of `MultimodalTrainer`, as `train.py` runs it; compiled or not: None: as it would choose."""
    chosen: dict[str, Any] = {} if compiled is None else {"compile": compiled}
    trainer = make_trainer(
        model_name, device, precision=precision, batch_size=inputs.num_pairs,
        gradient_checkpointing=inputs.checkpointed, **chosen,
    )  # fmt: skip
    ids = torch.arange(inputs.num_pairs)
    images = inputs.images
    if device.type == "cuda":
        images = (64 * images + 128).clamp(0, 255).to(torch.uint8)
    return inputs.turn(lambda: trainer.train_step(images, inputs.next_tokens(), ids), trainer.model)


def open_clip_step(
    model_name: str, inputs: Inputs, device: torch.device, precision: str, *, compiled: bool = False
) -> Step:
    """Make steps of open_clip's own training loop, with its default optimiser."""
    import open_clip  # noqa: PLC0415
    from open_clip_train.train import train_one_epoch  # noqa: PLC0415

    model: Any = open_clip.create_model(f"{model_name.replace('/', '-')}-quickgelu", output_dict=True).to(device)
    if inputs.checkpointed:
        model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=DECAY)
    if compiled:
        model = torch.compile(model)
    args = Namespace(
        device=str(device), precision={"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[precision], distill=False,
        accum_freq=1, skip_scheduler=True, grad_clip_norm=None, horovod=False, batch_size=inputs.num_pairs,
        world_size=1, rank=0, local_rank=0, log_every_n_steps=1000, wandb=False, logs=None, tensorboard=False,
    )  # fmt: skip

    class Loader:
        num_batches, num_samples = inputs.steps, inputs.steps * inputs.num_pairs

        def __iter__(self) -> Iterator[Any]:
            return ((inputs.images, inputs.next_tokens()) for _ in range(inputs.steps))

    data = {"train": Namespace(dataloader=Loader(), set_epoch=lambda epoch: None)}
    loss = open_clip.ClipLoss()
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)


def transformers_step(model_name: str, inputs: Inputs, device: torch.device, precision: str) -> Step:
    """Make steps of Hugging Face's `CLIPModel`, with the padding that its processor gives (to the longest text)."""
    from transformers import CLIPConfig  # noqa: PLC0415
    from transformers import CLIPModel as HuggingFaceModel  # noqa: PLC0415

    shape = ARCHITECTURES[model_name]
    config = CLIPConfig(
        text_config={
            "hidden_size": shape.transformer_width, "intermediate_size": 4 * shape.transformer_width,
            "num_hidden_layers": shape.transformer_layers, "num_attention_heads": shape.transformer_heads,
        },
        vision_config={
            "hidden_size": shape.vision_width, "intermediate_size": 4 * shape.vision_width,
            "num_hidden_layers": shape.vision_layers, "num_attention_heads": shape.vision_heads,
            "patch_size": shape.vision_patch_size, "image_size": shape.image_resolution,
        },
        projection_dim=shape.embed_dim,
    )  # fmt: skip
    model = HuggingFaceModel(config).to(device).train()

    def loss() -> Tensor:
        tokens = inputs.next_tokens()
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        texts = {"input_ids": tokens.to(device), "attention_mask": (tokens != 0).long().to(device)}
        result: Tensor = model(**texts, pixel_values=inputs.images, return_loss=True).loss
        return result

    return inputs.turn(_plain_step(list(model.parameters()), loss, device, precision))


def clip_step(model_name: str, inputs: Inputs, device: torch.device, precision: str) -> Step:
    """Make steps of the loop that everybody writes on OpenAI's package: 77 positions, AdamW as it comes."""
    sizes = {key: getattr(ARCHITECTURES[model_name], key) for key in CLASS_ARGUMENTS}
    model = import_clip().model.CLIP(**sizes).float().to(device)
    labels = torch.arange(inputs.num_pairs, device=device)

    def loss() -> Tensor:
        per_image, per_text = model(inputs.images, inputs.next_tokens().to(device))
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    return inputs.turn(_plain_step(list(model.parameters()), loss, device, precision))


def _plain_step(parameters: list[Any], loss: Callable[[], Tensor], device: torch.device, precision: str) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step() -> float:
        optimizer.zero_grad()
        context = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with context:
            value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


MAKERS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "ours+eager": lambda *args: ours(*args, compiled=False),
    "ours+compile": lambda *args: ours(*args, compiled=True),
    "open_clip": open_clip_step,
    "open_clip+compile": lambda *args: open_clip_step(*args, compiled=True),
    "transformers": transformers_step,
    "clip": clip_step,
}


def step_flops(shape: Architecture, lengths: Tensor) -> float:
    """Count a step's floating-point operations: 6 a weight and position, 12 a width and pair of positions in attention.

    Every layer counts in full over a ViT's patches and each text up to its end, though ours runs the last layer for
    one position; the lookups, norms, the loss and the optimiser do not count.
    """
    if not shape.is_vit:
        return float("nan")
    patches = (shape.image_resolution // (shape.vision_patch_size or 1)) ** 2
    images, total = len(lengths), 0.0
    towers = (
        (shape.vision_width, shape.vision_layers, [patches + 1] * images, 1.0),
        (shape.transformer_width, shape.transformer_layers, lengths.tolist(), 0.5),  # causal: half of the pairs
    )
    for width, layers, positions, seen in towers:
        weights = 12 * width * width
        total += layers * sum(6 * weights * n + 12 * width * seen * n * n for n in positions)  # type: ignore[operator]
    embedding = 4 * patches * 3 * (shape.vision_patch_size or 1) ** 2 * shape.vision_width  # no gradient of pixels
    return total + images * (embedding + 6 * shape.embed_dim * (shape.vision_width + shape.transformer_width))


def matrix_rate(device: torch.device, precision: str, *, largest: int) -> float:
    """Measure the best rate of a matrix product, in operations a second, over sizes as they occur, up to a limit."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # a GPU is kept busy by large products alone, several of them between two looks at the clock
    is_gpu = device.type != "cpu"
    shapes = ((25600, 768, 3072), (8192, 8192, 8192)) if is_gpu else ((1600, 768, 3072), (4096, 1024, 4096))
    times = 20 if is_gpu else 1
    products: dict[str, Step] = {}
    for shape in (*shapes, (2048, 2048, 2048)):
        rows, inner, columns = (min(side, largest) for side in shape)
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        b = torch.randn(columns, inner, dtype=dtype, device=device)
        products[f"{rows},{inner},{columns}"] = lambda a=a, b=b: [a @ b.T for _ in range(times)]  # type: ignore[misc]
    timings = take_turns(products, repeats=7, warmup=2, device=device.type)
    rates = []
    for name, timing in timings.items():
        rows, inner, columns = map(int, name.split(","))
        rates.append(2 * times * rows * inner * columns / timing.median)
    return max(rates)


def report(precision: str, timings: dict[str, Timing], *, floor: float, rate: float) -> None:
    """Print one precision's table."""
    first = next(iter(timings))
    rows = [["", "s/step", "spread", f"times {first}", "share of the floor"]]
    for name, timing in timings.items():
        share = f"{100 * floor / timing.median:.0f}%"
        rows.append(
            [name, f"{timing.median:.3f}", f"{100 * timing.spread:.0f}%", f"{ratio(timings, first, name):.2f}", share]
        )
    print_table(f"{precision}: floor {floor:.3f} s at {rate / 1e9:.0f} GFLOP/s", rows)


if __name__ == "__main__":
    sys.exit(main())
