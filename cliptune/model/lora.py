"""LoRA (Hu et al. 2021): held weights W, and beside each a learned product of two narrow matrices: W + (alpha / r) B A.

B starts as 0, so the model starts as it was. While training the product is never formed: its gradient would be as large
as that of W. Afterwards it is added to W, and the model is one like any other.

Adapted are the linear layers of a tower: `in_proj` (query, key and value in one, as peft has it) and `out_proj` of
attention, `c_fc` and `c_proj` of MLPs; of a ResNet the four layers of its attention pool alone, since the rest is
convolutions.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cliptune.model.attention import Attention
from cliptune.runtime.device import exact_products
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import count, one_line

LAYERS = {"all": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """How a model is adapted.

    Attributes:
        rank: columns of B, and rows of A.
        alpha: the product counts `alpha / rank` times.
        layers: `all`, `attention` or `mlp`.
    """

    rank: int
    alpha: float
    layers: str = "all"

    @property
    def scale(self) -> float:
        """Return how often the product counts."""
        return self.alpha / self.rank


class AdaptedLinear(nn.Linear):
    """A linear layer with a product beside its weight."""

    lora_A: nn.Parameter  # noqa: N815  (the names in papers and in peft)
    lora_B: nn.Parameter  # noqa: N815
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension."""
        return super().forward(x) + _product(self, x)


class AdaptedAttention(Attention):
    """Attention with a product beside `in_proj_weight`."""

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_scale: float

    def _adapt(self, projected: Tensor, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return projected + _product(self, x, rows)

    def _attend_otherwise(self, *given: Any) -> Any:
        raise ValueError("attention with LoRA takes one sequence for query, key and value: merge the adapter first")


def _product(layer: Any, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return (alpha / r) B A x, for some rows of B; A comes first: r numbers in place of a whole width."""
    return F.linear(layer.lora_scale * F.linear(x, layer.lora_A), layer.lora_B[rows])


def add_lora(model: Any, rank: int, *, alpha: float | None = None, layers: str = "all") -> None:
    """Hold a model's towers, and put adapters beside their linear layers; projections and temperature train as before.

    Args:
        model: a `CLIPModel` whose weights are there already; a tower that is frozen gets no adapters.
        rank: of the products.
        alpha: see `LoRA`; None: `rank`, so that the product counts once.
        layers: `all`, `attention` (with its output layer) or `mlp`.

    Raises:
        ValueError: the model has adapters or no such layers, or a rank above the width of one.
    """
    if model.lora is not None:
        raise ValueError("the model has adapters already")
    lora = LoRA(rank, float(rank if alpha is None else alpha), layers)
    found = [
        (name, module, weight)
        for name, module, weight in _linear_layers(model.backbone, LAYERS[layers])
        if ("image" if name.startswith("visual.") else "text") not in model.frozen_towers
    ]
    if not found:
        raise ValueError(f"lora_layers {layers}: the towers that train have no such layers")
    for name, _, weight in found:
        if rank > min(weight.shape):
            raise ValueError(f"lora_rank {rank} is more than the {min(weight.shape)} that {name} has at most")
    model.backbone.requires_grad_(False)
    for _, module, weight in found:
        _adapt(module, weight, lora)
    model.lora, model.trained_part = lora, f"LoRA of rank {rank} beside {count(len(found), 'weight')}"


def _linear_layers(backbone: Any, parts: Iterable[str]) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield the layers that LoRA adapts: name, module, weight."""
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, Attention) and "attention" in parts:
            yield name, module, module.in_proj_weight
        elif isinstance(module, nn.Linear):
            of_attention = last == "out_proj" or ".attnpool." in f".{name}"
            if ("attention" if of_attention else "mlp") in parts:
                yield name, module, module.weight


def _adapt(module: Any, weight: Tensor, lora: LoRA) -> None:
    """Make an adapted layer of one: by its class, so that names and weights stay as they are."""
    module.__class__ = AdaptedAttention if isinstance(module, Attention) else AdaptedLinear
    size_out, size_in = weight.shape
    first = torch.empty(lora.rank, size_in, device=weight.device)
    nn.init.kaiming_uniform_(first, a=math.sqrt(5))  # as `nn.Linear` starts, and peft
    module.lora_A = nn.Parameter(first)
    module.lora_B = nn.Parameter(torch.zeros(size_out, lora.rank, device=weight.device))
    module.lora_scale = lora.scale
    module.register_load_state_dict_pre_hook(_without_adapter)


def _without_adapter(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a layer load the weights of a merged model: its product is 0 then."""
    if f"{prefix}lora_B" not in state:
        state[f"{prefix}lora_A"], state[f"{prefix}lora_B"] = module.lora_A, torch.zeros_like(module.lora_B)


def is_adapter(name: str) -> bool:
    """Tell an adapter's parameter by its name."""
    return name.endswith((".lora_A", ".lora_B"))


def adapted_weight(name: str) -> str:
    """Return the name of the weight that an adapter's parameter stands beside."""
    layer = name.rpartition(".")[0]
    return f"{layer}.in_proj_weight" if layer.endswith(".attn") else f"{layer}.weight"


def merged(state: Mapping[str, Any], lora: LoRA | None) -> dict[str, Any]:
    """Return a model's state dict with the products added to their weights; without adapters as it is."""
    result = {name: value for name, value in state.items() if not is_adapter(name)}
    for name, first in state.items():
        if lora is not None and name.endswith(".lora_A"):
            weight = adapted_weight(name)
            result[weight] = _with_product(result[weight], first, state[name[:-1] + "B"], lora)
    return result


@torch.no_grad()
def _with_product(weight: Tensor, first: Tensor, second: Tensor, lora: LoRA) -> Tensor:
    with exact_products():
        return torch.addmm(weight, second, first, alpha=lora.scale)


def base_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a CRC of the held weights in a model's state dict, which tells others that are taken by mistake."""
    crc = 0
    for name in sorted(state):
        if name.startswith("backbone.") and not is_adapter(name):
            crc = zlib.crc32(state[name].detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def save_adapter(path: Path, tensors: Mapping[str, Tensor], lora: LoRA, *, about: Mapping[str, str]) -> None:
    """Write what a run with LoRA has learned, by peft's names, with peft's settings in the file's metadata.

    Args:
        path: of the file.
        tensors: adapters, projections and temperature, by the names of the model's state dict.
        lora: how the model is adapted.
        about: what else the metadata is to hold.
    """
    config = {
        "peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none", "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-2] for name in tensors if is_adapter(name)} - {"out_proj"}),
        "modules_to_save": ["image_projection", "text_projection"],
    }  # fmt: skip
    named = {PEFT_PREFIX + _peft_name(name): value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", "adapter_config": json.dumps(config), "lora": json.dumps(asdict(lora)), **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(save(named, metadata))


def load_adapter(model: Any, path: str | Path) -> None:
    """Merge a run's adapter into the model that the run started from; see `save_adapter`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none of ours, damaged, or was trained on other weights than the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such adapter: {path}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        lora = LoRA(**json.loads(about["lora"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an adapter of this toolkit, or damaged: {one_line(error)}") from None
    state = model.state_dict()
    if about.get("base") != base_fingerprint(state):
        raise ValueError(
            f"{path}: trained on other weights than this model's; it was a {about.get('model_name')}, as its run "
            "loaded it: best_model.pth beside it holds the whole model"
        )
    names = {_own_name(name): value.to(model.device) for name, value in found.items()}
    try:
        model.load_state_dict(merged({**state, **names}, lora))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: does not fit this model: {one_line(error)}") from None


def _peft_name(name: str) -> str:
    """`x.attn.lora_A` is `x.attn.lora_A.weight` in peft, whose adapted attention holds `out_proj` one level below."""
    if not is_adapter(name):
        return name
    return name.replace(".attn.out_proj.", ".attn.base_layer.out_proj.") + ".weight"


def _own_name(name: str) -> str:
    name = name.removeprefix(PEFT_PREFIX)
    return name.replace(".base_layer.", ".").removesuffix(".weight") if ".lora_" in name else name
