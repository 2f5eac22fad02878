"""Where weights come from and go to: headers, sources, hub, output layout, config and manifest."""

from pymerge.checkpoint.adapter import AdapterTensor, LowRank, nominal_format, update_of
from pymerge.checkpoint.config import config_json, layer_count, output_config
from pymerge.checkpoint.config_parts import set_part_layers
from pymerge.checkpoint.derived import (
    DerivedTensor,
    entries_within,
    refuse_derived,
    stored_entries,
)
from pymerge.checkpoint.experts import is_packed, is_transposed_pack, laid_out_like
from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.index import INDEX_NAME
from pymerge.checkpoint.layout import (
    STATISTICS_FILES,
    STATISTICS_FOLDER,
    STATISTICS_NAME,
    TASKS_FILE,
    TASKS_STEM,
    OutputTensor,
    ShardLayout,
    index_json,
    plan_shards,
)
from pymerge.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    manifest_json,
    read_manifest,
)
from pymerge.checkpoint.parts import JoinedTensor, PartTensor, cut, joined
from pymerge.checkpoint.push import Pushed, push_folder
from pymerge.checkpoint.scaled import ScaledTensor
from pymerge.checkpoint.sidefiles import companion_files, skipped_files, tokenizer_files
from pymerge.checkpoint.source import Checkpoint, is_head, open_checkpoint, with_adapter
from pymerge.checkpoint.statistics import Statistics, find_statistics
from pymerge.checkpoint.verify import VerifyReport, verify_folder

__all__ = [
    "INDEX_NAME",
    "MANIFEST_NAME",
    "STATISTICS_FILES",
    "STATISTICS_FOLDER",
    "STATISTICS_NAME",
    "TASKS_FILE",
    "TASKS_STEM",
    "AdapterTensor",
    "Checkpoint",
    "DerivedTensor",
    "FileRecord",
    "Header",
    "JoinedTensor",
    "LowRank",
    "Manifest",
    "OutputTensor",
    "PartTensor",
    "Pushed",
    "ScaledTensor",
    "ShardLayout",
    "Statistics",
    "TensorEntry",
    "VerifyReport",
    "companion_files",
    "config_json",
    "cut",
    "entries_within",
    "find_statistics",
    "index_json",
    "is_head",
    "is_packed",
    "is_transposed_pack",
    "joined",
    "laid_out_like",
    "layer_count",
    "manifest_json",
    "nominal_format",
    "open_checkpoint",
    "output_config",
    "plan_shards",
    "push_folder",
    "read_header",
    "read_manifest",
    "refuse_derived",
    "set_part_layers",
    "skipped_files",
    "stored_entries",
    "tokenizer_files",
    "update_of",
    "verify_folder",
    "with_adapter",
]
