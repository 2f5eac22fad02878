"""Merges with tokenizers in one process of mergekit's environment.

``python drive_mergekit_tokenizers.py JOBS.json``, where JOBS is a list of {"recipe": YAML file,
"out": folder, "truncate": bool}. Writes OUT/error.txt where a merge failed and goes on; beside the
model OUT/vocabulary.json, the map of the tokenizer as transformers loads it.
"""

import json
import sys
import traceback
from pathlib import Path

import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True)
        options = MergeOptions(
            quiet=True, write_model_card=False, unsafe_truncate_embeddings=job["truncate"]
        )
        try:
            config = MergeConfiguration.model_validate(
                yaml.safe_load(Path(job["recipe"]).read_text())
            )
            run_merge(config, str(out), options=options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(out)
            (out / "vocabulary.json").write_text(json.dumps(tokenizer.get_vocab()))
            (out / "template.json").write_text(json.dumps(tokenizer.chat_template))
        except Exception:
            (out / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
