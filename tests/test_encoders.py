"""The encoders of images and captions, and their scores in reduced precision."""

import pytest
import torch

from model import (
    SCAN,
    ContrastiveLoss,
    EncoderImage,
    EncoderText,
    l2norm,
)


def test_zero_region_trains():
    """A region of zeros with a zero bias must not make the gradients large."""
    encoder = EncoderImage(6, 8)
    images = torch.randn(2, 3, 6)
    images[0, 0] = 0
    regions = encoder(images)
    assert regions[0, 0].abs().max() == 0
    regions[0, 1:].sum().backward()
    reach = encoder.fc.bias.grad.norm()
    encoder.zero_grad()
    encoder(images)[0].sum().backward()
    torch.testing.assert_close(encoder.fc.bias.grad.norm(), reach)


@pytest.mark.parametrize("bi_gru", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_text_encoder_ignores_padding_and_batch(bi_gru, layers):
    encoder = EncoderText(30, 4, 8, layers, bi_gru)
    captions = torch.randint(4, 30, (3, 7))
    lengths = torch.tensor([4, 7, 2])
    words = encoder(captions, lengths)
    assert words.shape == (3, 7, 8)
    for caption, length, got in zip(captions, lengths, words, strict=True):
        alone = encoder(caption[None, :length], length[None])[0]
        torch.testing.assert_close(got[:length], alone)
        assert (got[length:] == 0).all()
    torch.testing.assert_close(words[0, :4].norm(dim=1), torch.ones(4))
    ahead = encoder.rnn(encoder.embed(captions[1:2]))[0]
    if bi_gru:
        ahead = (ahead[..., :8] + ahead[..., 8:]) / 2
    torch.testing.assert_close(words[1:2], l2norm(ahead, -1))


def test_no_norm_flags():
    plain = SCAN(20, img_dim=6, word_dim=4, embed_size=8, no_imgnorm=True, no_txtnorm=True)
    batch = {"images": torch.randn(2, 3, 6), "captions": torch.ones(2, 3).long()}
    batch["lengths"] = torch.tensor([3, 2])
    regions = plain.encode_images(batch)["regions"]
    torch.testing.assert_close(regions, plain.img_enc.fc(batch["images"]))
    assert not torch.allclose(plain.encode_captions(batch)["words"][0].norm(dim=1), torch.ones(3))


def test_weight_norm_is_one_scalar_over_the_matrix():
    fc = EncoderImage(6, 8, "weight_norm").fc
    assert set(dict(fc.named_parameters())) == {"weight_g", "weight_v", "bias"}
    assert fc.weight_g.shape == ()
    x = torch.randn(3, 6)
    want = x @ (fc.weight_g * fc.weight_v / fc.weight_v.norm()).T + fc.bias
    torch.testing.assert_close(fc(x), want)
    with torch.no_grad():
        fc.weight_v *= 7
    torch.testing.assert_close(fc(x), want)


def test_initialisation():
    encoder = EncoderImage(300, 200)
    bound = (6 / 500) ** 0.5
    assert encoder.fc.bias.abs().max() == 0
    assert 0.95 * bound < encoder.fc.weight.abs().max() <= bound
    text = EncoderText(500, 40, 8)
    assert 0.099 < text.embed.weight.abs().max() <= 0.1


def test_float16_features_are_read():
    encoder = EncoderImage(6, 8)
    images = torch.randn(2, 3, 6).half()
    torch.testing.assert_close(encoder(images), encoder(images.float()))


def test_amp_keeps_scores_in_float32():
    net = SCAN(20, img_dim=16, word_dim=8, embed_size=32, bi_gru=True)
    batch = {
        "images": torch.randn(4, 5, 16),
        "captions": torch.randint(4, 20, (4, 6)),
        "lengths": torch.tensor([6, 5, 4, 3]),
    }
    with torch.autocast("cpu", torch.bfloat16):
        images, captions = net.encode_images(batch), net.encode_captions(batch)
    scores = net.similarity(images, captions)
    assert images["regions"].dtype == captions["words"].dtype == scores.dtype == torch.float32
    want = net.similarity(net.encode_images(batch), net.encode_captions(batch))
    torch.testing.assert_close(scores, want, rtol=0.05, atol=0.05)
    ContrastiveLoss(0.2)(scores).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
