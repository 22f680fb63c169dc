"""What a network is made of: backbones in named blocks, auxiliary heads, losses, layers."""

# Each registers its networks with the backbones.
from pipeline.models import decoder as decoder
from pipeline.models import densenet as densenet
from pipeline.models import timm as timm
from pipeline.models import torchvision as torchvision
