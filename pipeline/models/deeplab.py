"""DeepLabV3 with a ResNet-101 of output stride 8 (Chen et al. 2017), as torchvision has it and as InfoPro trains it.

    stem -> layer1.0 -> ... -> layer3.22 -> layer4.0 -> layer4.1 -> layer4.2 -> classifier
                                       |    x, stage3   x, stage3   x, stage3   x:   atrous pyramid, class scores
                                       +--------------------------------------> aux: convolution,    class scores

Stages 3 and 4 dilate by 2 and 4 in place of striding, their first blocks by half of it. Class scores are upsampled to
the size of the images, whose sides are multiples of 8. In training the network gives the scores of its second head,
which stands on stage 3, as "aux": they have the task's loss too, with the weight ``model.aux_weight``.

| | deeplabv3_resnet101 | deeplabv3_resnet101c |
|---|---|---|
| stem | 7x7 convolution | three 3x3 convolutions to 32, 32, 64 ("v1c"; timm's resnet101c) |
| pyramid | 256 channels, 1x1 and 3x3 convolution behind it | 512 channels, 3x3 convolution behind it |
| dropout before the scores | 0.5, of the aux head 0.1 | 0.1 of both, of whole channels |
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from pipeline.base.flow import AUX, MAIN, Flow, bare, named
from pipeline.models.backbones import Blocks

STAGE3 = "stage3"
OUTPUT_STRIDE = 8
RATES = (12, 24, 36)


class FlowBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's residual block, which passes on what flows beside "x"; as the first of a stage also its input."""

    keeps = ""

    def forward(self, flow: Flow) -> Flow:
        tensors = dict(named(flow))
        x = tensors.pop(MAIN)
        if self.keeps:
            tensors[self.keeps] = x
        return bare({MAIN: super().forward(x), **tensors})


class DeepLabClassifier(nn.Module):
    """{"x": (B, 2048, h, w), "stage3": (B, 1024, h, w)} -> (B, classes, 8 h, 8 w); in training with "aux", likewise."""

    def __init__(self, head: nn.Module, aux: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.aux = aux
        self.upsample = nn.Upsample(scale_factor=OUTPUT_STRIDE, mode="bilinear", align_corners=False)

    def forward(self, flow: dict[str, Tensor]) -> Flow:
        scores = {MAIN: self.upsample(self.head(flow[MAIN]))}
        if self.training:
            scores[AUX] = self.upsample(self.aux(flow[STAGE3]))
        return bare(scores)


def deeplab(in_channels: int, classes: int, like_infopro: bool) -> Blocks:
    """The network, as torchvision's or as InfoPro's."""
    network = ResNet(FlowBottleneck, [3, 4, 23, 3], replace_stride_with_dilation=[False, True, True])
    network.layer4[0].keeps = STAGE3
    stem = _deep_stem(in_channels) if like_infopro else nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    blocks: Blocks = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv1=stem, bn1=network.bn1, relu=network.relu, maxpool=network.maxpool))
    )
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in network.get_submodule(stage).named_children():
            blocks[f"{stage}.{index}"] = block
    aux = FCNHead(1024, classes)
    head: nn.Module = DeepLabHead(2048, classes, RATES)
    if like_infopro:
        head = nn.Sequential(_pyramid(2048, 512), nn.Conv2d(512, classes, 1))
        aux[3] = nn.Dropout2d(0.1)
    blocks["classifier"] = DeepLabClassifier(head, aux)
    return blocks


def _deep_stem(in_channels: int) -> nn.Sequential:
    """In place of the 7x7 convolution; a BatchNorm and a ReLU follow, as of that."""
    layers: list[nn.Module] = []
    for channels, stride in ((in_channels, 2), (32, 1)):
        layers += [nn.Conv2d(channels, 32, 3, stride, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(32, 64, 3, 1, 1, bias=False))


def _pyramid(channels: int, width: int) -> nn.Module:
    pyramid: nn.Module = ASPP(channels, RATES, width)
    pyramid.project = nn.Sequential(
        nn.Conv2d((len(RATES) + 2) * width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
    )
    return pyramid
