"""A backbone with the maps of ResNet18 and a thirtieth of its weights, for tests that need no more."""

from torch import nn
from torchvision.models import ResNet


class Block(nn.Module):
    """A residual block of one 1×1 convolution."""

    expansion = 1

    def __init__(self, channels, planes, stride=1, downsample=None, *_):
        super().__init__()
        self.conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(planes)
        self.downsample = downsample or nn.Identity()

    def forward(self, x):
        return nn.functional.relu(self.bn(self.conv(x)) + self.downsample(x))


def small_backbone():
    """What `torchvision.models.resnet18()` gives, but small."""
    return ResNet(Block, [1, 1, 1, 1])
