"""An edit on its way to what people run: a copy of a GGUF file (`gguf_copies.py`), a checkpoint for
transformers and vLLM (`checkpoints.py`), a LoRA adapter (`adapters.py`), the model card beside each
(`cards.py`), and the way back from what was written (`undoing.py`).

They take the fields of an edit as a mapping, `vars(edit)`: this room knows no method.
"""
