"""Encoders, which are ResNets or other networks, and an encoder with a projector.

    features = Encoder("resnet18", stem="cifar")(images)  # (B, 3, 32, 32) -> (B, 512)
    encoder = build_encoder(recipe)  # the network that the recipe's arch names

The ResNets are torchvision's without the classifier. At 32 and 64 px they have the CIFAR stem: a
3x3 convolution without max-pool. As in the reference code (methods/BYOL.py in
github.com/tmllab/RSA), this convolution has PyTorch's default initialisation.

Every encoder is a module that maps images `(B, 3, H, W)` to features `(B, feature_dim)` and has the
attribute `feature_dim`. There are no other requirements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from rsa_fast.archs import OWN, RESNETS, TIMM
from rsa_fast.pipelines.machine import PIP
from rsa_fast.pipelines.named import load_object

if TYPE_CHECKING:
    from rsa_fast.recipes import Recipe

STANDARD_WIDTH = 64  # the channels of the first stage
ONEDNN_CHANNELS = 16  # with fewer channels, oneDNN fails: see `StridedPointwise`


class Encoder(ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet from images `(B, 3, H, W)` to features `(B, feature_dim)`.

    The keys of the state dict are torchvision's, without `fc`. `width` is the number of channels of
    the first stage and scales all stages (64 is the standard network). With `zero_init_residual`,
    the last BatchNorm gain of every block starts at 0, so the block starts as the identity. If
    `in_channels` is 1, the network gets the mean of the images' channels.

    Two settings change the cost of training. The first `recompute_stages` stages store no
    activations. The backward pass computes them again (Chen et al. 2016, arXiv:1604.06174). With
    `compiled`, torch.compile fuses the operations between the convolutions, which changes the
    results by rounding.

    Raises ValueError for an unknown `arch` or `stem`, for a `width` that is too small, and if
    `in_channels` is not 1 or 3.
    """

    def __init__(
        self,
        arch: str,
        stem: str = "imagenet",
        width: int = STANDARD_WIDTH,
        zero_init_residual: bool = True,
        recompute_stages: int = 0,
        compiled: bool = False,
        in_channels: int = 3,
    ) -> None:
        if arch not in RESNETS:
            raise ValueError(f"no arch {arch!r}: choose from {', '.join(RESNETS)}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(
                f"no stem {stem!r}: choose cifar (3x3, no max-pool) or imagenet (7x7, max-pool)"
            )
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels = {in_channels}: choose 1 (the mean of RGB) or 3")
        layers = RESNETS[arch]
        if width * layers.width_per_group < STANDARD_WIDTH:
            raise ValueError(
                f"width = {width} leaves no channel in the {layers.groups} groups of {arch}: it "
                f"needs at least {STANDARD_WIDTH // layers.width_per_group}"
            )
        self.width = width
        block = Bottleneck if layers.bottleneck else BasicBlock
        super().__init__(
            block,
            list(layers.blocks),
            zero_init_residual=zero_init_residual,
            groups=layers.groups,
            width_per_group=layers.width_per_group,
        )
        # The number of channels doubles in stages 2, 3 and 4.
        self.feature_dim: int = 8 * width * block.expansion
        self.fc = nn.Identity()
        self.recompute_stages, self.compiled = recompute_stages, compiled
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
        elif width != STANDARD_WIDTH or in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)
        reduce_channels(self, in_channels)

    def _make_layer(
        self,
        block: type[nn.Module],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """Build a stage of torchvision's ResNet with `width` channels instead of its 64."""
        if planes == STANDARD_WIDTH:
            self.inplanes = self.width
        planes = planes * self.width // STANDARD_WIDTH
        layer: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        if stride > 1:
            shortcut = cast(Any, layer[0]).downsample
            channels = shortcut[0].in_channels, shortcut[0].out_channels
            if channels[0] < ONEDNN_CHANNELS:
                # skip_init uses no random numbers, so it does not change the weights that a seed
                # gives to each layer. torchvision initialises the weights when all stages are
                # built.
                shortcut[0] = skip_init(  # type: ignore[no-untyped-call]
                    StridedPointwise, *channels, 1, stride, bias=False
                )
        return layer

    def forward(self, images: Tensor) -> Tensor:
        return (compiled_features() if self.compiled and self.training else features)(self, images)


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride, which first selects the pixels if it runs on a CPU.

    The backward pass of oneDNN's strided convolution writes past its buffer if the images are
    channels_last and have fewer channels than a vector register has numbers: 8 with AVX2, 16 with
    AVX-512 (github.com/uxlfoundation/oneDNN, issue 6035). On a CPU with AVX2, a ResNet-18 of width
    1 to 7 hung, crashed or had gradients that were ten times too large. AVX-512 was not measured.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        rows, columns = self.stride
        return F.conv2d(input[..., ::rows, ::columns], self.weight, self.bias)


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """The forward pass of `encoder` in four stages, of which the first includes the stem."""
    e, x = encoder, images
    stages = [[e.conv1, e.bn1, e.relu, e.maxpool, e.layer1], [e.layer2], [e.layer3], [e.layer4]]
    for number, stage in enumerate(stages):
        recompute = number < e.recompute_stages and torch.is_grad_enabled()
        x = run_recomputed(stage, x) if recompute else run_layers(stage, x)  # (B, channels, h, w)
    return torch.flatten(e.avgpool(x), 1)  # (B, feature_dim)


@cache
def compiled_features() -> Callable[[Encoder, Tensor], Tensor]:
    """`features`, compiled to a single graph for batches of one shape.

    A graph break is an error, because the compilation would then have no benefit.
    """
    return torch.compile(features, fullgraph=True, dynamic=False)


def run_layers(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def run_recomputed(layers: list[nn.Module], x: Tensor) -> Tensor:
    """`run_layers`, but only `x` is stored, and the backward pass runs the layers again.

    The running statistics of BatchNorm are only updated in the first run.
    """
    output: Tensor
    if torch.compiler.is_compiling():  # a compiled second run does not update the statistics
        output = checkpoint(run_layers, layers, x, use_reentrant=False, preserve_rng_state=False)
    else:
        output = checkpoint(
            run_layers,
            layers,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_discarded(layers)),
        )
    return output


@contextmanager
def statistics_discarded(layers: list[nn.Module]) -> Iterator[None]:
    """Discard the updates of the BatchNorms in `layers` to their running statistics."""
    buffers = [
        (module, name, buffer)
        for layer in layers
        for module in layer.modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, torch.empty_like(buffer))
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def reduce_channels(network: nn.Module, in_channels: int) -> None:
    """If the network has one input channel, pass it the mean of the images' channels."""
    if in_channels == 1:
        network.register_forward_pre_hook(mean_of_channels)


def mean_of_channels(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Average images `(B, 3, H, W)` to `(B, 1, H, W)`. Images of one channel do not change."""
    return (inputs[0].mean(1, keepdim=True),)


def build_encoder(recipe: Recipe, own: nn.Module | None = None) -> Encoder:
    """The encoder that the recipe's `arch` names, freshly initialised, or a copy of `own`.

    Only ResNets have the class `Encoder`. A method may use the interface of the other networks that
    is described at the top of this file. Raises ValueError for a network that does not exist or
    does not have this interface.
    """
    check_arch(recipe, own)
    arch, size_px = recipe.arch, recipe.views.size_px
    if arch in RESNETS:
        return Encoder(
            arch=arch,
            stem=recipe.stem,
            width=recipe.width,
            zero_init_residual=recipe.zero_init_residual,
            recompute_stages=recipe.recompute_stages,
            compiled=recipe.compile,
            in_channels=recipe.in_channels,
        )
    if arch == OWN:
        network = copy.deepcopy(cast(nn.Module, own))
    elif arch.startswith(TIMM):
        network = build_timm(arch, recipe.in_channels, size_px)
    else:
        network = build_named(arch)
    reduce_channels(network, recipe.in_channels)
    feature_dim = measure_features(network, arch, size_px)
    if arch.startswith(TIMM):
        # It is not always timm's `num_features`, because some models have a layer after the
        # pooling.
        cast(Any, network).feature_dim = feature_dim
    elif (attribute := getattr(network, "feature_dim", None)) != feature_dim:
        raise ValueError(
            f"{arch} has {'no feature_dim' if attribute is None else f'feature_dim = {attribute}'} "
            f"and {feature_dim} features: set the module's feature_dim to {feature_dim}"
        )
    return cast(Encoder, network)


def check_arch(recipe: Recipe, own: nn.Module | None = None) -> None:
    """Raise ValueError for a network that does not exist, before anything is built."""
    if recipe.arch == OWN:
        if own is None:
            raise ValueError(
                "the network is a module that was passed in Python (arch = own): pass it again, "
                "as encoder=module. On the command line, use arch=path/to/file.py:function instead"
            )
    elif recipe.arch.startswith(TIMM):
        timm_options(recipe.arch, recipe.in_channels, recipe.views.size_px)
    elif recipe.arch not in RESNETS:
        load_object(recipe.arch)


def timm_options(arch: str, in_channels: int, size_px: int) -> dict[str, Any]:
    """The arguments of `timm.create_model` for the encoder `arch`.

    Networks whose weights depend on the size of the images are built for this size.
    """
    if find_spec("timm") is None:
        raise ValueError(f"{arch} needs timm: {PIP} install timm")
    import timm

    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        known = timm.list_models()
        near = [model for model in known if model.startswith(name)][:3]
        near = near or get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}: {hint}")
    options = {"model_name": name, "num_classes": 0, "in_chans": in_channels}
    pretrained = timm.get_pretrained_cfg(name)
    sized = pretrained is not None and pretrained.fixed_input_size
    return options | ({"img_size": size_px} if sized else {})


def build_timm(arch: str, in_channels: int, size_px: int) -> nn.Module:
    """A model of timm without a classifier, and with random weights."""
    options = timm_options(arch, in_channels, size_px)
    import timm

    try:
        network: nn.Module = timm.create_model(**options)
    except Exception as error:  # models raise many types of errors for sizes and channels
        raise ValueError(
            f"{arch} cannot be built for {in_channels} channels of {size_px} px: "
            f"{type(error).__name__}: {error}"
        ) from error
    return network


def build_named(arch: str) -> nn.Module:
    """The network that a function returns: `path/to/file.py:name` or `package.module:name`."""
    function = load_object(arch)
    try:
        network = function()
    except Exception as error:
        raise ValueError(
            f"{arch} was called without arguments and raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def measure_features(network: nn.Module, arch: str, size_px: int) -> int:
    """The number of features of each image of this size.

    Raises ValueError if the network does not map a batch of images to features `(B, D)`.
    """
    device = next(network.parameters(), torch.empty(0)).device
    shape, training = (2, 3, size_px, size_px), network.training
    try:
        with torch.no_grad():
            features = network.eval()(torch.zeros(shape, device=device))
    except Exception as error:
        raise ValueError(
            f"{arch} fails on images {shape}: {type(error).__name__}: {error}"
        ) from error
    network.train(training)
    output = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(output, tuple) or len(output) != 2 or output[0] != 2:
        raise ValueError(
            f"{arch} maps images {shape} to {output}, not to features (2, feature_dim): pool over "
            "the image, and flatten"
        )
    return output[1]


class Projected(nn.Module):
    """An encoder and its projector, from `(B, 3, H, W)` to `(B, D)`.

    A target network is a copy of such a network.
    """

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.projector(self.encoder(images))
        return projections
