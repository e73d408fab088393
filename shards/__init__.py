"""Images and a table become tar shards with an index; a training run reads them in an order that is a function."""

from shards.errors import DataError
from shards.format import Sample, decode, decode_mask
from shards.index import Index
from shards.stream import Order, Positions, Quarantine, SampleDataset, StreamOptions

__all__ = [
    "DataError",
    "Index",
    "Order",
    "Positions",
    "Quarantine",
    "Sample",
    "SampleDataset",
    "StreamOptions",
    "decode",
    "decode_mask",
]
