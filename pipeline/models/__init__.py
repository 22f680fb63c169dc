"""What a network is made of: backbones in named blocks, auxiliary heads, losses, layers."""
