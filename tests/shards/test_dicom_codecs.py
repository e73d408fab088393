"""Compressed pixels: what the codecs are given is bounded, what they give back is what was stored."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import strategies as st
from pydicom import uid
from pydicom.encaps import encapsulate

from shards import dicom, dicom_codecs
from shards.errors import DataError
from shards.format import MAX_PIXELS
from tests.shards.test_dicom import OPTIONS, make
from tests.shards.test_fuzz import BOTH, damage, run

GREY = (np.linspace(0, 4000, 24 * 30).reshape(24, 30) + np.arange(30) % 7).astype(np.uint16)
COLOUR = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
STREAMS: dict[str, tuple[str, bytes, np.ndarray]] = {
    "lossless": (uid.JPEGLosslessSV1, imagecodecs.jpeg8_encode(GREY, lossless=True, bitspersample=12), GREY),
    "12 bits": (uid.JPEGExtended12Bit, imagecodecs.jpeg8_encode(GREY, level=98, bitspersample=12), GREY),
    "baseline": (uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode((GREY >> 4).astype(np.uint8), level=98), GREY >> 4),
    "JPEG-LS": (uid.JPEGLSLossless, imagecodecs.jpegls_encode(GREY), GREY),
    "JPEG 2000": (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(GREY, codecformat="j2k"), GREY),
    "a JP2 file": (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(GREY, codecformat="jp2"), GREY),
    "colours": (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(COLOUR, codecformat="j2k", reversible=True), COLOUR),
    "colours of JPEG-LS": (uid.JPEGLSLossless, imagecodecs.jpegls_encode(COLOUR), COLOUR),
}


class Runner(SimpleNamespace):
    """What pydicom tells a plugin, and is told."""

    def set_option(self, name: str, value: Any) -> None:
        setattr(self, name, value)


def runner(name: str) -> Runner:
    syntax, _, values = STREAMS[name]
    colours = "YBR_RCT" if values.ndim == 3 else "MONOCHROME2"
    planes = values.shape[2] if values.ndim == 3 else 1
    rows, columns = values.shape[:2]
    return Runner(
        transfer_syntax=syntax, rows=rows, columns=columns, samples_per_pixel=planes, photometric_interpretation=colours
    )


@pytest.mark.parametrize("name", STREAMS)
def test_values_come_as_they_were_stored(name: str) -> None:
    _, stream, values = STREAMS[name]
    asked = runner(name)
    found = np.frombuffer(dicom_codecs.decode_frame(stream, asked), f"u{asked.bits_allocated // 8}")
    loss = 40 if name == "12 bits" else 3 if name == "baseline" else 0
    assert np.abs(found.reshape(values.shape).astype(int) - values).max() <= loss
    assert asked.photometric_interpretation == ("RGB" if values.ndim == 3 else "MONOCHROME2")


def test_the_colours_of_a_jpeg_are_left_to_pydicom() -> None:
    """A stream of DICOM need not say whether it holds RGB or YCbCr; the header does."""
    smooth = np.stack(np.broadcast_arrays(np.arange(24)[:, None] * 9, np.arange(30)[None] * 7, 60), 2).astype(np.uint8)
    stream = imagecodecs.jpeg8_encode(smooth, level=98, colorspace="YCBCR", outcolorspace="YCBCR", subsampling="444")
    asked = Runner(transfer_syntax=uid.JPEGBaseline8Bit, rows=24, columns=30, samples_per_pixel=3)
    asked.photometric_interpretation = "YBR_FULL"
    found = np.frombuffer(dicom_codecs.decode_frame(stream, asked), np.uint8).reshape(smooth.shape)
    assert np.abs(found.astype(int) - smooth).max() < 12
    assert (asked.photometric_interpretation, asked.planar_configuration) == ("YBR_FULL", 0)


@pytest.mark.parametrize("name", STREAMS)
def test_another_size_than_the_headers_is_refused_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_codecs, "_function", lambda *_: pytest.fail("decoded"))
    asked = runner(name)
    asked.rows += 1
    with pytest.raises(ValueError, match="where the header says"):
        dicom_codecs.decode_frame(STREAMS[name][1], asked)
    for nothing in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\0" * 9, STREAMS[name][1][:4]):
        with pytest.raises(ValueError, match=r"stream without a header|not found"):
            dicom_codecs.stream_size(nothing)


@pytest.mark.parametrize("keep", range(40, 240, 10))
def test_a_stream_of_jpeg_ls_that_is_cut_off_is_refused_before_decoding(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_codecs, "_function", lambda *_: pytest.fail("decoded"))  # which may take many seconds
    with pytest.raises(ValueError, match=r"cut off|without a header"):
        dicom_codecs.decode_frame(STREAMS["JPEG-LS"][1][:keep] + b"\0", runner("JPEG-LS"))


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", STREAMS)
def test_damage_is_an_error_and_no_crash(name: str, how: Any) -> None:
    def check(data: bytes) -> None:
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            dicom_codecs.decode_frame(data, runner(name))

    run(how, st.one_of(damage(STREAMS[name][1]), st.binary(max_size=60)), check)


def whole_file(syntax: str) -> bytes:
    """Two frames, as a file."""
    file = make(np.stack([GREY, GREY]))
    if syntax == uid.RLELossless:
        file.compress(syntax)
    elif syntax != uid.ExplicitVRLittleEndian:
        stream = next(stream for own, stream, _ in STREAMS.values() if own == syntax)
        file.file_meta.TransferSyntaxUID, file.PixelData = syntax, encapsulate([stream, stream])
        file["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLosslessSV1])
def test_a_damaged_file_is_a_frame_or_a_data_error(syntax: str, how: Any) -> None:
    def check(data: bytes) -> None:
        with contextlib.suppress(DataError):
            assert all(frame.pixels.size <= 3 * MAX_PIXELS for _, _, frame in dicom.read(data, OPTIONS).frames)

    run(how, damage(whole_file(syntax)), check)
