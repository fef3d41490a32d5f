"""Tables → checked splits of labelled texts. Importing this imports neither torch nor `datasets`."""

from katei.data.dataset import Dataset, Split, bundled_poems, load_dataset, load_split
from katei.data.tables import Table, read_table, write_table
from katei.data.warnings import cut_warnings

__all__ = [
    "Dataset",
    "Split",
    "Table",
    "bundled_poems",
    "cut_warnings",
    "load_dataset",
    "load_split",
    "read_table",
    "write_table",
]
