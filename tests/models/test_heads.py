"""Auxiliary heads: their shapes as published, and patch feature fusion."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from own_tasks import SEGMENTATION
from torch import nn

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.local.methods import method_terms
from pipeline.local.task import Classification
from pipeline.models.heads import DecoderHead, Given, TaskHead, dgl_head, pooled_linear, xcyf
from pipeline.models.imagenet_heads import imagenet_head
from pipeline.models.patches import PatchedHead, patch_slices
from pipeline.models.unbuilt import no_values


def layers(network: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("channels", "width", "stride"), [(16, 32, 2), (32, 64, 2), (64, 64, 1)])
def test_infopro_heads_follow_the_table(channels: int, width: int, stride: int) -> None:
    first, second = layers(xcyf((channels, 8, 8), 10, "2c2f", 128, 1), nn.Conv2d)
    assert (first.out_channels, first.stride, first.bias) == (width, (stride, stride), None)
    assert (second.in_channels, second.out_channels, second.stride) == (width, width, (1, 1))
    linears = layers(xcyf((channels, 8, 8), 10, "1c3f", 128, 1), nn.Linear)
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(width, 128), (128, 128), (128, 10)]
    assert len(layers(xcyf((channels, 8, 8), 10, "0c1f", 128, 1), nn.Module)) == 4  # itself, pool, flatten, linear


@pytest.mark.parametrize(
    ("kind", "convolutions", "hidden"), [("mlp-sr", 3, 3), ("mlp", 0, 3), ("auglocal", 3, 2), ("cnn", 2, 0)]
)
def test_dgl_heads_follow_the_table(kind: str, convolutions: int, hidden: int) -> None:
    head = dgl_head((16, 32, 32), 10, kind)
    found = layers(head, nn.Conv2d)
    assert len(found) == convolutions
    assert {layer.kernel_size for layer in found} <= ({(3, 3)} if kind == "cnn" else {(1, 1)})
    linears = layers(head, nn.Linear)
    assert len(linears) == hidden + 1 and linears[-1].in_features == 4 * 16
    assert all((layer.bias is None) == (kind == "auglocal") for layer in linears[:-1])
    assert head(torch.zeros(2, 16, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("shape", "kernel"), [((16, 32, 32), (8, 4)), ((32, 16, 16), (4, 4)), ((64, 8, 8), (4, 2))])
def test_predsim_pools_until_512_inputs_are_left(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    head = pooled_linear(shape, 10, 512)
    assert head[0].kernel_size == kernel and head[2].in_features == 512


@pytest.mark.parametrize(("channels", "first"), [(256, 128), (512, 128), (1024, 256)])
def test_the_head_for_imagenet_is_the_published_one(channels: int, first: int) -> None:
    with torch.device("meta"):
        head = imagenet_head((channels, 28, 28), 1000)
    found = [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in layers(head, nn.Conv2d)]
    assert found == [(first, 1, 1), (256, 3, 2), (512, 3, 2), (2048, 1, 1)]
    assert all(layer.bias is None for layer in layers(head, nn.Conv2d)) and len(layers(head, nn.BatchNorm2d)) == 4
    assert [(layer.in_features, layer.out_features) for layer in layers(head, nn.Linear)] == [(2048, 1000)]


@pytest.mark.parametrize(
    ("side", "decoder", "widths", "sides"),
    [
        (28, "imagenet", [128, 32, 12, 3], [28, 56, 112, 224]),
        (28, "imagenet-hpff", [128, 32, 16, 3], [28, 56, 112, 224]),
        (14, "imagenet-hpff", [128, 64, 32, 16, 3], [14, 112, 56, 112, 224]),
        (56, "imagenet-hpff", [128, 16, 3], [56, 112, 224]),
    ],
)
def test_the_decoder_for_imagenet_goes_to_the_image_in_the_published_steps(
    side: int, decoder: str, widths: list[int], sides: list[int]
) -> None:
    config, task = MethodConfig(name="infopro", head="imagenet", decoder=decoder), Classification(1000, (3, 224, 224))
    with no_values():
        term, _ = method_terms(config, task, 0.0, stride=224 / side)
        head = term.make((512, side, side))
        seen: list[tuple[int, ...]] = []
        for layer in layers(head, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
        image = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
        head.loss(torch.zeros(2, 512, side, side), Given(torch.zeros(2, dtype=torch.int64), image))
    assert seen == [(width, size, size) for width, size in zip(widths, sides, strict=True)]
    assert [layer.kernel_size[0] for layer in layers(head, nn.Conv2d)] == [1] + [3] * (len(widths) - 1)
    assert all(layer.bias is not None for layer in layers(head, nn.Conv2d))


def test_a_head_for_pixels_has_the_published_layers_and_is_for_a_dense_task() -> None:
    for name in ("dgl", "infopro"):
        config = MethodConfig(name=name, head="fcn")
        *_, term = method_terms(config, SEGMENTATION, 0.0)
        head = term.make((16, 2, 2))
        kinds = [type(layer) for layer in head.get_submodule("head").children()]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d, nn.Conv2d]
        assert [layer.out_channels for layer in layers(head, nn.Conv2d)] == [8, SEGMENTATION.classes]
        scores = head.logits(torch.zeros(2, 16, 2, 2))
        assert scores is not None and scores.shape[1:] == SEGMENTATION.output_shape
        with pytest.raises(ConfigError, match=r"head = 'fcn' is for an output of every pixel, but that .* is \(10,\)"):
            method_terms(config, Classification(10, (3, 32, 32)), 0.0)


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="method.head = 'mpl' is no head of dgl; did you mean 'mlp'"):
        method_terms(MethodConfig(name="dgl", head="mpl"), Classification(10, (3, 32, 32)), 0.0)
    with pytest.raises(ConfigError, match="'3c2f' is no XcYf head"):
        xcyf((16, 8, 8), 10, "3c2f", 128, 1)
    with pytest.raises(ConfigError, match="remove method.head"):
        method_terms(MethodConfig(name="predsim", head="mlp"), Classification(10, (3, 32, 32)), 0.0)


def test_infopro_weights_are_interpolated() -> None:
    config = MethodConfig(name="infopro", reconstruction=(5.0, 1.0), task=(0.0, 2.0))
    weights = {term.name: term.weight for term in method_terms(config, Classification(10, (3, 32, 32)), 0.25)}
    assert weights == {"reconstruction": pytest.approx(4.0), "task": pytest.approx(0.5)}


def small_head() -> TaskHead:
    return TaskHead(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(3, 4))
    )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", [6, 7])
def test_patches_give_the_mean_of_a_shared_head_or_the_sum_of_separate_heads(separate: bool, size: int) -> None:
    torch.manual_seed(0)
    patched = PatchedHead(small_head, 2, separate).double()
    reference = copy.deepcopy(patched)
    feature = torch.randn(4, 2, size, size, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    gradient = torch.zeros_like(feature)
    _, value = patched.backward(feature, Given(labels), 0.5, gradient)

    leaf = feature.clone().requires_grad_()
    half = size // 2
    parts = [leaf[:, :, a, b] for a in (slice(0, half), slice(half, None)) for b in (slice(0, half), slice(half, None))]
    heads = reference.heads if separate else [reference.heads[0]] * 4
    terms = torch.stack([head.loss(part, Given(labels)) for head, part in zip(heads, parts, strict=True)])
    total = terms.sum() if separate else terms.mean()
    (0.5 * total).backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)
    for mine, other in zip(patched.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_batchnorm_in_a_shared_head_sees_one_patch_at_a_time() -> None:
    patched = PatchedHead(small_head, 2)
    patched.backward(torch.randn(4, 2, 6, 6), Given(torch.tensor([0, 1, 2, 3])), 1.0, torch.zeros(4, 2, 6, 6))
    assert int(patched.heads[0].head[1].num_batches_tracked) == 4


def test_only_one_patch_has_a_graph_at_a_time() -> None:
    """Peak bytes that autograd holds: the whole map's at grid 1, about a quarter at grid 2."""

    def peak(grid: int) -> int:
        held, most = 0, 0

        class Saved:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal held, most
                self.tensor, self.size = tensor, tensor.numel()
                held += self.size
                most = max(most, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.size

        patched = PatchedHead(small_head, grid)
        feature = torch.randn(4, 2, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            patched.backward(feature, Given(torch.tensor([0, 1, 2, 3])), 1.0, torch.zeros_like(feature))
        return most

    assert peak(2) < 0.35 * peak(1)


def test_a_patched_head_votes_by_the_mean_of_its_scores() -> None:
    patched = PatchedHead(small_head, 2).eval()
    feature = torch.randn(3, 2, 6, 6)
    parts = [feature[:, :, a : a + 3, b : b + 3] for a in (0, 3) for b in (0, 3)]
    expected = torch.stack([patched.heads[0].head(part) for part in parts]).mean(dim=0)
    torch.testing.assert_close(patched.logits(feature), expected)


def test_patch_ranges_cover_everything_once() -> None:
    for size in (6, 7, 9):
        for grid in (1, 2, 3):
            covered = [i for part in patch_slices(size, grid) for i in range(size)[part]]
            assert covered == list(range(size))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "grid"), [(8, 1), (8, 2), (9, 2)])
@pytest.mark.parametrize("kind", ["mlp-sr", "mlp", "cnn", "predsim", "greedy"])
def test_pooling_the_whole_map_once_changes_nothing(
    kind: str, size: int, grid: int, layout: torch.memory_format
) -> None:
    """A head that pools first may see the means of its patches only; also with a gradient to add to."""
    patch = (4, -(-size // grid), -(-size // grid))
    torch.manual_seed(0)

    def make() -> TaskHead:
        if kind == "predsim":
            return TaskHead(pooled_linear(patch, 3, 16))
        return TaskHead(xcyf(patch, 3, "0c1f", 8, 1) if kind == "greedy" else dgl_head(patch, 3, kind))

    if kind == "predsim" and size % grid:
        pytest.skip("a linear layer needs patches of one size")
    patched = PatchedHead(make, grid).double().to(memory_format=layout)
    reference = copy.deepcopy(patched)
    feature = torch.randn(6, 4, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    start = torch.randn_like(feature)
    gradient, value = patched.backward(feature, Given(labels), 0.5, start.clone())

    leaf = feature.clone().requires_grad_()
    parts = [leaf[:, :, a, b] for a in patch_slices(size, grid) for b in patch_slices(size, grid)]
    total = torch.stack([reference.heads[0].loss(part, Given(labels)) for part in parts]).mean()
    (0.5 * total).backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, start + leaf.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(patched.backward(feature, Given(labels), 0.5)[0], leaf.grad, rtol=1e-10, atol=1e-13)
    reference.heads[0].loss(parts[0], Given(labels))  # as many BatchNorm updates in both
    for mine, other in zip(patched.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad / 2.0, other.grad, rtol=1e-9, atol=1e-12)  # two backward passes


@pytest.mark.parametrize("size", range(2, 49))
def test_pooling_first_is_the_heads_own_pooling_at_every_size(size: int) -> None:
    """At 21, say, a head pools to 6 x 6 with windows that overlap; windows of 3 would give 7 x 7."""
    torch.manual_seed(0)
    patched = PatchedHead(lambda: TaskHead(dgl_head((2, size, size), 3, "mlp-sr")), 1).double()
    reference = copy.deepcopy(patched)
    feature, labels = torch.randn(4, 2, size, size, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    _, value = patched.backward(feature, Given(labels), 1.0)
    expected = reference.heads[0].loss(feature, Given(labels))
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (4, 4), (5, 7)])
def test_the_decoder_is_upsampling_convolution_batchnorm_relu_convolution_entropy(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    head = DecoderHead(16, 3, 1).double()
    plain = nn.Sequential(nn.Conv2d(16, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 3, 3, 1, 1)).double()
    plain.load_state_dict(head.decoder.state_dict())
    feature = torch.randn(3, 16, *size, dtype=torch.float64).contiguous(memory_format=layout)
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mine, other = feature.clone().requires_grad_(), feature.clone().requires_grad_()
    loss = head.loss(mine, Given(torch.zeros(3, dtype=torch.int64), image))
    up = F.interpolate(other, size=(16, 16), mode="bilinear", align_corners=True)
    expected = F.binary_cross_entropy(torch.sigmoid(plain(up)), image.double() / 255)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-14)
    for a, b in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(head.decoder.state_dict()[name], value, rtol=1e-10, atol=1e-14)
