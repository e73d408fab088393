"""Compressed DICOM pixels through imagecodecs (libjpeg-turbo, CharLS, OpenJPEG), as a plugin of pydicom.

GDCM, which pydicom would take, ends the whole process on some damaged files; these libraries report an error. What a
stream says of its size is compared with the file's header before anything is decoded, so no stream of a few bytes asks
for gigabytes. Importing this module makes the plugin known to pydicom.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

PLUGIN = "imagecodecs"
_LIBJPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_CHARLS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_OPENJPEG = (uid.JPEG2000Lossless, uid.JPEG2000)
SYNTAXES = (*_LIBJPEG, *_CHARLS, *_OPENJPEG)
DECODER_DEPENDENCIES = dict.fromkeys(SYNTAXES, ("imagecodecs",))
_START, _SIZE = b"\xff\x4f\xff\x51", ">4x4I16xH"  # a JPEG 2000 codestream, and what follows (15444-1, A.5.1)
_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG markers that tell the size (10918-1, B.2.2; 14495-1)


def is_available(syntax: str) -> bool:
    """As pydicom asks a plugin."""
    return syntax in SYNTAXES and find_spec("imagecodecs") is not None


def decode_frame(source: bytes, runner: Any) -> bytes:
    """As pydicom calls a plugin: the values of a frame, whose colours it converts. ValueError for a damaged frame."""
    wanted = runner.rows, runner.columns, runner.samples_per_pixel
    found = stream_size(source)
    if found != wanted:
        raise ValueError(f"a frame of {found} where the header says {wanted}")
    if runner.transfer_syntax in _CHARLS and not source.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("a frame that is cut off, over which CharLS 2.4 may take many seconds")
    values: np.ndarray = _function(runner.transfer_syntax, wanted[2])(source)
    if values.size != wanted[0] * wanted[1] * wanted[2]:
        raise ValueError(f"a frame of {values.shape} where the header says {wanted}")
    runner.set_option("bits_allocated", 8 * values.itemsize)
    if wanted[2] > 1:
        runner.set_option("planar_configuration", 0)
        if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):  # which OpenJPEG undoes
            runner.set_option("photometric_interpretation", "RGB")
    return values.tobytes()


def stream_size(source: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) as a JPEG, JPEG-LS or JPEG 2000 stream says. ValueError when it says none."""
    at = source.find(_START, 0, 1 << 12)
    try:
        if at >= 0:
            right, low, left, top, components = struct.unpack_from(_SIZE, source, at + 4)
            return low - top, right - left, components
        at = source.index(b"\xff\xd8") + 2
        while (marker := source[at + 1]) not in _FRAME:
            if source[at] != 0xFF:
                break
            at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", source, at + 2)[0]
        else:
            return struct.unpack_from(">HHB", source, at + 5)
    except (IndexError, struct.error):
        pass
    raise ValueError("a stream without a header")


def _function(syntax: str, components: int) -> Callable[[bytes], np.ndarray]:
    import imagecodecs

    if syntax in _CHARLS:
        return imagecodecs.jpegls_decode
    if syntax in _OPENJPEG:
        return imagecodecs.jpeg2k_decode
    space = "RGB" if components == 3 else None  # called so on both sides, nothing is converted
    return lambda source: imagecodecs.jpeg8_decode(source, colorspace=space, outcolorspace=space)


for _syntax in SYNTAXES:
    get_decoder(_syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
