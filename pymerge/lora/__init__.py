"""LoRA adapters made of models and of other adapters.

Import the modules here; :func:`pymerge.extract_lora` and :func:`pymerge.combine_lora` are theirs.
"""
