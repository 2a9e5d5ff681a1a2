"""Moments are plain sums: equal to direct computation, and additive."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dk2pnet.decompose.moments import Moments

sizes = st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 5))
some = settings(deadline=None, max_examples=40)


def data(size, rows, images, seed):
    """Patches (n, G, C q), gradients (images, G, N, positions) of whole numbers: float32 products are exact."""
    groups, inputs, outputs = size
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(-9, 10, (rows, groups, inputs), generator=generator).float()
    gradients = torch.randint(-9, 10, (images, groups, outputs, 3), generator=generator).float()
    return patches, gradients


def gathered(size, patches, gradients):
    moments = Moments.zeros(*size)
    moments.add_patches(patches)
    for image in gradients:
        moments.add_gradients(image)
        moments.count_images(1)
    return moments


def assert_equal(a, b):
    for name in ("input_sum", "mean_sum", "output_sum"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert (a.positions, a.images) == (b.positions, b.images)


@some
@given(sizes, st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_moments_are_the_direct_means(size, rows, images, seed):
    patches, gradients = data(size, rows, images, seed)
    moments = gathered(size, patches, gradients)
    u, g = patches.double(), gradients.double()
    A = torch.stack([torch.stack([torch.outer(row, row) for row in u[:, group]]).mean(0) for group in range(size[0])])
    torch.testing.assert_close(moments.A(), A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.mean(), u.mean(0), rtol=1e-12, atol=1e-12)
    # B sums over positions and averages over images
    B = torch.zeros(size[0], size[2], size[2], dtype=torch.float64)
    for image in g:
        for group, columns in enumerate(image):
            for column in columns.T:
                B[group] += torch.outer(column, column) / images
    torch.testing.assert_close(moments.B(), B, rtol=1e-12, atol=1e-12)
    assert moments.positions == rows
    assert moments.images == images
    assert {moments.A().dtype, moments.B().dtype, moments.mean().dtype} == {torch.float64}


@some
@given(sizes, st.integers(2, 20), st.integers(0, 99))
def test_centred_is_the_covariance(size, rows, seed):
    patches, gradients = data(size, rows, 1, seed)
    moments = gathered(size, patches, gradients)
    before = moments.input_sum.clone()
    covariance = torch.stack(
        [torch.cov(group.T.double(), correction=0).view(size[1], size[1]) for group in patches.transpose(0, 1)]
    )
    torch.testing.assert_close(moments.A(centred=True), covariance, rtol=1e-10, atol=1e-10)
    assert torch.equal(moments.input_sum, before), "reading must not change the sums"


@some
@given(sizes, st.integers(2, 20), st.integers(2, 6), st.data())
def test_two_parts_add_up_to_the_whole(size, rows, images, drawn):
    patches, gradients = data(size, rows, images, drawn.draw(st.integers(0, 99)))
    at, cut = drawn.draw(st.integers(0, rows)), drawn.draw(st.integers(0, images))
    first, second = gathered(size, patches[:at], gradients[:cut]), gathered(size, patches[at:], gradients[cut:])
    kept = first.input_sum.clone()
    whole = gathered(size, patches, gradients)
    assert_equal(first + second, whole)
    assert_equal(second + first, whole)
    assert_equal(first + Moments.zeros(*size), first)
    assert torch.equal(first.input_sum, kept)


@some
@given(sizes, st.integers(0, 99))
def test_many_batches_into_one_are_the_whole(size, seed):
    patches, gradients = data(size, 12, 4, seed)
    moments = Moments.zeros(*size)
    for rows, columns in zip(patches.split(3), gradients, strict=True):
        moments.add_patches(rows)
        moments.add_gradients(columns)
        moments.count_images(1)
    assert_equal(moments, gathered(size, patches, gradients))


def test_sums_stay_exact_where_float32_would_not():
    moments = Moments.zeros(1, 1)
    for value in (2.0**13, 1.0, 1.0, 1.0):
        moments.add_patches(torch.full((1, 1, 1), value))
    assert moments.input_sum.item() == 2**26 + 3
    assert moments.A().item() == (2**26 + 3) / 4


def test_without_output_moments_there_is_no_B():
    moments = Moments.zeros(2, 3)
    moments.add_patches(torch.ones(4, 2, 3))
    assert moments.B() is None
    assert (moments + moments).B() is None
    assert (moments + moments).positions == 8


def test_empty_moments_are_zeros():
    moments = Moments.zeros(2, 3, 4)
    assert moments.A().tolist() == torch.zeros(2, 3, 3).tolist()
    assert moments.B().tolist() == torch.zeros(2, 4, 4).tolist()
    assert moments.mean().tolist() == torch.zeros(2, 3).tolist()


@some
@given(sizes)
def test_bytes_needed_cover_the_sums_and_a_float32_product(size):
    groups, inputs, outputs = size
    for wanted in (None, outputs):
        moments = Moments.zeros(groups, inputs, wanted)
        sums = moments.input_sum.nbytes + (0 if wanted is None else moments.output_sum.nbytes)
        assert Moments.bytes_needed(groups, inputs, wanted) == sums * 3 // 2


def test_finite_sees_every_sum():
    for bad in (float("nan"), float("inf"), -float("inf")):
        moments = Moments.zeros(2, 3, 4)
        assert moments.finite()
        patches = torch.zeros(5, 2, 3)
        patches[3, 1, 2] = bad
        moments.add_patches(patches)
        assert not moments.finite()
        moments = Moments.zeros(2, 3, 4)
        gradients = torch.zeros(2, 4, 5)
        gradients[0, 1, 2] = bad
        moments.add_gradients(gradients)
        assert not moments.finite()
