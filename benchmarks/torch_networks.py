"""The same networks in PyTorch, written from the papers: what jaxseg is compared with.

Layers have jaxseg's names, so that `jaxseg.training.transfer.from_torch` converts their weights;
VGG16 and ResNet have torchvision's. For parity tests and benchmarks alone: jaxseg never imports
torch.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UPCONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
AVG_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def padding_of(kernel):
    return tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2


def norm_layer(kind, features, rank):
    if kind == "group":
        return nn.GroupNorm(features // 8, features)
    if kind == "instance":
        return NORMS[kind][rank](features, affine=True)
    return NORMS[kind][rank](features)


class ConvBlock(nn.Module):
    """Convolution, norm, leaky ReLU, over and over."""

    def __init__(self, rank, channels, features, num_convs=2, kernel=3, stride=1, norm="instance"):
        super().__init__()
        for i in range(num_convs):
            before, step = (channels, stride) if i == 0 else (features, 1)
            layer = CONV[rank](
                before, features, kernel, step, padding_of(kernel), bias=norm == "group"
            )
            self.add_module(f"conv{i}", layer)
            self.add_module(f"norm{i}", norm_layer(norm, features, rank))
        self.num_convs = num_convs

    def forward(self, x):
        for i in range(self.num_convs):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
            x = F.leaky_relu(x, 0.01)
        return x


class ResidualBlock(nn.Module):
    """Two convolutions beside an average-pooled, projected shortcut."""

    def __init__(self, rank, channels, features, kernel=3, stride=1):
        super().__init__()
        conv, pad = CONV[rank], padding_of(kernel)
        self.conv1 = conv(channels, features, kernel, stride, pad, bias=False)
        self.norm1 = norm_layer("instance", features, rank)
        self.conv2 = conv(features, features, kernel, 1, pad, bias=False)
        self.norm2 = norm_layer("instance", features, rank)
        self.rank, self.stride = rank, stride
        self.projected = channels != features
        if self.projected:
            self.project_conv = conv(channels, features, 1, bias=False)
            self.project_norm = norm_layer("instance", features, rank)

    def forward(self, x):
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        if self.stride != 1:
            x = AVG_POOL[self.rank](x, self.stride, self.stride)
        if self.projected:
            x = self.project_norm(self.project_conv(x))
        return F.leaky_relu(x + y, 0.01)


class AttentionGate(nn.Module):
    """Additive attention of Oktay et al. 2018 on the coarser grid."""

    def __init__(self, rank, skip_channels, coarse_channels, features, stride):
        super().__init__()
        self.skip = CONV[rank](skip_channels, features, stride, stride, bias=False)
        self.gating = CONV[rank](coarse_channels, features, 1)
        self.psi = CONV[rank](features, 1, 1)
        self.mode = {2: "bilinear", 3: "trilinear"}[rank]

    def forward(self, skip, coarse):
        weight = torch.sigmoid(self.psi(F.relu(self.skip(skip) + self.gating(coarse))))
        weight = F.interpolate(weight, skip.shape[2:], mode=self.mode, align_corners=False)
        return skip * weight


class UNet(nn.Module):
    """The modern U-Net, plain or with nnU-Net's residual encoder."""

    def __init__(
        self,
        rank,
        channels,
        num_classes,
        features=(32, 64, 128, 256),
        kernels=None,
        strides=None,
        norm="instance",
        blocks=None,
        decoder_convs=2,
        attention=False,
        deep_supervision=False,
    ):
        super().__init__()
        depth = len(features)
        kernels, strides = kernels or [3] * depth, strides or [2] * (depth - 1)
        first, steps = (strides[0], strides[1:]) if len(strides) == depth else (1, strides)
        self.depth, self.attention, self.deep_supervision = depth, attention, deep_supervision
        self.encoder = nn.Module()
        self.residual = blocks is not None
        if self.residual:
            self.encoder.stem = ConvBlock(rank, channels, features[0], 1, kernels[0], first)
            first_stage = 1
        else:
            first_stage = first
        before = features[0] if self.residual else channels
        for level in range(depth):
            stride = steps[level - 1] if level else first_stage
            if self.residual:
                stage = nn.Module()
                for i in range(blocks[level]):
                    block = ResidualBlock(rank, before, features[level], kernels[level], stride)
                    stage.add_module(f"block{i}", block)
                    before, stride = features[level], 1
            else:
                stage = ConvBlock(rank, before, features[level], 2, kernels[level], stride, norm)
                before = features[level]
            self.encoder.add_module(f"stage{level}", stage)
        for level in range(depth - 1):
            fine, coarse, stride = features[level], features[level + 1], steps[level]
            self.add_module(f"upconv{level}", UPCONV[rank](coarse, fine, stride, stride))
            block = ConvBlock(rank, 2 * fine, fine, decoder_convs, kernels[level], 1, norm)
            self.add_module(f"up{level}", block)
            if attention:
                gate = AttentionGate(rank, fine, coarse, max(fine // 2, 1), stride)
                self.add_module(f"gate{level}", gate)
            if deep_supervision and 0 < level < depth - 2:
                self.add_module(f"head{level}", CONV[rank](fine, num_classes, 1))
        self.is_coarser = first != 1
        if self.is_coarser:
            self.upconv_head = UPCONV[rank](features[0], num_classes, first, first)
        else:
            self.head = CONV[rank](features[0], num_classes, 1)

    def forward(self, x):
        maps = []
        if self.residual:
            x = self.encoder.stem(x)
        for level in range(self.depth):
            stage = getattr(self.encoder, f"stage{level}")
            if self.residual:
                for block in stage.children():
                    x = block(x)
            else:
                x = stage(x)
            maps.append(x)
        coarser = []
        for level in reversed(range(self.depth - 1)):
            skip = maps[level]
            if self.attention:
                skip = getattr(self, f"gate{level}")(skip, x)
            x = torch.cat([skip, getattr(self, f"upconv{level}")(x)], 1)
            x = getattr(self, f"up{level}")(x)
            if hasattr(self, f"head{level}"):
                coarser.append(getattr(self, f"head{level}")(x))
        logits = self.upconv_head(x) if self.is_coarser else self.head(x)
        return (logits, *reversed(coarser)) if self.deep_supervision else logits


class UNet2015(nn.Module):
    """Ronneberger et al. 2015, figure 1."""

    def __init__(self, channels=1, num_classes=2, features=(64, 128, 256, 512, 1024)):
        super().__init__()
        self.encoder = nn.Module()
        before = channels
        for level, width in enumerate(features):
            self.encoder.add_module(f"stage{level}", self._block(before, width))
            before = width
        for level, width in enumerate(features[:-1]):
            self.add_module(f"upconv{level}", nn.ConvTranspose2d(2 * width, width, 2, 2))
            self.add_module(f"up{level}", self._block(2 * width, width))
        self.head = nn.Conv2d(features[0], num_classes, 1)
        self.depth = len(features)

    @staticmethod
    def _block(channels, features):
        block = nn.Module()
        block.conv0 = nn.Conv2d(channels, features, 3)
        block.conv1 = nn.Conv2d(features, features, 3)
        return block

    def forward(self, x):
        def run(block, x):
            return F.relu(block.conv1(F.relu(block.conv0(x))))

        maps = []
        for level in range(self.depth):
            if level:
                x = F.max_pool2d(x, 2)
            x = run(getattr(self.encoder, f"stage{level}"), x)
            maps.append(x)
        for level in reversed(range(self.depth - 1)):
            x = getattr(self, f"upconv{level}")(x)
            skip = maps[level]
            top, left = ((n - m) // 2 for n, m in zip(skip.shape[2:], x.shape[2:], strict=True))
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = run(getattr(self, f"up{level}"), torch.cat([skip, x], 1))
        return self.head(x)


VGG16_CONVS = ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))
VGG16_WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}


class FCN8sVGG16(nn.Module):
    """Long et al. 2015: pads by 100, crops every fusion, sums the scores of pool5, pool4, pool3."""

    def __init__(self, num_classes=21, hidden=4096):
        super().__init__()
        self.encoder = nn.Module()
        before = 3
        for stage, num_convs in VGG16_CONVS:
            for i in range(1, num_convs + 1):
                pad = 100 if (stage, i) == (1, 1) else 1
                layer = nn.Conv2d(before, VGG16_WIDTHS[stage], 3, padding=pad)
                self.encoder.add_module(f"conv{stage}_{i}", layer)
                before = VGG16_WIDTHS[stage]
        self.fc6 = nn.Conv2d(512, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.score5 = nn.Conv2d(hidden, num_classes, 1)
        self.score4 = nn.Conv2d(512, num_classes, 1)
        self.score3 = nn.Conv2d(256, num_classes, 1)
        self.upsample4 = nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False)
        self.upsample3 = nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False)
        self.upsample = nn.ConvTranspose2d(num_classes, num_classes, 16, 8, bias=False)

    def forward(self, image):
        x, pools = image, {}
        for stage, num_convs in VGG16_CONVS:
            for i in range(1, num_convs + 1):
                x = F.relu(getattr(self.encoder, f"conv{stage}_{i}")(x))
            x = pools[stage] = F.max_pool2d(x, 2, 2, ceil_mode=True)
        x = F.relu(self.fc7(F.relu(self.fc6(x))))
        x = self.upsample4(self.score5(x))
        x = x + self._crop(self.score4(pools[4]), x, 5)
        x = self.upsample3(x)
        x = x + self._crop(self.score3(pools[3]), x, 9)
        return self._crop(self.upsample(x), image, 31)

    @staticmethod
    def _crop(x, like, offset):
        return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


class VGG16(nn.Module):
    """torchvision's vgg16 with its names; returns the maps before each pooling."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for stage, num_convs in VGG16_CONVS:
            for _ in range(num_convs):
                layers += [nn.Conv2d(before, VGG16_WIDTHS[stage], 3, padding=1), nn.ReLU()]
                before = VGG16_WIDTHS[stage]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps


class ResNetBlock(nn.Module):
    """torchvision's BasicBlock or Bottleneck."""

    def __init__(self, channels, width, stride, bottleneck):
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            sizes = ((channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1))
        else:
            sizes = ((channels, width, 3, stride), (width, width, 3, 1))
        for i, (before, after, kernel, step) in enumerate(sizes, start=1):
            layer = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.num_convs = len(sizes)
        self.downsample = None
        if stride != 1 or channels != out:
            layer = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(layer, nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for i in range(1, self.num_convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.num_convs else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's resnet18, 34 or 50 with its names; returns the maps of strides 2 to 32."""

    def __init__(self, num_layers):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        bottleneck, before = num_layers == 50, 64
        counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[num_layers]
        for layer, count in enumerate(counts, start=1):
            blocks, width = [], 32 * 2**layer
            for i in range(count):
                stride = 2 if layer > 1 and i == 0 else 1
                blocks.append(ResNetBlock(before, width, stride, bottleneck))
                before = 4 * width if bottleneck else width
            self.add_module(f"layer{layer}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for layer in range(1, 5):
            x = getattr(self, f"layer{layer}")(x)
            maps.append(x)
        return maps


def dice_cross_entropy(logits, label):
    """Mean `dice_cross_entropy_loss` of `training.losses`; logits [B, K, *S], label [B, *S]."""
    axes = tuple(range(2, logits.ndim))
    cross_entropy = F.cross_entropy(logits, label)
    probs = torch.softmax(logits, 1)[:, 1:]
    one_hot = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probs.dtype)
    overlap = 2 * (probs * one_hot).sum(axes) + 1e-5
    size = (probs + one_hot).sum(axes) + 1e-5
    return cross_entropy + 1 - (overlap / size).mean()


def supervised(outputs, label):
    """As `supervise` of `training.losses`: coarser scales weigh half, of small logits the centre.

    Args:
      outputs: logits [B, K, *S], or a tuple of such, finest first.
      label: [B, *S] int64.
    """
    if not isinstance(outputs, tuple):
        start = [(n - m) // 2 for n, m in zip(label.shape[1:], outputs.shape[2:], strict=True)]
        for axis, (s, m) in enumerate(zip(start, outputs.shape[2:], strict=True), start=1):
            label = label.narrow(axis, s, m)
        return dice_cross_entropy(outputs, label)
    total = sum(0.5**i for i in range(len(outputs)))
    return sum(
        0.5**i / total * dice_cross_entropy(scale, _nearest(label, scale.shape[2:]))
        for i, scale in enumerate(outputs)
    )


def _nearest(label, shape):
    for axis, (n, m) in enumerate(zip(label.shape[1:], shape, strict=True), start=1):
        places = torch.tensor([int((i + 0.5) * n / m) for i in range(m)], device=label.device)
        label = label.index_select(axis, places)
    return label
