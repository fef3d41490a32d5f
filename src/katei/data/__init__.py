"""Tables → checked splits of labelled texts. Importing this imports neither torch nor `datasets`."""

from katei.data.dataset import Dataset, Split, bundled_poems, load_dataset, load_split
from katei.data.tables import Source, Table, open_source, read_table
from katei.data.warnings import cut_warnings
from katei.data.writing import write_table

__all__ = [
    "Dataset",
    "Source",
    "Split",
    "Table",
    "bundled_poems",
    "cut_warnings",
    "load_dataset",
    "load_split",
    "open_source",
    "read_table",
    "write_table",
]
