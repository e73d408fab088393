"""DICOM: pixels in their rescaled units through a window, a few tags by name, and no identifier that is not hashed.

No error message here repeats what a file says, for it may be a name. Needs pydicom (`pip install 'hybridssl[dicom]'`).
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.format import bound
from shards.options import BuildOptions
from shards.privacy import Salt
from shards.sources import Frame, Opened, choose, error_name, scaled

SUFFIXES = (".dcm", ".dicom", ".ima")
# What is kept without asking: how the picture was made. Nothing of it says who it shows.
TAGS = (
    *("Modality", "BodyPartExamined", "ViewPosition", "Laterality", "ImageLaterality"),
    *("Manufacturer", "ManufacturerModelName", "PixelSpacing", "SliceThickness"),
)
_CODED = ("CS", "AS", "DS", "IS", "FL", "FD", "SL", "SS", "UL", "US")  # codes and numbers: no room for free text
_BY_NAME = ("Manufacturer", "ManufacturerModelName")  # text, but of the device's maker
_NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "PatientBirthDate", "IssuerOfPatientID")
_CODE = re.compile(r"[A-Z0-9 _]{1,16}")  # the grammar of CS (PS3.5, table 6.2-1)


@dataclass(frozen=True)
class Study:
    """One file: its identifiers hashed, its tags, and its pixels behind `_frames`."""

    group: str  # the patient, hashed; "": unknown
    meta: dict[str, Any]
    count: int  # frames in the file
    dataset: Any


@dataclass(frozen=True)
class Place:
    """Where a slice belongs. The series is an identifier: never to be stored or shown."""

    series: str = ""
    depth: float | None = None  # in mm along the normal of its plane
    number: int | None = None  # InstanceNumber


def place(path: Path) -> Place:
    """Series and position of a file, from its header alone; Place() when it cannot be read."""
    pydicom = _pydicom()
    tags = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"]
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
        series, number = str(dataset.get("SeriesInstanceUID") or "").strip(), dataset.get("InstanceNumber")
        corner, axes = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
        depth = float(np.dot(np.cross(axes[:3], axes[3:]), corner)) if corner and axes else None
        return Place(series, depth, None if number is None else int(number))
    except Exception:  # whoever packs it will meet the same, and say so
        return Place()


def is_mine(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def check_tags(names: tuple[str, ...]) -> None:
    """DataError for a name that is no tag, or a tag that could hold an identifier."""
    datadict = _pydicom().datadict
    for name in names:
        tag = datadict.tag_for_keyword(name)
        if tag is None:
            raise DataError(f"--tags {name}: DICOM knows no such keyword (they are written as in BodyPartExamined)")
        if datadict.dictionary_VR(tag) not in _CODED and name not in _BY_NAME:
            raise DataError(f"--tags {name}: it may name a person, a place or a day; codes and numbers can be kept")


def read(data: bytes, options: BuildOptions) -> Opened:
    """RGB as 8 bits, grey as 16 bits through the window. DataError for what cannot or should not be read."""
    study = _study(data, options)
    return Opened(_frames(study, options), study.group, study.meta)


def _study(data: bytes, options: BuildOptions) -> Study:
    """Everything but the pixels. DataError, in words of our own, for what cannot or should not be read."""
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # files from before there were headers
            implicit, _ = dataset.original_encoding
            syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
            dataset.file_meta.TransferSyntaxUID = syntax
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        count = int(dataset.get("NumberOfFrames") or 1)
        burned_in = str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES"
        hashed = _hashed(dataset, Salt(options.salt))
        meta = _tags(dataset, (*TAGS, *options.tags))
    except DataError:
        raise
    except Exception as error:  # a damaged header fails in many ways
        raise DataError(f"no DICOM image that can be read ({error_name(error)})") from None
    bound(columns, rows)
    if count < 1 or count > len(data):
        raise DataError(f"its number of frames ({count:,}) cannot be right")
    if burned_in and not options.keep_burned_in:
        raise DataError("it says that text is burnt into its pixels (BurnedInAnnotation), perhaps a name: look at it, "
                        "and build with --keep-burned-in if there is none")  # fmt: skip
    group = hashed.pop("group", "")
    return Study(group, meta | hashed, count, dataset)


def _frames(study: Study, options: BuildOptions) -> Iterator[tuple[int, int, Frame]]:
    pixels, codecs = _pydicom().pixels, import_module("shards.dicom_codecs")
    plugin = codecs.PLUGIN if study.dataset.file_meta.TransferSyntaxUID in codecs.SYNTAXES else ""
    for number in choose(study.count, options.frames):
        try:
            values = pixels.pixel_array(study.dataset, index=number, decoding_plugin=plugin)
            yield number, study.count, _frame(study.dataset, values, number, options)
        except DataError:
            raise
        except Exception as error:
            why = f"{error_name(error)}; {_syntax(study.dataset.file_meta.TransferSyntaxUID)}"
            raise DataError(f"frame {number} of {study.count} cannot be decoded ({why})") from None


def _syntax(uid: Any) -> str:
    """The compression of a file by the name that DICOM gives it, and what is missing to read it."""
    if not uid.is_transfer_syntax:  # the words of a file, which may be a name
        return "its transfer syntax is unknown"
    try:
        decoder = _pydicom().pixels.get_decoder(uid)
    except NotImplementedError:
        return f"{uid.name} cannot be read here: convert the file, for example to JPEG 2000"
    missing = {text.split(" ")[0]: text.partition(" - requires ")[2] for text in decoder.missing_dependencies}
    ours = "imagecodecs" in missing
    if decoder.is_available and not ours:
        return str(uid.name)
    package = "'hybridssl[dicom]'" if ours else next(iter(missing.values())).replace(" and ", " ")
    return f"{uid.name} needs another package: pip install {package}"


def window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Rescaled values -> 0..1, as PS3.3 C.11.2.1.2 and C.11.2.1.3 define them."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        low, span = centre - width / 2, width
    else:
        low, span = centre - 0.5 - (width - 1) / 2, width - 1
    return np.clip((values - low) / max(span, 1e-12), 0, 1)


def _frame(dataset: Any, values: np.ndarray, number: int, options: BuildOptions) -> Frame:
    pixels, kind = _pydicom().pixels, str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    if values.ndim == 3:
        bits = int(dataset.BitsStored) if kind != "PALETTE COLOR" else 8
        return Frame((values >> max(bits - 8, 0)).astype(np.uint8)[..., :3])
    share = _windowed(dataset, values, number, options)
    return scaled((1 - share if kind == "MONOCHROME1" else share)[..., None], 0.0, 1.0)


def _windowed(dataset: Any, values: np.ndarray, number: int, options: BuildOptions) -> np.ndarray:
    """Stored grey values [H, W] -> 0..1: to their units, then through the window that was asked for."""
    slope, intercept = (_of_frame(dataset, number, name) for name in ("RescaleSlope", "RescaleIntercept"))
    values = values.astype(np.float64)
    if "ModalityLUTSequence" in dataset:
        values, _ = _looked_up(dataset.ModalityLUTSequence[0], values)
    elif slope is not None and intercept is not None:
        values = values * float(slope) + float(intercept)
    if options.window == "file" and "VOILUTSequence" in dataset:
        values, top = _looked_up(dataset.VOILUTSequence[0], values)
        return np.clip(values / top, 0, 1)
    centre, width = _of_frame(dataset, number, "WindowCenter"), _of_frame(dataset, number, "WindowWidth")
    if options.window not in ("file", "full"):
        return window(values, *options.window_range())
    if options.window == "file" and centre is not None and width is not None and float(_first(width)) > 0:
        function = _of_frame(dataset, number, "VOILUTFunction") or "LINEAR"
        return window(values, float(_first(centre)), float(_first(width)), str(function))
    low, high = float(values.min()), float(values.max())
    return (values - low) / max(high - low, 1e-12)


def _looked_up(item: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Values through a table (PS3.3 C.11.1.1), and the largest that it could give. pydicom's own wraps at 256."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    data, entries = item.LUTData, entries or 1 << 16
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * entries else "u1")
    table = np.asarray(data, np.float64)[:entries]
    return table[np.clip(np.round(values).astype(np.int64) - first, 0, len(table) - 1)], (1 << bits) - 1


def _of_frame(dataset: Any, number: int, keyword: str) -> Any:
    """A value of the file or, in enhanced multi-frame files, of the frame or of all frames; None: there is none."""
    if dataset.get(keyword) is not None:
        return dataset.get(keyword)
    each, shared = dataset.get("PerFrameFunctionalGroupsSequence"), dataset.get("SharedFunctionalGroupsSequence")
    groups = ([each[number]] if each and number < len(each) else []) + ([shared[0]] if shared else [])
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if group.get(name) and group[name][0].get(keyword) is not None:
                return group[name][0].get(keyword)
    return None


def _first(value: Any) -> Any:
    return value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value


def _hashed(dataset: Any, salt: Salt) -> dict[str, str]:
    """The identifiers there are: patient (group), study and series."""
    names = {"group": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
    values = {kind: str(dataset.get(name) or "").strip() for kind, name in names.items()}
    return {kind: salt.hash(kind, value) for kind, value in values.items() if value}


def _tags(dataset: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """{keyword: value}: numbers, codes of the right grammar, and what _BY_NAME lists; anything else is left out, and so
    is a text that repeats what the same file has for a name or a number of the patient: people type into any field."""
    found: dict[str, Any] = {}
    who = _identifiers(dataset)
    for name in names:
        value = dataset.get(name)
        if value is None or value == "":
            continue
        if name == "PatientAge":  # 089Y; older people are few enough to be found by their age
            match = re.fullmatch(r"(\d{3})Y", str(value))
            found |= {name: "90+" if int(match[1]) >= 90 else str(int(match[1]))} if match else {}
        elif isinstance(value, str) and (who & _words(value) or any(w in value.upper() for w in who if len(w) > 3)):
            continue
        elif name in _BY_NAME:
            found[name] = str(value)[:64]
        elif isinstance(value, str):
            found |= {name: value} if _CODE.fullmatch(value) else {}
        elif hasattr(value, "__len__"):
            found |= {name: [float(v) for v in value]} if all(isinstance(v, float | int) for v in value) else {}
        else:
            found[name] = float(value)
    return found


def _identifiers(dataset: Any) -> set[str]:
    """The words of all names of persons in a file, and of the numbers that stand for the patient."""
    found: set[str] = set()
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
            if element.VR == "PN" or element.keyword in _NUMBERS:
                found |= _words(str(element.value))
        except Exception:  # a damaged element says nothing, neither here nor among the tags
            continue
    return found


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[\W_]+", text.upper()) if len(word) > 1}


@cache
def _pydicom() -> Any:
    """pydicom, which is silent from then on: its warnings quote what a file says.

    For good, and not for a while: several threads read at a time, and the first that is done would let it speak of the
    files of the others.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise DataError("DICOM files need pydicom: pip install 'hybridssl[dicom]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"(pydicom|shards)\b")
    return pydicom
