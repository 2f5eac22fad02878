"""Where weights come from and go to: headers, sources, hub, output layout, config and manifest."""

from pymerge.checkpoint.config import config_json, layer_count, output_config
from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.index import INDEX_NAME
from pymerge.checkpoint.layout import OutputTensor, ShardLayout, index_json, plan_shards
from pymerge.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    manifest_json,
    read_manifest,
)
from pymerge.checkpoint.sidefiles import companion_files, skipped_files, tokenizer_files
from pymerge.checkpoint.source import Checkpoint, is_head, open_checkpoint
from pymerge.checkpoint.verify import VerifyReport, verify_folder

__all__ = [
    "INDEX_NAME",
    "MANIFEST_NAME",
    "Checkpoint",
    "FileRecord",
    "Header",
    "Manifest",
    "OutputTensor",
    "ShardLayout",
    "TensorEntry",
    "VerifyReport",
    "companion_files",
    "config_json",
    "index_json",
    "is_head",
    "layer_count",
    "manifest_json",
    "open_checkpoint",
    "output_config",
    "plan_shards",
    "read_header",
    "read_manifest",
    "skipped_files",
    "tokenizer_files",
    "verify_folder",
]
