import numpy as np
import pytest
import torch

from prism_ray.methods.soft_labels import decode_fp16, encode_fp16, mean_logits


def test_the_mean_of_one_teacher_is_its_own_logits():
    logits = torch.randn(4, 10)
    assert torch.equal(mean_logits([logits]), logits)


def test_logits_are_averaged_over_teachers():
    first, second = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 6.0], [8.0, 0.0]])
    assert mean_logits([first, second]).tolist() == [[1.5, 5.0], [4.0, 0.0]]


def test_half_precision_logits_are_averaged_in_float32():
    logits = [torch.full((1, 1), 60000.0, dtype=torch.float16)] * 3
    assert mean_logits(logits).item() == 60000.0


def test_teachers_of_different_classes_are_refused():
    with pytest.raises(ValueError, match="disagree in shape"):
        mean_logits([torch.zeros(2, 10), torch.zeros(2, 9)])
    with pytest.raises(ValueError, match="at least one teacher"):
        mean_logits([])


def test_fp16_returns_what_it_stored_within_half_precision():
    logits = torch.randn(6, 10) * 20
    rows = encode_fp16(logits)
    assert [len(row) for row in rows] == [20] * 6
    decoded = decode_fp16(rows, 10)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, logits.half().float())
    assert ((decoded - logits).abs() <= logits.abs() * 2**-11).all()


def test_rows_are_little_endian_in_the_order_of_the_classes():
    assert encode_fp16(torch.tensor([[1.0, -2.0]])) == [b"\x00\x3c\x00\xc0"]


def test_a_row_is_encoded_alike_in_every_batch():
    logits = torch.randn(5, 3)
    assert encode_fp16(logits)[3] == encode_fp16(logits[3:4])[0]


def test_the_largest_half_fits_and_what_is_beyond_is_refused():
    assert decode_fp16(encode_fp16(torch.tensor([[65504.0, -65504.0]])), 2).tolist() == [[65504.0, -65504.0]]
    for wrong in (70000.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="do not fit fp16"):
            encode_fp16(torch.tensor([[0.0, wrong]]))


def test_labels_of_another_number_of_classes_are_refused():
    rows = encode_fp16(torch.zeros(2, 10))
    with pytest.raises(ValueError, match="label 0 has 20 bytes; expected 18"):
        decode_fp16(rows, 9)
    with pytest.raises(ValueError, match="label 1"):  # same number of bytes in all
        decode_fp16([rows[0], rows[1][:10], rows[1][10:]], 10)


def test_no_labels_decode_to_no_rows():
    assert decode_fp16([], 10).shape == (0, 10)


def test_decoded_logits_are_writable_and_their_own():
    rows = encode_fp16(torch.ones(1, 2))
    decode_fp16(rows, 2).zero_()
    assert np.frombuffer(rows[0], "<f2").tolist() == [1.0, 1.0]
