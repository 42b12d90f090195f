"""Compile the kernels of triton_kernels.py for a GPU, on a machine without one.

For test_triton_kernels.py: its interpreter takes what the compiler refuses, a variable that changes its shape
in a loop for one. Triton has everything with it, down to NVIDIA's assembler; only a launch needs a device. So
this records what the launchers would launch, and hands it to the compiler. By hand, for all types and both
head sizes, by compute capability:

    python -m tests.kernels.compile_triton 75 80 90
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import triton_kernels as tk

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


def record_launches(dtype: torch.dtype, head_size: int, max_length: int) -> list[tuple]:
    """(kernel, its arguments by name, its options) of a call of every launcher."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: named.pop(name) for name in kwargs if name not in kernel.arg_names}
        launches.append((kernel, named, options))

    JITFunction.run = record
    num_heads, num_tasks = 12, 3
    width = num_heads * head_size
    x, qkv = torch.empty(32, width, dtype=dtype), torch.empty(32, 3 * width, dtype=dtype)
    number, numbers = torch.empty(32), torch.empty(8, dtype=torch.float64)
    integer, rng = torch.empty(32, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
    vector, sums, grads = (
        torch.empty(width),
        torch.empty(num_tasks, width),
        torch.empty(3, width, dtype=dtype),
    )
    sequences, dropout = (integer, integer, num_heads, max_length), (0.1, rng, 5)
    tk.attention_forward(qkv, *sequences, *dropout)
    tk.attention_backward(qkv, x, *sequences, *dropout)
    tk.dropout_forward(x, *dropout)
    tk.dropout_add_norm_forward(x, x, vector, vector, 1e-12, *dropout)
    tk.dropout_add_norm_forward(x, None, vector, vector, 1e-12, 0.0, rng, 0)
    tk.dropout_add_norm_backward(x, x, number, vector, *dropout, True)
    tk.dropout_add_norm_backward(x, x, number, vector, 0.0, rng, 0, False)
    tk.sum_by_task(x, integer[:num_tasks], sums)
    tk.sum_by_task(x, integer[:num_tasks], sums, x, accumulate=True)
    tk.sum_rows(x, *[integer] * 4, number)
    tk.gram_by_block(grads, integer.long(), integer.long())
    tk.gram_by_block(grads, integer.long(), integer.long(), alignment=16)
    tk.combine_adamw(grads, number[:num_tasks], *[vector] * 3, numbers, vector.to(dtype), vector)
    tk.combine_adamw(sums[:1], number[:1], *[vector] * 3, numbers.float())
    return launches


def compile_launch(kernel: JITFunction, named: dict, options: dict, capability: int) -> int:
    """Compile as the launch would have; the bytes of shared memory that a program takes."""
    signature, constants, aligned = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = named[param.name]
        is_one = type(value) is int and value == 1 and not param.do_not_specialize  # Triton compiles a 1 in
        if param.is_constexpr or value is None or is_one:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{NAMES[value.dtype]}"
            aligned[i,] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options).metadata.shared


def main(capability: int, dtype: torch.dtype, head_size: int, max_length: int) -> None:
    for kernel, named, options in record_launches(dtype, head_size, max_length):
        shared = compile_launch(kernel, named, options, capability)
        if "TILE" in named and capability >= 80:
            tile = tk.TILES[named["TILE"]]
            assert shared <= (tile.shared_float32 if dtype == torch.float32 else tile.shared_16_bit)
        what = f"{kernel.__name__} {named.get('TILE', '')}".strip()
        print(f"sm_{capability} {NAMES[dtype]} {head_size} {what}: {shared} bytes", flush=True)


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if dtype != torch.bfloat16 or capability >= 80:
                for head_size in (32, 64):
                    main(capability, dtype, head_size, tk.MAX_TILE)
