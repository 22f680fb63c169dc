"""What a network is made of: backbones in named blocks, auxiliary heads, losses, layers."""

from pipeline.models import torchvision as torchvision  # registers its networks with the backbones
