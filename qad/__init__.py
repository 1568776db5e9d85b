"""NVFP4 quantization and distillation: one definition of the numbers for calibration, training, export and loading.

Needs torch, transformers and safetensors. numba, where installed, makes the CPU paths fast; results are the same bits.
"""
