"""What a results.json must hold for every page that reads it: checked once, since results are sent around."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StrictBool, StrictStr

from hybridssl.errors import UserError

Number = Annotated[float, Field(ge=-1e12, le=1e12)]  # charts compute with them


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", hide_input_in_errors=True, allow_inf_nan=False)


class _Backbone(_Part):
    name: StrictStr
    sha256: StrictStr | None
    baseline: StrictBool
    input_size: int | None = None


class _Data(_Part):
    index: StrictStr
    sha256: StrictStr
    synthetic: StrictBool
    source: StrictStr | None
    labels: Number
    splits: dict[StrictStr, NonNegativeInt]
    groups: dict[StrictStr, NonNegativeInt]
    classes: dict[StrictStr, dict[StrictStr, NonNegativeInt]]


class _Metric(_Part):
    value: Number | None  # null: NaN
    low: Number | None
    high: Number | None


class _Grid(_Part):
    shots: list[NonNegativeInt] = []  # of fewshot: labelled images a class


class _Selected(_Part):
    split: StrictStr
    grid: _Grid = _Grid()
    choices: list[dict[StrictStr, Any]] = Field(min_length=1)


class _Cost(_Part):
    seconds: Number
    labels_used: dict[StrictStr, list[NonNegativeInt]]


class _Leaks(_Part):
    pretraining: NonNegativeInt | None
    groups: NonNegativeInt
    images: NonNegativeInt
    allowed: StrictBool = False


class _Detail(_Part):
    said: list[StrictStr] = []
    results: dict[StrictStr, StrictStr] = {}  # of a comparison: who was compared


class _Task(_Part):
    select_by: StrictStr = ""


class _About(_Part):
    protocol: StrictStr
    backbone: _Backbone
    data: _Data
    metrics: dict[StrictStr, _Metric]
    selected: _Selected
    cost: _Cost
    leaks: _Leaks
    notes: list[StrictStr] = []
    task: _Task | None = None
    detail: _Detail | None = None


def check(about: dict[str, Any], where: str) -> None:
    """UserError that names the first part which is missing, or of another kind."""
    try:
        _About.model_validate(about)
    except ValueError as error:
        first = getattr(error, "errors", list)()[:1] or [{"loc": (), "msg": str(error)}]
        place = ".".join(str(part)[:40] for part in first[0]["loc"])
        raise UserError(
            f"{where} is not whole ({place}: {first[0]['msg']}): it was changed by hand; run the evaluation again"
        ) from error
