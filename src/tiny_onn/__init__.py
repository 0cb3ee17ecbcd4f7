"""Tiny-ONN: turn a dense pretrained language model into a Hyper-SMoE of ultra-light experts.

Importing the package registers the model with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads a student.
"""

from tiny_onn.modeling import TinyOnnConfig, TinyOnnForCausalLM

__all__ = ["TinyOnnConfig", "TinyOnnForCausalLM"]
